"""Text in headers that may identify a person: which fields hold any, never what they hold."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hpc_ddpm.data.bounded import read_head

NIFTI_FIELDS = ("descrip", "aux_file", "intent_name", "db_name")
HARMLESS = re.compile(
    r"(FSL|SPM|AFNI|ANTs?|ITK|FreeSurfer|mrtrix|NiftyReg|nilearn|nibabel|c3d|TORTOISE|dcm2niix?|Philips Healthcare|"
    r"NIfTI|Warped|spm_|TE=|TR=|Time=|phase=|mb=|\d+(\.\d+)*([:;]\w+)?$|none$|null$|estimate|label|mask$|seg$)",
    re.IGNORECASE,
)
"""How the texts of well-known programs begin: versions, echo times."""
TELLING = re.compile(
    r"\d{6}|\d{1,4}[-/.]\d{1,2}[-/.]\d{2,4}|\^|name|birth|patient|\bDOB\b|\bMRN\b|\bID\b", re.IGNORECASE
)
"""Dates, record numbers, names as DICOM writes them: whoever wrote it."""
ROUTINE = re.compile(r"Time=[\d.]+|^\d+\.\d+\.\d+:\w*")
"""Times of day, as dcm2niix writes them, and FSL's versions: they look like dates and numbers."""
DICOM_FIELDS = {
    "0010|0010": "PatientName",
    "0010|0020": "PatientID",
    "0010|0030": "PatientBirthDate",
    "0010|1000": "OtherPatientIDs",
    "0010|1001": "OtherPatientNames",
    "0010|1040": "PatientAddress",
    "0010|2154": "PatientTelephoneNumbers",
    "0010|4000": "PatientComments",
    "0008|0090": "ReferringPhysicianName",
    "0008|0050": "AccessionNumber",
}
PERSONAL_KEY = re.compile(r"patient|birth|physician|operator|accession", re.IGNORECASE)
IDENTITY_REMOVED = "0012|0062"
MAX_EXTENSION_BYTES = 2**20
"""Most bytes of a file, from its start, in which extensions are looked for."""


def may_identify(text: str) -> bool:
    """Whether a text says more than what a well-known program writes there."""
    text = ROUTINE.sub("", text).strip("\0 ;\t\r\n")
    return bool(text) and (HARMLESS.match(text) is None or TELLING.search(text) is not None)


def identifying_fields(header: Any, path: Path) -> tuple[str, ...]:
    """Names of text fields in a header of nibabel, and of extensions in its file, that may identify a person."""
    found = [name for name in NIFTI_FIELDS if name in header and may_identify(_text(header[name]))]
    return (*found, *_extensions(header, path))


def identifying_tags(tags: Mapping[str, str]) -> tuple[str, ...]:
    """Names of DICOM tags that may identify a person; none where a tag says that the identity was removed."""
    if tags.get(IDENTITY_REMOVED, "").strip("\0 ").upper() == "YES":
        return ()
    return tuple(name for tag, name in DICOM_FIELDS.items() if _is_filled(tags.get(tag, "")))


def identifying_keys(pairs: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Further keys of a NRRD or MetaImage file that may identify a person."""
    return tuple(key for key, value in pairs if (PERSONAL_KEY.search(key) and value.strip()) or "^" in value)


def _is_filled(text: str) -> bool:
    return re.sub(r"anon\w*|unknown|none|removed|[\0\s^0-]", "", text, flags=re.IGNORECASE) != ""


def _text(value: Any) -> str:
    return bytes(value.item()).decode(errors="replace") if hasattr(value, "item") else str(value)


def _extensions(header: Any, path: Path) -> tuple[str, ...]:
    """The kinds of extensions between header and voxels (NIfTI: size and code, then the content)."""
    if "magic" not in header:
        return ()
    begin, end = int(header["sizeof_hdr"]), min(int(header.get_data_offset()), MAX_EXTENSION_BYTES)
    content = read_head(path, end)[begin:] if end > begin + 4 else b""
    if not content or not content[0]:
        return ()
    codes, place = [], 4
    while place + 8 <= len(content):
        size, code = struct.unpack_from(f"{header.endianness}ii", content, place)
        if size < 8:
            break
        if content[place + 8 : place + size].strip(b"\0 "):
            codes.append({2: "extension (DICOM)", 6: "extension (comment)"}.get(code, f"extension ({code})"))
        place += size
    return tuple(dict.fromkeys(codes))
