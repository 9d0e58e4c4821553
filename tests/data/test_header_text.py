"""Text in headers that may identify a person is warned of by its place, never repeated, and packed nowhere."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_files import write_slice

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.check.run import check
from hpc_ddpm.data.export import export
from hpc_ddpm.data.header_text import identifying_tags, may_identify
from hpc_ddpm.data.hooks import hooked
from hpc_ddpm.data.nifti import read_header
from hpc_ddpm.data.pack import pack
from hpc_ddpm.errors import DataFormatError

PERSON = b"Doe^Jane 19500101"
FIELDS = ("descrip", "aux_file", "intent_name", "db_name")


def name_a_person(path: Path) -> None:
    image = nib.load(path)
    for field in FIELDS:
        image.header[field] = PERSON[:15]
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", PERSON))
    path.write_bytes(gzip.compress(image.to_bytes()))


def test_check_warns_and_nothing_packed_or_exported_repeats_it(
    heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]
) -> None:
    for file in heads.rglob("head_0001.nii.gz"):
        name_a_person(file)
    found = [finding for finding in check(heads, tiny()).findings if finding.kind == "identifying-text"]
    assert {Path(finding.file).parent.name for finding in found} == {"mask", "t1"}
    assert found[0].found == f"{', '.join(FIELDS)}, extension (comment) may identify a person"
    assert found[0].severity == "warning"
    pack(heads, tmp_path / "packed", tiny(compression="none"))
    export(tmp_path / "packed", tmp_path / "export")
    written = b"".join(path.read_bytes() for path in (tmp_path / "packed").rglob("*") if path.is_file())
    volumes = [nib.load(path) for path in (tmp_path / "export").rglob("*.nii.gz")]
    assert all(not volume.header.extensions for volume in volumes)
    assert b"Doe^" not in written + b"".join(volume.header.binaryblock for volume in volumes)


def test_a_hook_is_given_no_text_where_the_image_is_converted(tmp_path: Path, tiny: Callable[..., DataConfig]) -> None:
    for number in range(3):
        pixels = np.arange(80).reshape(10, 8) + number
        write_slice(tmp_path / "s" / f"{number}.dcm", pixels, 2.0 * number, "1.2.3", PatientName="Doe^Jane")
    assert read_header(tmp_path / "s").texts == ("PatientName",)
    config = tiny(hooks=[["cp", "{image}", "{output}"]])
    with hooked(tmp_path / "s", "a", "t1", config) as made:
        assert b"Doe" not in gzip.decompress(made.read_bytes())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("FSL5.0", False),
        ("5.0.10:1a2b", False),
        ("TE=4.4;Time=103045.120", False),
        ("TE=30;Time=0.000;phase=1", False),
        ("SPM12: spm_vol", False),
        ("Jane Doe", True),
        ("MRN 4711", True),
        ("FSL5.0 1950-01-01", True),
    ],
)
def test_what_may_identify(text: str, expected: bool) -> None:
    assert may_identify(text) == expected


def test_tags_of_a_file_whose_identity_was_removed() -> None:
    tags = {"0010|0010": "TCGA-01", "0010|0030": "19500101", "0010|0020": "ANONYMIZED ", "0008|0090": "^^"}
    assert identifying_tags(tags) == ("PatientName", "PatientBirthDate")
    assert identifying_tags(tags | {"0012|0062": "YES "}) == ()


def test_two_places_in_one_header(heads: Path, tiny: Callable[..., DataConfig]) -> None:
    file = sorted((heads / "t1").iterdir())[0]
    image = nib.load(file)
    moved = image.affine.copy()
    moved[0, 3] += 7
    image.set_qform(moved, code=1)
    nib.save(image, file)
    found = [finding for finding in check(heads, tiny()).findings if finding.kind == "sform-qform"]
    assert [finding.found for finding in found] == ["sform and qform are 7 mm apart at a corner; the sform is used"]
    file.write_bytes(gzip.decompress(file.read_bytes()))
    kinds = {finding.kind: finding.severity for finding in check(heads, tiny()).findings}
    assert kinds["misnamed"] == "note"


def test_a_mask_of_a_tool_that_drops_geometry(
    tmp_path: Path, tiny: Callable[..., DataConfig], write: Callable[..., Path], box_mask: np.ndarray
) -> None:
    write(tmp_path / "mask" / "a.nii.gz", box_mask)
    write(tmp_path / "t1" / "a.nii.gz", affine=np.diag([2.0, 2, 3, 1]))
    with pytest.raises(DataFormatError, match=r"its affine is the identity.*copy the affine of the image"):
        pack(tmp_path, tmp_path / "out", tiny())
