"""Looking at a generated set: verify, reproduce, gallery, anonymise, and the command line around them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from hpc_ddpm.checkpoint import Piece, publish, unfinished_dir, write_pieces
from hpc_ddpm.config import load_config
from hpc_ddpm.data.shards import open_packed
from hpc_ddpm.errors import CheckpointError, ClusterError, DataFormatError
from hpc_ddpm.files import write_json
from hpc_ddpm.sampling import anonymize
from hpc_ddpm.sampling.anonymize import find_neighbours
from hpc_ddpm.sampling.folder import Failure, SampleFolder
from hpc_ddpm.sampling.gallery import write_gallery
from hpc_ddpm.sampling.read import Generated
from hpc_ddpm.sampling.verify import verify_set
from hpc_ddpm.weights import load_weights
from tests.conftest import TINY, torchrun_variables
from tests.sampling.conftest import Generate, Run, sidecars

ALL = "sampling.output.formats=[nifti,bids,packed]"


def found(out: Path) -> list[tuple[str, str]]:
    return [(problem.kind, problem.id) for problem in verify_set(out, num_workers=2)]


def test_verify_finds_whatever_was_done_to_a_set(generate_set: Generate, tmp_path: Path) -> None:
    generate_set(tmp_path, ALL)
    assert found(tmp_path) == []
    (tmp_path / "t1" / "head_0000_r000.nii.gz").unlink()
    damaged = tmp_path / "bids" / "sub-head0001r000" / "anat" / "sub-head0001r000_T1w.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (tmp_path / "sidecar" / "head_0002_r000.json").write_text("{")
    record = json.loads((tmp_path / "sidecar" / "head_0003_r000.json").read_text())
    write_json(tmp_path / "sidecar" / "head_0003_r000.json", record | {"seed": 1})
    (tmp_path / "sidecar" / "head_0004_r000.json").unlink()
    (tmp_path / "sidecar" / "stranger_r000.json").write_text("{}")
    (tmp_path / "t1" / "stranger.nii.gz").write_text("")
    assert found(tmp_path) == [
        ("missing", "head_0000_r000"),
        ("checksum", "head_0001_r000"),
        ("unreadable", "head_0002_r000"),
        ("mismatch", "head_0003_r000"),
        ("missing", "head_0004_r000"),
        ("extra", "sidecar/stranger_r000.json"),
        ("extra", "t1/stranger.nii.gz"),
    ]


def test_verify_decodes_packed_rows(generate_set: Generate, tmp_path: Path) -> None:
    generate_set(tmp_path, "sampling.output.formats=packed")
    record = sidecars(tmp_path)["head_0003_r000"]
    assert "files" not in record
    record["packed"]["crc32_mask"] = "00000000"
    write_json(tmp_path / "sidecar" / "head_0003_r000.json", record)
    assert found(tmp_path) == [("checksum", "head_0003_r000")]


def test_the_command_line(run: Run, weights: Path, heads: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "out", ("sampling.output.dtype=int16", ALL)
    planned = run("plan", weights, "--out", out, "--masks", heads, "--replicas", 2, *settings)
    assert planned == f"10 volumes planned, 10 of them asked for now: {out}\n"
    assert json.loads(run("status", out, "--json"))["left"] == 10
    assert "10 of 10 volumes done" in run("--out", out, weights, "-q", *settings)
    assert "every planned volume" in run("verify", out, "-q")
    bids = "bids/sub-head0003r001/anat/sub-head0003r001_T1w.nii.gz"
    for name in ("t1/head_0003_r001.nii.gz", "sidecar/head_0003_r001.json", bids):
        assert json.loads(run("reproduce", out / name, "--json", "-q"))["max_difference"] == 0
    path = out / "sidecar" / "head_0003_r001.json"
    record = json.loads(path.read_text())
    write_json(path, record | {"seed": record["seed"] + 1})
    assert "other bits" in run("reproduce", path, "-q", code=2)
    write_json(path, record | {"mask_sha256": "0"})
    with pytest.raises(DataFormatError, match="has changed since"):
        run("reproduce", path, "-q")


def test_a_set_of_another_average_is_retried_and_reproduced(
    run: Run, weights: Path, heads: Path, tmp_path: Path
) -> None:
    """The run's default is `ema`; a set knows which average it was made with."""
    found, source, out = load_weights(weights), tmp_path / "run", tmp_path / "out"
    step = source / "checkpoints" / "step_00000010"
    pieces = unfinished_dir(step) / "pieces-00000-of-00001.safetensors"
    pieces.parent.mkdir(parents=True)
    facts = write_pieces(
        pieces,
        [
            Piece(kind, key, tuple(value.shape), 0, factor * value.flatten())
            for kind, factor in (("ema", 0.5), ("master", 1.0))
            for key, value in found.state_dict.items()
        ],
    )
    publish(step, {}, {pieces.name: facts})
    write_json(source / "config.json", found.config.dump())
    run(source, "--out", out, "--masks", heads / "head_0000.nii.gz", "-q", "sampling.weights=master")
    file = out / "t1" / "head_0000_r000.nii.gz"
    assert "the same bits" in run("reproduce", file, "-q")
    (out / "sidecar" / "head_0000_r000.json").unlink()
    SampleFolder(out).write_failure(Failure("head_0000_r000", "write", "a full disk", "before"), tmp_path)
    assert "1 volumes generated" in run("retry", out, "-q")
    source.rename(tmp_path / "moved")
    for command in (("retry", out), ("reproduce", file)):
        with pytest.raises(CheckpointError, match="not there any more; give their place by --weights"):
            run(*command, "-q")
    assert "the same bits" in run("reproduce", file, "-q", "--weights", tmp_path / "moved")


