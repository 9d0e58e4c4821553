"""Volumes to and from arrays, whatever their format; the only place where axes are swapped.

On disk X Y Z [C]; in memory [C] D H W with D, H, W = Z, Y, X. Affines are 4x4, X, Y, Z voxels to mm (RAS+).
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import DTypeLike, NDArray

from hpc_ddpm.data.dicom import is_series, read_series, read_slices
from hpc_ddpm.data.formats import EXPECTED, ITK, NIBABEL, SUFFIXES, Header, inner_file, is_png_stack, png_files
from hpc_ddpm.data.itk import read_image, read_image_facts, read_stack
from hpc_ddpm.data.nibabel_reader import open_header, read_array, read_facts
from hpc_ddpm.data.series import split_series
from hpc_ddpm.errors import ConfigError, DataFormatError, HpcDdpmError
from hpc_ddpm.files import atomic_path

Affine = NDArray[np.float64]
Shape3 = tuple[int, int, int]
SIDES_MM = (1e-4, 1e6)
"""Voxel sides that a header may give."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A volume as it was asked for, and the grid of the file it came from."""

    data: NDArray[Any]
    """(D, H, W) or (C, D, H, W), after orientation."""
    affine: Affine
    """Affine of `data`, from voxels in X, Y, Z order to mm."""
    file_shape: Shape3
    """(X, Y, Z) in the file."""
    file_affine: Affine


def read_nifti(
    path: str | Path,
    orientation: str = "native",
    dtype: DTypeLike | None = np.float32,
    *,
    channels: bool = False,
    beside: Path | None = None,
) -> Volume:
    """Read a volume with its scale factors applied and its axes brought to `orientation`.

    Args:
        path: a file, see `formats.SUFFIXES`, a folder with one DICOM series, or one volume of a 4-D file (FILE#NUMBER).
        orientation: axis codes such as RAS or LPS, or `native`.
        dtype: of the result; None keeps the file's own (float64 where the file has scale factors).
        channels: accept 4-D files, as (C, D, H, W); else a 4-D file must hold a single volume.
        beside: the image that a mask belongs to; a mask of PNG files takes its place from there.

    Raises:
        DataFormatError: missing, damaged or not a volume; names the file.
        ConfigError: a DICOM series, and its reader is not installed.
    """
    path = Path(path)
    file, number = split_series(path)
    data, affine = _load(file, dtype if number is None else None, beside)
    if number is not None:
        data = _one_of(data, number, path).astype(dtype or data.dtype, copy=False)
    while data.ndim > 4 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim == 4 and data.shape[3] == 1 and not channels:
        data = data[..., 0]
    if data.ndim != 3 and not (channels and data.ndim == 4):
        raise DataFormatError(
            f"{path}: shape {data.shape} found, one 3-D volume expected; split the series into one file each",
            "series",
        )
    file_shape = _shape3(data.shape)
    transform = _transform(affine, orientation, path)
    oriented = apply_orientation(data, transform)
    return Volume(np.ascontiguousarray(oriented.T), affine @ inv_ornt_aff(transform, file_shape), file_shape, affine)


def _one_of(data: NDArray[Any], number: int, path: Path) -> NDArray[Any]:
    """A volume of a 4-D array (X, Y, Z, N)."""
    count = data.shape[3] if data.ndim == 4 else 0
    if number >= count:
        raise DataFormatError(
            f"{path}: shape {data.shape} found, 4-D with more than {number} volumes expected; is it the right file?",
            "series",
        )
    return data[..., number]


def read_header(path: str | Path) -> Header:
    """Read what `Header` holds; the voxels are not looked at.

    Raises:
        DataFormatError: missing or damaged; names the file.
    """
    path, number = split_series(Path(path))
    with _reading(path):
        place = inner_file(path)
        if not place.is_dir():
            facts = (read_image_facts if _named(place).name.lower().endswith(ITK) else read_facts)(place)
            return facts if number is None else replace(facts, shape=facts.shape[:3])
        if is_png_stack(place) and not is_series(place):
            return Header((0, 0, len(png_files(place))), is_scaled=False, has_affine=True)
        slices = read_slices(place)
        columns, rows, frames = slices[0].shape
        return Header(
            (columns, rows, frames * len(slices)),
            any(one.is_scaled for one in slices),
            all(one.is_placed for one in slices),
            tuple(dict.fromkeys(name for one in slices for name in one.texts)),
        )


