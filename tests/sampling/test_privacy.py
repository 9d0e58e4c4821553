"""What a generated set says of the people and machines behind it: nothing, unless asked."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import nibabel as nib
import pytest

from hpc_ddpm.errors import ConfigError
from hpc_ddpm.sampling.privacy import below_root, without_places
from hpc_ddpm.sampling.verify import verify_set
from tests.sampling.conftest import Generate, Run, sidecars

PERSON = b"Doe^Jane 19500101"


@pytest.fixture
def private_masks(heads: Path, tmp_path: Path) -> Path:
    """Two masks whose headers name a patient, in a folder that names one too."""
    folder = tmp_path / "Doe_Jane" / "masks"
    folder.mkdir(parents=True)
    for name in ("head_0000", "head_0001"):
        image = nib.load(heads / f"{name}.nii.gz")
        for field in ("descrip", "aux_file", "intent_name", "db_name"):
            image.header[field] = PERSON[:10] if field == "intent_name" else PERSON
        image.header["sform_code"] = 4
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", PERSON))
        nib.save(image, folder / f"{name}.nii.gz")
    return folder


def all_text(out: Path) -> bytes:
    """Every file, volumes unpacked."""
    files = [path for path in out.rglob("*") if path.is_file()]
    volumes = [nib.load(path) for path in files if path.name.endswith(".nii.gz")]
    assert all(not volume.header.extensions for volume in volumes)
    return b"".join(volume.header.binaryblock for volume in volumes) + b"".join(path.read_bytes() for path in files)


def test_nothing_of_a_header_but_geometry_gets_into_a_set(
    private_masks: Path, tmp_path: Path, generate_set: Generate
) -> None:
    out = tmp_path / "out"
    generate_set(out, "sampling.output.formats=[nifti,bids,packed]", masks=private_masks)
    found = all_text(out)
    assert b"Doe^" not in found
    assert b"19500101" not in found
    written = nib.load(out / "mask" / "head_0000_r000.nii.gz").header
    assert (int(written["sform_code"]), written.get_xyzt_units()[0]) == (4, "mm")


def test_sidecars_hold_paths_below_the_folder_that_was_given(
    private_masks: Path, tmp_path: Path, generate_set: Generate, weights: Path, run: Run
) -> None:
    out = tmp_path / "out"
    generate_set(out, masks=private_masks)
    for text in (path.read_text() for path in (out / "sidecar").iterdir()):
        assert str(tmp_path) not in text
        assert str(weights) not in text
        assert socket.gethostname() not in text
    assert sidecars(out)["head_0000_r000"]["mask"] == "head_0000.nii.gz"
    assert "the same bits" in run("reproduce", out / "sidecar" / "head_0000_r000.json", "--quiet")
    generate_set(tmp_path / "asked", "sampling.output.record_origin=true", masks=private_masks)
    record = sidecars(tmp_path / "asked")["head_0000_r000"]
    assert (record["mask"], record["host"]) == (str(private_masks / "head_0000.nii.gz"), socket.gethostname())


def test_a_shared_set_is_whole_and_says_nothing_of_its_origin(
    private_masks: Path, tmp_path: Path, generate_set: Generate, run: Run
) -> None:
    out, shared = tmp_path / "out", tmp_path / "shared"
    settings = ("sampling.output.formats=[nifti,bids,packed]", f"data.path={tmp_path}/Doe_Jane/packed")
    generate_set(out, *settings, "sampling.output.record_origin=true", masks=private_masks)
    assert "2 volumes to share" in run("verify", out, "--quiet", "--share", shared)
    assert not verify_set(shared)
    found = all_text(shared)
    for private in (b"Doe", str(tmp_path).encode(), f'"{socket.gethostname()}"'.encode(), b'"command"'):
        assert private not in found
    assert (shared / "t1" / "head_0000_r000.nii.gz").read_bytes() == (out / "t1" / "head_0000_r000.nii.gz").read_bytes()
    assert json.loads((shared / "manifest.jsonl").read_text().splitlines()[0])["mask"] == "head_0000.nii.gz"
    with pytest.raises(ConfigError, match="not an empty folder"):
        run("verify", out, "--quiet", "--share", shared)
    (out / "t1" / "head_0000_r000.nii.gz").write_bytes(b"changed")
    run("verify", out, "--quiet", "--share", tmp_path / "more", code=2)
    assert not (tmp_path / "more").exists()


def test_paths_below_a_root() -> None:
    assert below_root("/data/brats/mask/a.nii", "/data/brats") == "mask/a.nii"
    assert below_root("/elsewhere/a.nii", "/data/brats") == "a.nii"
    assert below_root("mask/a.nii", "") == "mask/a.nii"
    settings = {"hooks": [{"command": ["/home/jane/strip"]}], "path": "/home/jane/packed", "size": [1, 2], "host": "x"}
    assert without_places(settings) == {"path": "packed", "size": [1, 2]}
