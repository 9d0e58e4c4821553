"""One DICOM series in a folder to an array: the only user of SimpleITK, which is optional.

GDCM decodes the voxels and applies slope and intercept; where slices lie is taken from their headers and checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.data.header_text import identifying_tags
from hpc_ddpm.errors import ConfigError, DataFormatError

Floats = NDArray[np.float64]
SUFFIXES = (".dcm", ".ima")
OTHERS = (".gz", ".nii", ".mgz", ".mgh", ".json")
"""Suffixes of files that need no look inside."""
MAGIC_AT, MAGIC = 128, b"DICM"
BITS, SYNTAX = "0028|0100", b"\x02\x00\x10\x00UI"
"""Tags: bits of a voxel, as SimpleITK names it; transfer syntax, as its bytes begin."""
PLAIN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
"""Transfer syntaxes that do not compress."""
MAX_RATIO = 5000
"""Most that the other transfer syntaxes compress; an empty slice of JPEG 2000 comes to about 2000."""
MAX_TILT, MAX_UNEVEN, SAME_PLACE_MM = 1e-3, 0.05, 1e-3
"""Between orientations; of the usual distance of slices; between slices."""
PLACE_TAGS = ("0020|0037", "0028|0030")
"""Orientation and spacing."""
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Slice:
    """What one file says of itself."""

    path: Path
    series: str
    modality: str
    shape: tuple[int, ...]
    """(columns, rows, frames)."""
    position: Floats
    """(3,), mm, LPS: centre of the first voxel."""
    orientation: Floats
    """(2, 3): directions of rising column and rising row, LPS."""
    spacing: Floats
    """(2,), mm between columns, and between rows."""
    is_scaled: bool
    is_placed: bool
    """Whether orientation and spacing are its own; else the reader made them up."""
    texts: tuple[str, ...] = ()
    """Names of tags that may identify a person."""

    @property
    def height(self) -> float:
        """Along the normal of the slice, mm."""
        return float(np.cross(*self.orientation) @ self.position)


def is_series(folder: Path) -> bool:
    """Whether this is a folder that holds DICOM files."""
    return folder.is_dir() and any(_is_dicom(path) for path in folder.iterdir())


def series_files(folder: Path) -> list[Path]:
    """The DICOM files of a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if _is_dicom(path))


def read_series(folder: Path) -> tuple[NDArray[np.float32], Floats]:
    """The volume of a folder that holds one series.

    Returns:
        (X, Y, Z) = (columns, rows, slices) with slope and intercept applied, and the affine (4, 4) to mm, RAS+.

    Raises:
        ConfigError: the reader is not installed.
        DataFormatError: several series, slices missing, twice, at uneven distances or undecodable.
    """
    sitk, slices = load_sitk(folder), read_slices(folder)
    try:
        if len(slices) == 1:
            return _read_frames(sitk, slices[0])
        reader = sitk.ImageSeriesReader()
        reader.SetOutputPixelType(sitk.sitkFloat32)  # or the first slice would decide the type of all
        reader.SetFileNames([str(one.path) for one in slices])
        volume = sitk.GetArrayFromImage(reader.Execute()).T
    except RuntimeError as error:
        raise DataFormatError(
            f"{folder}: the slices cannot be decoded ({_last(error)}); copy them again", "unreadable"
        ) from None
    return volume, series_affine(slices)


def read_slices(folder: Path) -> list[Slice]:
    """The headers of the slices of one series, in the order of their places.

    Raises:
        ConfigError: the reader is not installed.
        DataFormatError: as `read_series`, except for the voxels.
    """
    reader = load_sitk(folder).ImageFileReader()
    slices = [_read_slice(reader, path) for path in series_files(folder)]
    if not slices:
        raise DataFormatError(
            f"{folder}: no DICOM files found in this folder; give a file or a DICOM series", "dicom-series"
        )
    kinds = {(one.series, one.shape) for one in slices}
    if len(kinds) > 1:
        series = len({one.series for one in slices})
        found = f"{series} DICOM series" if series > 1 else "slices of different shapes"
        raise DataFormatError(
            f"{folder}: {found} found in one folder, one expected; give each series its own folder", "dicom-series"
        )
    if slices[0].modality == "SEG":
        raise DataFormatError(
            f"{folder}: a DICOM SEG object found; convert it to NIfTI, for example with dcmqi's segimage2itkimage",
            "unreadable",
        )
    if len(slices) > 1:
        slices.sort(key=lambda one: one.height)
        _check_places(folder, slices)
    return slices


