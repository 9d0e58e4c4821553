"""imagesTr/ and labelsTr/ beside dataset.json: the Medical Segmentation Decathlon, and nnU-Net's raw data.

nnU-Net keeps each channel in a file of its own, CASE_0000.nii.gz; the Decathlon keeps them in one 4-D file, and each
volume of it is named as FILE#NUMBER.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hpc_ddpm.data.formats import stem
from hpc_ddpm.data.layouts.base import MASK, Files, Layout, Roles, volumes
from hpc_ddpm.data.series import volume_of_series
from hpc_ddpm.errors import DataFormatError

DESCRIPTION, IMAGES, LABELS = "dataset.json", "imagesTr", "labelsTr"
CHANNEL = re.compile(r"(.+)_(\d{4})")
NAMES = {
    "t1": "t1", "t1w": "t1", "t1-weighted": "t1", "t1n": "t1",
    "t1gd": "t1ce", "t1ce": "t1ce", "t1c": "t1ce", "t1wce": "t1ce",
    "t2": "t2", "t2w": "t2", "flair": "flair", "t2f": "flair",
}  # fmt: skip
"""How datasets call the modalities that have a name here."""


def read_description(source: Path) -> dict[str, Any]:
    """The content of dataset.json.

    Raises:
        DataFormatError: missing, or not JSON with an object.
    """
    file = source / DESCRIPTION
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataFormatError(f"{file}: cannot be read ({str(error).splitlines()[0]}); copy it again") from None
    if not isinstance(content, dict):
        raise DataFormatError(f"{file}: a JSON object expected, with channel_names or modality; copy it again")
    return content


def channel_names(source: Path) -> list[str]:
    """The channels of the images, in their order, as dataset.json calls them.

    Raises:
        DataFormatError: it names none.
    """
    content = read_description(source)
    named = content.get("channel_names") or content.get("modality")
    if not isinstance(named, dict) or not all(str(key).isdecimal() for key in named):
        raise DataFormatError(f'{source / DESCRIPTION}: no channel_names or modality like {{"0": "T1"}} found; add it')
    return [str(named[key]) for key in sorted(named, key=int)]


def _has_parts(source: Path) -> bool:
    return (source / DESCRIPTION).is_file() and (source / IMAGES).is_dir() and (source / LABELS).is_dir()


def _is_nnunet(source: Path) -> bool:
    return _has_parts(source) and any(CHANNEL.fullmatch(stem(path)) for path in (source / IMAGES).iterdir())


def _channels(source: Path, roles: Roles) -> dict[int, str]:
    """Number of a channel -> modality, of those that are looked for."""
    names = channel_names(source)
    known = [NAMES.get(name.lower(), name) for name in names]
    numbers = {}
    for modality in roles.modalities:
        number = roles.channel(modality, names)
        number = roles.channel(modality, known) if number is None else number
        if number is None:
            raise DataFormatError(
                f"{source / DESCRIPTION}: channels {', '.join(names)} found, data.modalities asks for {modality}; "
                f"take those, or say data.names={{{modality}: NAME}}"
            )
        numbers[number] = modality
    return numbers


def _read_nnunet(source: Path, roles: Roles) -> Files:
    files, channels = Files(), _channels(source, roles)
    for path in volumes(source / LABELS):
        files.add(stem(path), MASK, path)
    for path in volumes(source / IMAGES) if channels else ():
        match = CHANNEL.fullmatch(stem(path))
        if match is None:
            files.leave_out(path, "its name does not end in _0000, _0001, ...")
        elif int(match.group(2)) in channels:
            files.add(match.group(1), channels[int(match.group(2))], path)
    return files


def _read_decathlon(source: Path, roles: Roles) -> Files:
    files, channels = Files(), _channels(source, roles)
    is_series = len(channel_names(source)) > 1
    for path in volumes(source / LABELS):
        files.add(stem(path), MASK, path)
    for path in volumes(source / IMAGES):
        for number, modality in channels.items():
            files.add(stem(path), modality, volume_of_series(path, number) if is_series else path)
    return files


def _modalities(source: Path) -> tuple[str, ...]:
    return tuple(NAMES.get(name.lower(), name.lower()) for name in channel_names(source))


NNUNET = Layout(
    "nnunet", "dataset.json, labelsTr/ and imagesTr/*_0000 (nnU-Net)", _is_nnunet, _read_nnunet, _modalities
)
DECATHLON = Layout(
    "decathlon", "dataset.json, labelsTr/ and imagesTr/ (Decathlon)", _has_parts, _read_decathlon, _modalities
)
