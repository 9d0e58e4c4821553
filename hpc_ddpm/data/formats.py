"""Which files and folders hold a volume, by their names, and what their headers say besides the voxels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hpc_ddpm.data.dicom import is_series, series_files
from hpc_ddpm.data.series import split_series
from hpc_ddpm.errors import DataFormatError

GZIPPED = (".nii.gz", ".mgz")
PAIR = (".hdr", ".img")
NIBABEL = (".nii.gz", ".nii", ".mgz", ".mgh", *PAIR)
ITK = (".seg.nrrd", ".nrrd", ".nhdr", ".mha", ".mhd")
DETACHED = re.compile(rb"^[ \t]*(?:ElementDataFile[ \t]*=|data ?file:)[ \t]*(.+?)[ \t]*$", re.MULTILINE | re.IGNORECASE)
"""Where NRRD and MetaImage name the file with the voxels."""
TEXT_HEAD_BYTES = 2**16
SUFFIXES = (*NIBABEL, *ITK)
EXPECTED = ".nii, .nii.gz, .hdr (with .img), .mgz, .mgh, .nrrd, .mha or .mhd"


@dataclass(frozen=True)
class Header:
    """What a file says besides its voxels."""

    shape: tuple[int, ...]
    """As stored, X Y Z first."""
    is_scaled: bool
    """Whether its numbers are to be multiplied by a slope or added to."""
    has_affine: bool
    """Whether it says where its voxels lie; else its orientation is a guess."""
    texts: tuple[str, ...] = ()
    """Names of fields whose text may identify a person; never the text."""
    two_places_mm: float = 0.0
    """How far apart sform and qform put a corner, where both are set."""
    is_misnamed: bool = False
    """Whether it is gzipped and its name does not say so, or the other way round."""


def is_volume_name(path: Path) -> bool:
    """Whether the name, in any case, is that of a volume; of a pair of files it is the `.hdr`."""
    name = path.name.lower()
    return name.endswith(SUFFIXES) and not name.endswith(".img")


def is_volume(path: Path) -> bool:
    """Whether `read_nifti` takes it: by its name, as a folder of DICOM files, or (for a mask) of PNG files."""
    return is_volume_name(path) or is_series(path) or is_png_stack(path)


def is_png_stack(folder: Path) -> bool:
    """Whether this is a folder of PNG files."""
    return folder.is_dir() and bool(png_files(folder))


def png_files(folder: Path) -> list[Path]:
    """The PNG files of a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".png" and not path.name.startswith("."))


def inner_file(path: Path) -> Path:
    """`path`, or the volume in a folder that is called like a file, as some downloads unpack (`X_flair.nii/x.nii`).

    Raises:
        DataFormatError: the folder holds none or several.
    """
    if not is_volume_name(path) or not path.is_dir() or is_series(path):
        return path
    inside = [file for file in sorted(path.iterdir()) if is_volume_name(file) and not file.name.startswith(".")]
    if len(inside) != 1 or inside[0].is_dir():
        raise DataFormatError(
            f"{path}: a folder with {len(inside)} volumes found, one file expected; give the file itself", "unreadable"
        )
    return inside[0]


def pair_of(path: Path) -> tuple[Path, Path]:
    """(file of the header, file of the voxels); the same one but for `.hdr` and `.img`."""
    if path.suffix.lower() not in PAIR:
        return path, path
    header, voxels = (suffix.upper() if path.suffix.isupper() else suffix for suffix in PAIR)
    return path.with_suffix(header), path.with_suffix(voxels)


def volume_files(path: Path) -> list[Path]:
    """The files that a volume consists of."""
    path = inner_file(split_series(path)[0])
    if path.is_dir():
        return series_files(path) or png_files(path)
    if path.name.lower().endswith(ITK):
        found = DETACHED.search(text_head(path))
        name = found[1].decode(errors="replace") if found else "local"
        return [path] if name.lower() in ("local", "list") else [path, path.parent / name]
    return list(dict.fromkeys(pair_of(path)))


def text_head(path: Path) -> bytes:
    """The header of a NRRD or MetaImage file, which is text, and may go on into the voxels."""
    with path.open("rb") as file:
        return file.read(TEXT_HEAD_BYTES).replace(b"\r\n", b"\n").partition(b"\n\n")[0]


def stem(path: Path) -> str:
    """The name without the suffix of a volume."""
    suffix = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")
    return path.name[: len(path.name) - len(suffix)]