def _check_places(folder: Path, slices: list[Slice]) -> None:
    if any(np.abs(one.orientation - slices[0].orientation).max() > MAX_TILT for one in slices):
        raise DataFormatError(
            f"{folder}: slices of different orientations found, parallel ones expected; leave it out", "dicom-series"
        )
    gaps = np.diff([one.height for one in slices])
    usual = float(np.median(gaps))
    for gap, lower, upper in zip(gaps, slices, slices[1:], strict=False):
        between = f"{lower.path.name} and {upper.path.name}"
        if gap < SAME_PLACE_MM:
            raise DataFormatError(
                f"{folder}: duplicate slices: {between} lie at the same place; keep one of them", "dicom-series"
            )
        if abs(gap - usual) > MAX_UNEVEN * usual:
            raise DataFormatError(
                f"{folder}: missing slices: {gap:g} mm between {between}, {usual:g} mm elsewhere; "
                "copy the series again",
                "dicom-series",
            )


def _read_slice(reader: Any, path: Path) -> Slice:
    reader.SetFileName(str(path))
    try:
        reader.SetImageIO("GDCMImageIO")
        reader.ReadImageInformation()
        if reader.GetNumberOfComponents() != 1:
            raise DataFormatError(
                f"{path.parent}: a colour image found, numbers expected; leave the series out", "unreadable"
            )
        _check_size(reader, path)
        tags = {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()}
        slope, intercept = float(tags.get("0028|1053", 1)), float(tags.get("0028|1052", 0))
        position, across = np.array(reader.GetOrigin()), np.array(reader.GetDirection()).reshape(3, 3)
    except (RuntimeError, ValueError) as error:
        raise DataFormatError(
            f"{path.parent}: {path.name} is damaged or not a DICOM image ({_last(error)}); copy it again",
            "unreadable",
        ) from None
    return Slice(
        path,
        tags.get("0020|000e", "").strip("\0 "),
        tags.get("0008|0060", "").strip(),
        tuple(reader.GetSize()),
        position,
        across[:, :2].T,
        np.array(reader.GetSpacing()[:2]),
        (slope, intercept) != (1.0, 0.0),
        reader.GetSize()[2] > 1 or all(tags.get(key, "").strip("\0 ") for key in PLACE_TAGS),  # of frames: one each
        identifying_tags(tags),
    )


def _check_size(reader: Any, path: Path) -> None:
    """Compare what a header promises with the size of its file, before anything is allocated.

    Raises:
        ValueError: it cannot hold so much, even compressed.
    """
    bits = int(reader.GetMetaData(BITS)) if reader.HasMetaDataKey(BITS) else 8
    promised, size = math.prod(reader.GetSize()) * bits // 8, path.stat().st_size
    if promised > (size if _syntax(path) in PLAIN else MAX_RATIO * size):
        raise ValueError(f"its header promises {promised} bytes, the file has {size}")


def _syntax(path: Path) -> str:
    """The transfer syntax in the first bytes of a file, which GDCM does not tell; empty where there is none."""
    with path.open("rb") as file:
        head = file.read(4096)
    place = head.find(SYNTAX) + len(SYNTAX)
    length = int.from_bytes(head[place : place + 2], "little")
    return head[place + 2 : place + 2 + length].decode("ascii", "replace").strip("\0 ") if SYNTAX in head else ""


def series_affine(slices: list[Slice]) -> Floats:
    """From voxels to mm, RAS+; the step between slices is the mean one, so a tilted gantry shears."""
    first, last = slices[0], slices[-1]
    affine = np.eye(4)
    affine[:3, :2] = (first.orientation * first.spacing[:, None]).T
    affine[:3, 2] = (last.position - first.position) / (len(slices) - 1)
    affine[:3, 3] = first.position
    affine[:3] = LPS_TO_RAS @ affine[:3]
    return affine


def _read_frames(sitk: Any, only: Slice) -> tuple[NDArray[np.float32], Floats]:
    """A volume in one file."""
    image = sitk.ReadImage(str(only.path), sitk.sitkFloat32, imageIO="GDCMImageIO")
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    affine[:3] = LPS_TO_RAS @ affine[:3]
    return sitk.GetArrayFromImage(image).T, affine


def _is_dicom(path: Path) -> bool:
    suffix = path.suffix.lower()
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR" or suffix in OTHERS or not path.is_file():
        return False
    if suffix in SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            file.seek(MAGIC_AT)
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return True  # it may be a slice, so whoever reads the series shall say that it cannot


def load_sitk(place: Path, what: str = "DICOM files") -> Any:
    """SimpleITK.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import SimpleITK
    except ImportError:
        raise ConfigError(
            f"{place}: {what} found, their reader is not installed; pip install 'hpc_ddpm[dicom]'"
        ) from None
    SimpleITK.ProcessObject.GlobalWarningDisplayOff()  # what it warns of is checked here
    return SimpleITK


def _last(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()