def axis_codes(affine: Affine) -> str:
    """Where the X, Y and Z voxel axes point, such as RAS or LPS."""
    return "".join(nib.aff2axcodes(affine))


def voxel_size_mm(affine: Affine) -> tuple[float, float, float]:
    """(x, y, z), rounded to 1e-4 mm: what headers hold is not exact."""
    with np.errstate(over="ignore", invalid="ignore"):  # of a damaged shard
        x, y, z = np.round(np.linalg.norm(affine[:3, :3], axis=0), 4).tolist()
    return x, y, z


def turn_to_ras(volume: NDArray[Any], affine: Affine) -> NDArray[Any]:
    """(D, H, W) of this affine with X, Y, Z pointing right, anterior, superior; a view, axes move and flip."""
    return apply_orientation(volume.T, io_orientation(affine)).T


def ras_voxel_size_mm(affine: Affine) -> tuple[float, float, float]:
    """`voxel_size_mm` after `turn_to_ras`."""
    x, y, z = np.array(voxel_size_mm(affine))[np.argsort(io_orientation(affine)[:, 0])].tolist()
    return x, y, z


def oriented_grid(shape: Shape3, affine: Affine, orientation: str) -> tuple[Shape3, Affine]:
    """Shape (X, Y, Z) and affine that `read_nifti` gives for a file of this shape and affine."""
    transform = _transform(affine, orientation)
    order = np.argsort(transform[:, 0])
    return _shape3([shape[axis] for axis in order]), affine @ inv_ornt_aff(transform, shape)


def to_file_order(volume: NDArray[Any], affine: Affine, orientation: str) -> NDArray[Any]:
    """Undo the orientation of `read_nifti`: (D, H, W) as oriented to (D, H, W) in the order of the file.

    Args:
        volume: (D, H, W), oriented to `orientation`.
        affine: of the file.
        orientation: as given to `read_nifti`.
    """
    target = io_orientation(affine)
    source = target if orientation == "native" else axcodes2ornt(orientation)
    return np.ascontiguousarray(apply_orientation(volume.T, ornt_transform(source, target)).T)


def write_nifti(
    path: str | Path,
    volume: NDArray[Any],
    affine: Affine,
    dtype: DTypeLike | None = None,
    *,
    compression_level: int = 6,
    scale: tuple[float, float] | None = None,
    like: Path | None = None,
    scratch: Path | None = None,
) -> None:
    """Write (D, H, W) as .nii or .nii.gz, atomically; sform and qform set, mm; equal input gives equal bytes.

    The header holds geometry, type and scale, and nothing else: no text of any source gets there.

    Args:
        path: ends in .nii or .nii.gz.
        volume: (D, H, W); cast to `dtype`.
        affine: (4, 4), X, Y, Z voxels to mm.
        dtype: on disk; None is uint8 for uint8 and bool, float32 for floats, else the array's own.
        compression_level: 0..9, of gzip.
        scale: (slope, offset) that readers apply to integers; None is none.
        like: file whose kind of space (sform and qform code) is named; nothing else of its header is taken over.
        scratch: as in `atomic_path`.

    Raises:
        DataFormatError: the name is not a NIfTI name, or the array is not 3-D.
    """
    path = Path(path)
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise DataFormatError(f"{path}: volumes are written as .nii or .nii.gz; give such a name")
    if volume.ndim != 3:
        raise DataFormatError(f"{path}: shape {volume.shape} found, (D, H, W) expected; write one file per channel")
    image = nib.Nifti1Image(volume.T.astype(_disk_dtype(volume, dtype), copy=False), affine)
    image.header.set_xyzt_units("mm")
    sform, qform = _codes(like) if like is not None else (1, 1)
    image.set_sform(affine, code=sform)
    image.set_qform(affine, code=qform)
    if scale is not None:
        image.header.set_slope_inter(*scale)
    with atomic_path(path, scratch=scratch) as temporary, temporary.open("wb") as raw:
        if not path.name.lower().endswith(".gz"):
            image.to_stream(raw)
            return
        with gzip.GzipFile("", "wb", compression_level, raw, mtime=0) as packed:
            image.to_stream(packed)