def test_a_gallery_that_cannot_be_written(
    generate_set: Generate, heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_set(tmp_path, masks=heads / "head_0000.nii.gz")

    def refuse(path: Path, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("hpc_ddpm.sampling.gallery.atomic_path", refuse)
    with pytest.raises(ClusterError, match=r"cannot write here \(Read-only file system\)"):
        write_gallery(tmp_path)


def test_gallery_escapes_and_pages(generate_set: Generate, heads: Path, tmp_path: Path) -> None:
    name = "<script>alert('x')&"
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / f"{name}.nii.gz").write_bytes((heads / "head_0000.nii.gz").read_bytes())
    (tmp_path / "masks" / "<b>bad.nii.gz").write_text("")
    generate_set(tmp_path / "out", masks=tmp_path / "masks")
    page = write_gallery(tmp_path / "out").read_text()
    assert page.count("<script") == 2
    assert "<b>bad" not in page
    content = page.split('id="volumes">')[1].split("</script>")[0]
    cards = json.loads(content)
    assert [card["id"] for card in cards] == [f"{name}_r000"]
    pictures = list((tmp_path / "out" / "gallery").iterdir())
    assert len(pictures) == 1
    before = pictures[0].stat().st_mtime_ns
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    write_gallery(tmp_path / "out")
    assert pictures[0].stat().st_mtime_ns == before


def test_anonymize_reports_neighbours(run: Run, weights: Path, tiny_packed: Path, tmp_path: Path) -> None:
    subjects = [subject.id for subject in open_packed(tiny_packed).subjects()][:2]
    options = ("--out", tmp_path, "--data", tiny_packed, "--replicas", 2, "-q")
    assert "of 4 volumes are closer" in run("anonymize", weights, *subjects, *options)
    report = json.loads((tmp_path / "anonymize.json").read_text())
    assert len(report["neighbours"]) == 4
    assert {one["subject"] for one in report["neighbours"]} == set(subjects)
    with pytest.raises(DataFormatError, match="no subject nobody"):
        run("anonymize", weights, "nobody", *options)


def test_other_ranks_leave_failures_to_the_one_that_compares(
    run: Run, weights: Path, tiny_packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise DataFormatError("damaged")

    monkeypatch.setattr("hpc_ddpm.sampling.pipeline.load_mask", refuse)
    command = ("anonymize", weights, "head_0000", "--data", tiny_packed, "--out", tmp_path, "-q")
    for rank, code in ((1, 0), (0, 2)):
        for name, value in torchrun_variables(2)[rank].items():
            monkeypatch.setenv(name, value)
        run(*command, code=code)
    assert (tmp_path / "anonymize.json").exists()


def test_a_copy_of_a_training_volume_is_seen(
    generate_set: Generate, tiny_packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it is mirrored; noise is no copy of anything."""
    generate_set(tmp_path)
    packed = open_packed(tiny_packed)
    victim = packed.subjects("train")[2]
    image = packed.read(victim.index)[0] / np.float32(32767)
    noise = np.random.default_rng(0).uniform(-1, 1, image.shape).astype(np.float32)
    volumes = {
        "head_0000_r000": image + 0.05 * noise,
        "head_0001_r000": image[..., ::-1],
        "head_0002_r000": noise,
    }
    monkeypatch.setattr(
        anonymize,
        "read_generated",
        lambda out, record, data: Generated(volumes[record["id"]], np.zeros(1), packed.affine(0)),
    )
    config = load_config(None, TINY).config
    closeness = find_neighbours(SampleFolder(tmp_path), list(volumes), str(tiny_packed), config)
    copied, mirrored, unlike = closeness.neighbours
    assert (copied.nearest, mirrored.nearest) == (victim.id, victim.id)
    assert copied.is_close
    assert mirrored.is_close
    assert mirrored.correlation == pytest.approx(1, abs=1e-3)
    assert not unlike.is_close
