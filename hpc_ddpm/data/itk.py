"""NRRD, MetaImage and PNG through SimpleITK, which is optional; nothing is read that the file cannot hold.

What a DICOM series is: `dicom`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.data.bounded import MAX_RATIO, SLACK
from hpc_ddpm.data.dicom import LPS_TO_RAS, load_sitk, read_slices, series_affine
from hpc_ddpm.data.formats import Header, png_files, text_head, volume_files
from hpc_ddpm.data.header_text import identifying_keys
from hpc_ddpm.errors import DataFormatError

Affine = NDArray[np.float64]
NAMES = "NRRD and MetaImage files"


def read_image(path: Path) -> tuple[NDArray[Any], Affine]:
    """Voxels (X, Y, Z) and the affine to mm, RAS+.

    Raises:
        DataFormatError: voxels elsewhere than beside it, several segments on one voxel, or more than the file can hold.
        Exception: whatever SimpleITK meets in a damaged file.
    """
    reader = _open(path)
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.array(reader.GetDirection()).reshape(3, 3) * reader.GetSpacing()
    affine[:3, 3] = reader.GetOrigin()
    affine[:3] = LPS_TO_RAS @ affine[:3]
    return load_sitk(path, NAMES).GetArrayFromImage(image).T, affine


def read_image_facts(path: Path) -> Header:
    """What the header says; raises as `read_image` does."""
    reader = _open(path)
    pairs = [(key, reader.GetMetaData(key)) for key in reader.GetMetaDataKeys()]
    has_place = not path.name.lower().endswith((".nrrd", ".nhdr")) or b"space origin:" in text_head(path)
    return Header(tuple(reader.GetSize()), False, has_place, identifying_keys(pairs))


def read_stack(folder: Path, series: Path) -> tuple[NDArray[Any], Affine]:
    """The mask in a folder of PNG files: one for each slice of the DICOM series that was segmented.

    Files of the same names belong together; else the k-th PNG and the k-th slice by name, as long as the names of the
    slices go with their places.

    Args:
        folder: of the PNG files.
        series: folder of the slices.

    Raises:
        DataFormatError: other numbers or sizes, or which belongs to which cannot be told.
    """
    files, slices = png_files(folder), read_slices(series)
    if len(files) != len(slices) or len(slices) < 2:
        raise DataFormatError(
            f"{folder}: {len(files)} PNG files found, {len(slices)} expected, one for each slice of {series}",
            "grid-shape",
        )
    by_name = sorted(slices, key=lambda one: one.path.name)
    partner = {one.path: file for one, file in zip(by_name, files, strict=True)}
    places = [one.height for one in by_name]
    if [one.path.stem for one in by_name] != [file.stem for file in files] and places not in (
        sorted(places),
        sorted(places, reverse=True),
    ):
        raise DataFormatError(
            f"{folder}: which PNG belongs to which slice of {series} cannot be told: the names of the slices do not go "
            "with their places; call each PNG as its slice, or convert both to NIfTI",
            "grid-affine",
        )
    planes = [_read_png(partner[one.path], slices[0].shape[:2]) for one in slices]
    return np.stack(planes, axis=-1), series_affine(slices)


def _read_png(path: Path, shape: tuple[int, ...]) -> NDArray[Any]:
    """(columns, rows)."""
    sitk = load_sitk(path, "PNG files")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    if tuple(reader.GetSize()[:2]) != tuple(shape):
        found = "x".join(map(str, reader.GetSize()[:2]))
        raise DataFormatError(
            f"{path.parent}: {path.name} has {found} pixels, its slice {'x'.join(map(str, shape))}", "grid-shape"
        )
    if reader.GetNumberOfComponents() != 1:
        raise DataFormatError(
            f"{path.parent}: {path.name} has colours, labels expected; save it with one channel", "unreadable"
        )
    return np.asarray(sitk.GetArrayFromImage(reader.Execute()).T)


def _open(path: Path) -> Any:
    """A reader that has seen the header."""
    sitk = load_sitk(path, NAMES)
    files = volume_files(path)
    if any(file.parent != path.parent for file in files):
        raise DataFormatError(f"{path}: its voxels lie in another folder; put both files into one", "unreadable")
    for file in files:
        if not file.is_file():
            raise DataFormatError(f"{file}: no such file; check the path", "missing-file")
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if path.name.lower().endswith(("nrrd", "nhdr")) else "MetaImageIO")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    if reader.GetDimension() != 3 or reader.GetNumberOfComponents() != 1:
        what = "of segments that overlap " if path.name.lower().endswith(".seg.nrrd") else ""
        raise DataFormatError(
            f"{path}: {reader.GetNumberOfComponents()} layers {what}in {reader.GetDimension()} dimensions found, one "
            "volume expected; export it as one label map",
            "series",
        )
    voxel = sitk.GetArrayFromImage(sitk.Image([1, 1, 1], reader.GetPixelID())).itemsize
    promised, size = math.prod(reader.GetSize()) * voxel, sum(file.stat().st_size for file in files)
    if promised > size * MAX_RATIO + SLACK:
        raise EOFError(f"its header promises {promised} bytes, it holds {size * MAX_RATIO} at most")
    return reader
