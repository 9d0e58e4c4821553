"""NIfTI to and from arrays (.mgz, .mgh, DICOM too): the only user of nibabel, the only place where axes are swapped.

On disk X Y Z [C]; in memory [C] D H W with D, H, W = Z, Y, X. Affines are 4x4, X, Y, Z voxels to mm (RAS+).
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from numpy.typing import DTypeLike, NDArray

from hpc_ddpm.data.dicom import is_series, read_series, read_slices, series_files
from hpc_ddpm.errors import ConfigError, DataFormatError
from hpc_ddpm.files import atomic_path

SUFFIXES = (".nii.gz", ".nii", ".mgz", ".mgh", ".NII.GZ", ".NII", ".MGZ", ".MGH")
_UNREADABLE = (
    *(ImageFileError, HeaderDataError, EOFError, OSError, ValueError, zlib.error),
    *(MemoryError, OverflowError),  # a header that promises too much
)

Affine = NDArray[np.float64]
Shape3 = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Volume:
    """A volume as it was asked for, and the grid of the file it came from."""

    data: NDArray[Any]
    """(D, H, W) or (C, D, H, W), after orientation."""
    affine: Affine
    """Of `data`, in X, Y, Z voxel order."""
    file_shape: Shape3
    """(X, Y, Z) in the file."""
    file_affine: Affine


@dataclass(frozen=True)
class Header:
    """What a file says besides its voxels."""

    shape: tuple[int, ...]
    """As stored, X Y Z first."""
    is_scaled: bool
    """Whether its numbers are to be multiplied by a slope or added to."""
    has_affine: bool
    """Whether it says where its voxels lie; else its orientation is a guess."""


def is_nifti(path: Path) -> bool:
    """Whether the name ends in .nii, .nii.gz, .mgz or .mgh, in lower or upper case."""
    return path.name.endswith(SUFFIXES)


def is_volume(path: Path) -> bool:
    """Whether `read_nifti` takes it: by its name, or as a folder of DICOM files."""
    return is_nifti(path) or is_series(path)


def volume_files(path: Path) -> list[Path]:
    """The files that a volume consists of."""
    return series_files(path) if path.is_dir() else [path]


def stem(path: Path) -> str:
    """The name without its NIfTI suffix."""
    suffix = next((s for s in SUFFIXES if path.name.endswith(s)), "")
    return path.name[: len(path.name) - len(suffix)]


def read_nifti(
    path: str | Path,
    orientation: str = "native",
    dtype: DTypeLike | None = np.float32,
    *,
    channels: bool = False,
) -> Volume:
    """Read a volume with its scale factors applied and its axes brought to `orientation`.

    Args:
        path: a .nii, .nii.gz, .mgz or .mgh file, or a folder with one DICOM series.
        orientation: axis codes such as RAS or LPS, or `native`.
        dtype: of the result; None keeps the file's own (float64 where the file has scale factors).
        channels: accept 4-D files, as (C, D, H, W); else a 4-D file must hold a single volume.

    Raises:
        DataFormatError: missing, damaged or not a volume; names the file.
        ConfigError: a DICOM series, and its reader is not installed.
    """
    path = Path(path)
    data, affine = _load(path, dtype)
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


def read_header(path: str | Path) -> Header:
    """Read what `Header` holds; the voxels are not looked at.

    Raises:
        DataFormatError: missing or damaged; names the file.
    """
    path = Path(path)
    if path.is_dir():
        slices = read_slices(path)
        columns, rows, frames = slices[0].shape
        return Header(
            (columns, rows, frames * len(slices)),
            any(one.is_scaled for one in slices),
            all(one.is_placed for one in slices),
        )
    image = _open(path)
    slope, offset = getattr(image.dataobj, "slope", 1.0), getattr(image.dataobj, "inter", 0.0)
    codes = [int(image.header.get(name, 1)) for name in ("sform_code", "qform_code")]
    return Header(tuple(image.shape), (float(slope), float(offset)) != (1.0, 0.0), any(codes))


def axis_codes(affine: Affine) -> str:
    """Where the X, Y and Z voxel axes point, such as RAS or LPS."""
    return "".join(nib.aff2axcodes(affine))


def voxel_size_mm(affine: Affine) -> tuple[float, float, float]:
    """(x, y, z), rounded to 1e-4 mm: what headers hold is not exact."""
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

    Args:
        path: ends in .nii or .nii.gz.
        volume: (D, H, W); cast to `dtype`.
        affine: (4, 4), X, Y, Z voxels to mm.
        dtype: on disk; None is uint8 for uint8 and bool, float32 for floats, else the array's own.
        compression_level: 0..9, of gzip.
        scale: (slope, offset) that readers apply to integers; None is none.
        like: NIfTI file whose header's codes and texts are taken over.
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
    sform, qform = _take_over(image, like) if like is not None else ("scanner", "scanner")
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


def _take_over(image: nib.Nifti1Image, like: Path) -> tuple[int, int]:
    """Give `image` the texts of a NIfTI file; returns the codes of its sform and qform, one of them at least set."""
    header = _open(like).header
    if not isinstance(header, nib.Nifti1Header):
        return 1, 1
    for name in ("descrip", "aux_file", "intent_name"):
        image.header[name] = header[name]
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    return (sform, qform) if sform or qform else (1, 1)


def _disk_dtype(volume: NDArray[Any], dtype: DTypeLike | None) -> np.dtype[Any]:
    if dtype is not None:
        return np.dtype(dtype)
    if volume.dtype == bool:
        return np.dtype(np.uint8)
    return np.dtype(np.float32) if volume.dtype.kind == "f" else volume.dtype


def _load(path: Path, dtype: DTypeLike | None) -> tuple[NDArray[Any], Affine]:
    """The array in the order of the file, and its affine."""
    if path.is_dir():
        series, placed = read_series(path)
        return series.astype(dtype or series.dtype, copy=False), placed
    image = _open(path)
    try:
        if path.name.lower().endswith((".gz", ".mgz")):  # at once: a lazy reader never gets to the checksum
            image = type(image).from_bytes(gzip.decompress(path.read_bytes()))
        data = np.asanyarray(image.dataobj)
    except _UNREADABLE as error:
        raise _damaged(path, error) from None
    if data.dtype.kind not in "biuf":
        raise DataFormatError(
            f"{path}: voxels of type {data.dtype} found, numbers expected; convert the file", "unreadable"
        )
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DataFormatError(f"{path}: its affine is singular {affine[:3].tolist()}; repair the header", "bad-affine")
    return data.astype(dtype, copy=False) if dtype is not None else data, affine


def _open(path: Path) -> Any:
    """Nibabel's image, its voxels not read."""
    if not path.is_file():
        raise DataFormatError(f"{path}: no such file; check the path", "missing-file")
    if not is_nifti(path):
        raise DataFormatError(
            f"{path}: not a NIfTI name; expected one ending in .nii, .nii.gz, .mgz or .mgh", "unreadable"
        )
    try:
        if path.name.lower().endswith(".mgh"):  # nibabel would leave it open
            return nib.MGHImage.from_bytes(path.read_bytes())
        return nib.load(path)
    except _UNREADABLE as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DataFormatError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    is_short = isinstance(error, EOFError) or reason.startswith("Expected ")  # as nibabel says it
    kind = "truncated" if is_short else "unreadable"
    return DataFormatError(f"{path}: damaged or not a NIfTI file ({reason}); copy it again", kind)


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
