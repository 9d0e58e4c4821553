"""What a generated set of someone else cannot make happen: no file outside of it, no code from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from hpc_ddpm.config import load_config
from hpc_ddpm.errors import ConfigError, DataFormatError
from hpc_ddpm.files import write_json
from hpc_ddpm.sampling.folder import Failure, SampleFolder
from hpc_ddpm.sampling.gallery import write_gallery
from hpc_ddpm.sampling.masks import MaskSource
from hpc_ddpm.sampling.plan import MANIFEST, build_plan, extend_manifest, read_manifest
from hpc_ddpm.sealed import seal
from hpc_ddpm.workers.claims import Writer
from launch.stages import training_settings
from tests.conftest import TINY
from tests.sampling.conftest import Generate, Run, save_random_weights

OUTSIDE = ["../../OUTSIDE/vol", "/tmp/vol", "..", ".hidden", "a\\b", "a\nb", "", "x" * 300]
SEGMENTER = "sampling.fidelity.segmenter"


def everything(folder: Path) -> list[str]:
    """Leases of workers aside."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if ".sample" not in path.parts)


@pytest.fixture
def one(generate_set: Generate, heads: Path, tmp_path: Path) -> Path:
    """A set of one volume, three folders below `tmp_path`."""
    generate_set(tmp_path / "a" / "b" / "set", masks=heads / "head_0000.nii.gz")
    return tmp_path / "a" / "b" / "set"


@pytest.mark.parametrize("name", ["id", "mask_id"])
@pytest.mark.parametrize("bad", [*OUTSIDE, 5, None])
def test_an_id_of_the_manifest_is_the_name_of_a_file(tmp_path: Path, name: str, bad: object) -> None:
    line = {"id": "a_r000", "mask_id": "a", "mask": "a.nii.gz", "layout": "tree", "replica": 0, "seed": 1}
    (tmp_path / MANIFEST).write_text(f"{seal(json.dumps(line))}\n{seal(json.dumps(line | {name: bad}))}\n")
    with pytest.raises(DataFormatError, match=r"manifest\.jsonl:2: .*restore the file") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_volume_is_written_outside_of_the_set(run: Run, weights: Path, one: Path, tmp_path: Path) -> None:
    line = json.loads((one / MANIFEST).read_text())
    del line["checksum"]
    (one / MANIFEST).write_text(seal(json.dumps(line | {"id": "../../OUTSIDE/vol"})) + "\n")
    before = everything(tmp_path)
    for words in (("run", weights, "--out", one), ("status", one), ("verify", one), ("retry", one)):
        with pytest.raises(DataFormatError, match="a name without slashes or leading dot expected"):
            run(*words)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "lie", [{"id": "../../../OUTSIDE"}, {"id": None}, {"voxels_sha256": "x/../../../../OUT"}, {"voxels_sha256": 1}]
)
def test_no_picture_is_written_outside_of_the_set(one: Path, tmp_path: Path, lie: dict[str, object]) -> None:
    path = one / "sidecar" / "head_0000_r000.json"
    write_json(path, json.loads(path.read_text()) | lie)
    before = everything(tmp_path)
    with pytest.raises(DataFormatError, match=r"head_0000_r000\.json: .*delete it to make it again"):
        write_gallery(one)
    assert everything(tmp_path) == before


def test_a_failure_is_that_of_its_file(tmp_path: Path) -> None:
    folder = SampleFolder(tmp_path)
    for name in ("a", "b"):
        folder.write_failure(Failure(name, "nan", "why", "run"), tmp_path)
    write_json(folder.failure("a"), json.loads(folder.failure("b").read_text()) | {"id": "../b"})
    assert [(failure.id, failure.kind) for failure in folder.failures()] == [("a", "unreadable"), ("b", "nan")]
    write_json(folder.failure("a"), json.loads(folder.failure("b").read_text()))
    assert [failure.id for failure in folder.failures()] == ["b"]


@pytest.mark.parametrize("modality", ["../../OUTSIDE", "/tmp/x", "mask", "sidecar", "a\nb"])
def test_a_modality_is_the_name_of_a_folder(
    generate_set: Generate, weights: Path, tmp_path: Path, modality: str
) -> None:
    """Imported weights say what their modalities are called."""
    source, out = tmp_path / "weights", tmp_path / "a" / "b" / "set"
    shutil.copytree(weights, source)
    config = json.loads((source / "config.json").read_text())
    config["data"]["modalities"] = [modality]
    write_json(source / "config.json", config)
    with pytest.raises(ConfigError, match=r"data\.modalities: no folder of a set can be called"):
        generate_set(out, source=source)
    assert not (out / MANIFEST).exists()


def test_a_mask_whose_name_is_no_id(generate_set: Generate, heads: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "a\nb.nii.gz").write_bytes((heads / "head_0000.nii.gz").read_bytes())
    with pytest.raises(DataFormatError, match="rename it"):
        generate_set(tmp_path / "set", masks=masks)
    with pytest.raises(ConfigError, match="rename the mask"):
        extend_manifest(tmp_path, build_plan([MaskSource("x" * 254, "a.nii.gz", "tree")], 1, 0), Writer(tmp_path, "x"))


def test_only_the_user_names_a_program(
    run: Run, weights: Path, one: Path, heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TorchScript runs code: the path in a set, or in the settings of weights, is not loaded."""
    loaded: list[str] = []
    monkeypatch.setattr(torch.jit, "load", lambda file, **_: loaded.append(file))
    made_with = json.loads((one / "sampling.json").read_text())
    made_with["config"]["sampling"]["fidelity"]["segmenter"] = made_with["identity"]["fidelity"]["segmenter"] = (
        "evil.ts"
    )
    write_json(one / "sampling.json", made_with)
    with pytest.raises(ConfigError, match=rf"names a segmenter, .*name it yourself: {SEGMENTER}=evil\.ts"):
        run("retry", one, "--weights", weights)
    source = save_random_weights(tmp_path / "mine", load_config(None, [*TINY, f"{SEGMENTER}=evil.ts"]).config)
    with pytest.raises(ConfigError, match="names a segmenter"):
        run(source, "--out", tmp_path / "out", "--masks", heads)
    assert loaded == []
    assert f"{SEGMENTER}=" in training_settings(None, [], None, source)[1]
    with pytest.raises(AttributeError):  # as far as to call what was loaded
        run(source, "--out", tmp_path / "out", "--masks", heads, f"{SEGMENTER}=mine.ts")
    assert loaded == ["mine.ts"]