def _codes(like: Path) -> tuple[int, int]:
    """What kind of space the sform and the qform of a NIfTI file lead to; one of them at least is set."""
    header = open_header(inner_file(like)) if like.is_file() and like.name.lower().endswith(NIBABEL) else {}
    sform, qform = (int(header.get(name, 0)) for name in ("sform_code", "qform_code"))
    return (sform, qform) if sform or qform else (1, 1)


def _disk_dtype(volume: NDArray[Any], dtype: DTypeLike | None) -> np.dtype[Any]:
    if dtype is not None:
        return np.dtype(dtype)
    if volume.dtype == bool:
        return np.dtype(np.uint8)
    return np.dtype(np.float32) if volume.dtype.kind == "f" else volume.dtype


def _read(path: Path, beside: Path | None) -> tuple[NDArray[Any], Affine]:
    """The voxels as stored, and their affine."""
    if path.is_dir() and is_png_stack(path) and not is_series(path):
        if beside is None or not is_series(beside):
            raise DataFormatError(
                f"{path}: a folder of PNG files found, which does not say where its voxels lie; it can be the mask of "
                "a DICOM series, by a table or a tree; else convert it to NIfTI",
                "unreadable",
            )
        return read_stack(path, beside)
    if path.is_dir():
        return read_series(path)
    return read_image(path) if _named(path).name.lower().endswith(ITK) else read_array(path)


def _load(path: Path, dtype: DTypeLike | None, beside: Path | None) -> tuple[NDArray[Any], Affine]:
    """The array in the order of the file, and its affine."""
    with _reading(path):
        data, affine = _read(inner_file(path), beside)
        if data.dtype.kind not in "biuf":
            raise DataFormatError(
                f"{path}: voxels of type {data.dtype} found, numbers expected; convert the file", "unreadable"
            )
        if not data.size:
            raise DataFormatError(
                f"{path}: shape {data.shape} found, which holds no voxel; copy it again", "unreadable"
            )
        _check_affine(path, affine)
        return data.astype(dtype, copy=False) if dtype is not None else data, affine


def _named(path: Path) -> Path:
    """A file that is there, and has the name of a volume."""
    if not path.is_file():
        raise DataFormatError(f"{path}: no such file; check the path", "missing-file")
    if not path.name.lower().endswith(SUFFIXES):
        raise DataFormatError(f"{path}: not a NIfTI name; expected one ending in {EXPECTED}", "unreadable")
    return path


def _check_affine(path: Path, affine: Affine) -> None:
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = SIDES_MM
    is_sound = np.isfinite(affine).all() and low <= sides.min() and sides.max() <= high
    if not is_sound or abs(np.linalg.det(affine[:3, :3] / sides)) < 1e-6:
        raise DataFormatError(f"{path}: its affine is singular {affine[:3].tolist()}; repair the header", "bad-affine")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a decoder meets in a damaged file into one line.

    Raises:
        DataFormatError: names the file.
    """
    try:
        with np.errstate(all="ignore"):
            yield
    except HpcDdpmError:
        raise
    except Exception as error:  # decoders raise what they like
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, OSError) and error.errno:
            found, advice = f"cannot be read ({error.strerror})", "mend its name, its permissions or its storage"
        elif isinstance(error, MemoryError):
            found, advice = f"memory is too small for it ({reason})", "use fewer --workers, or a larger node"
        else:
            found, advice = f"damaged or not a NIfTI file ({reason})", "copy it again"
        kind = "truncated" if isinstance(error, EOFError) else "unreadable"
        raise DataFormatError(f"{path}: {found}; {advice}", kind) from None


def _transform(affine: Affine, orientation: str, path: Path | None = None) -> NDArray[Any]:
    """Nibabel's orientation transform (3, 2) from the axes of `affine` to `orientation`."""
    source = io_orientation(affine)
    if np.isnan(source).any():
        raise DataFormatError(f"{path}: its axes cannot be told from its affine; repair the header", "bad-affine")
    if orientation == "native":
        return ornt_transform(source, source)
    target = axcodes2ornt(orientation)
    if len(set(target[:, 0])) != 3:
        raise ConfigError(f"data.orientation={orientation} names an axis twice; example: data.orientation=RAS")
    return ornt_transform(source, target)


def _shape3(shape: Any) -> Shape3:
    x, y, z = (int(side) for side in shape[:3])
    return x, y, z
