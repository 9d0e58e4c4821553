"""Whatever goes wrong with one volume is said of it, and the rest goes on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_ddpm.config import load_config
from hpc_ddpm.data.nifti import read_nifti, write_nifti
from hpc_ddpm.errors import ClusterError, ConfigError
from hpc_ddpm.sampling import write
from hpc_ddpm.sampling.finish import Finisher
from hpc_ddpm.sampling.folder import Failure, SampleFolder
from hpc_ddpm.sampling.status import read_status
from tests.conftest import rank_environment
from tests.forks import Fork
from tests.sampling.conftest import QUICK, Generate, Run, save_random_weights, sidecars, voxels

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def masks(heads: Path, tmp_path: Path) -> Path:
    """A copy of the masks, to break some."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for file in heads.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def reasons(out: Path) -> dict[str, str]:
    return {failure.id: f"{failure.kind}: {failure.reason}" for failure in SampleFolder(out).failures()}


def test_a_corrupt_mask_costs_its_volume_only(run: Run, weights: Path, masks: Path) -> None:
    out, broken = masks.parent / "out", masks / "head_0001.nii.gz"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    write_nifti(masks / "head_0003.nii.gz", np.full((16, 16, 16), 9, np.uint8), np.eye(4))
    said = run(weights, "--out", out, "--masks", masks, "-q", code=2)
    assert "3 of 5 volumes done" in said
    assert f"2 failed (2 mask): `hpc-ddpm sample status {out}` says why" in said
    assert "head_0001.nii.gz: damaged" in reasons(out)["head_0001_r000"]
    assert "unexpected labels" in reasons(out)["head_0003_r000"]
    assert "head_0003_r000 (mask)" in run("status", out, code=2)
    before = voxels(out)
    broken.write_bytes(whole)
    assert "rank 0: 1 volumes generated" in run("retry", out, "-q", code=2)
    assert list(reasons(out)) == ["head_0003_r000"]
    assert before.items() < voxels(out).items()


def test_a_volume_of_nans_is_not_written(generate_set: Generate, tmp_path: Path) -> None:
    config = load_config(None, QUICK).config
    source = save_random_weights(tmp_path / "weights", config, std=1e30)
    report = generate_set(tmp_path / "out", source=source)
    assert (report.done, report.failed) == (0, {"nan": 5})
    assert not list((tmp_path / "out").rglob("*.nii.gz"))
    assert "NaN" in reasons(tmp_path / "out")["head_0000_r000"]


def test_a_write_that_fails_is_marked_and_the_rest_goes_on(
    generate_set: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = write.write_nifti

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        if "head_0002" in path.name and path.parent.name == "mask":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(write, "write_nifti", refuse)
        report = generate_set(tmp_path)
    assert (report.done, report.failed) == (4, {"write": 1})
    assert "No space left" in reasons(tmp_path)["head_0002_r000"]
    assert generate_set(tmp_path).generated == 0
    report = generate_set(tmp_path, masks=None, retry=True)
    assert (report.generated, report.done, report.failed) == (1, 5, {})


@pytest.mark.slow
def test_a_full_disk_ends_the_worker(cli: Cli, weights: Path, heads: Path, tmp_path: Path) -> None:
    """A real limit on file sizes: sidecars and manifest fit, volumes do not."""
    command = [sys.executable, "-m", "launch.cli", "sample", weights, "--out", tmp_path / "out", "--masks", heads, "-q"]
    command += ["sampling.output.compression_level=0"]
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)); {RUN}"
    words = [sys.executable, "-c", limited, *map(str, command[3:])]
    done = subprocess.run(words, env=rank_environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stderr
    assert "3 volumes in a row could not be written (File too large)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").rglob("*.nii.gz"))
    assert len(reasons(tmp_path / "out")) >= 3
    assert cli("sample", "retry", tmp_path / "out", "-q").returncode == 0
    assert len(sidecars(tmp_path / "out")) >= 3
    assert cli("sample", "run", weights, "--out", tmp_path / "out", "-q").returncode == 0
    assert len(sidecars(tmp_path / "out")) == 5


RUN = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from launch.cli import main; main()"


def test_failures_of_volumes_that_others_planned_are_theirs(
    generate_set: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker joins with more masks while this one is at work; here, just before it reports."""
    finish = Finisher.failures

    def failures(finisher: Finisher, *arguments: Any) -> dict[str, int]:
        finisher.folder.write_failure(Failure("stranger_r000", "mask", "damaged", "theirs"), finisher.scratch)
        return finish(finisher, *arguments)

    monkeypatch.setattr(Finisher, "failures", failures)
    assert generate_set(tmp_path).failed == {}
    assert not (tmp_path / ".sample").exists()


def test_too_little_room(generate_set: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    generate_set(tmp_path / "enough", say=said.append)
    assert said == [line for line in said if line.startswith("5 volumes of about 33.9 KiB: 169.7 KiB, ")]
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100_000})())
    with pytest.raises(ClusterError, match=r"5 volumes of about .* 97\.7 KiB free; make room"):
        generate_set(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.nii.gz"))


@pytest.mark.slow
def test_a_stop_signal_gives_the_volume_back(
    weights: Path, heads: Path, tmp_path: Path, cli: Cli, fork: Callable[..., Fork]
) -> None:
    words = ["sample", weights, "--out", tmp_path, "--masks", heads, "-q", "sampling.num_steps=50"]
    with (tmp_path / "output.txt").open("w+") as output:
        process = fork(["-m", "launch.cli", *map(str, words)], rank_environment(), output, output)
        while not (tmp_path / "sidecar").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 128 + signal.SIGTERM
    assert "stopped by signal 15, the same command goes on" in (tmp_path / "output.txt").read_text()
    assert not list((tmp_path / ".sample" / "claims").iterdir())
    assert not list((tmp_path / ".sample" / "writers").iterdir())
    assert 1 <= len(sidecars(tmp_path)) < 5
    assert cli(*words).returncode == 0
    assert len(sidecars(tmp_path)) == 5


# ------------------------------------------------------------------------------------------------- masks


def test_masks_of_another_grid(generate_set: Generate, heads: Path, tmp_path: Path) -> None:
    volume = read_nifti(heads / "head_0000.nii.gz", "LPS", dtype=np.uint8)
    wide = np.pad(volume.data, ((0, 0), (2, 2), (0, 0)))
    affine = volume.affine.copy()
    affine[:3, 3] -= 2 * affine[:3, 1]
    write_nifti(tmp_path / "wide" / "head.nii.gz", wide, affine)
    report = generate_set(tmp_path / "out", masks=tmp_path / "wide" / "head.nii.gz")
    assert report.fitted == 1
    record = sidecars(tmp_path / "out")["head_r000"]
    assert record["mask_changes"] == ["turned from LPS to RAS", "size 16x20x16 to 16x16x16 by crop_pad"]
    as_it_was = generate_set(tmp_path / "fits", masks=heads / "head_0000.nii.gz")
    assert as_it_was.fitted == 0
    assert sidecars(tmp_path / "fits")["head_0000_r000"]["mask_sha256"] == record["mask_sha256"]
    refused = generate_set(tmp_path / "refused", "sampling.mask_fit=refuse", masks=tmp_path / "wide" / "head.nii.gz")
    assert refused.failed == {"mask": 1}
    assert "turned from LPS to RAS" in reasons(tmp_path / "refused")["head_r000"]


def test_masks_with_labels_missing(generate_set: Generate, heads: Path, tmp_path: Path) -> None:
    mask = read_nifti(heads / "head_0000.nii.gz", dtype=np.uint8)
    write_nifti(tmp_path / "masks" / "healthy.nii.gz", np.where(mask.data == 2, 1, mask.data), mask.affine)
    write_nifti(tmp_path / "masks" / "no_head.nii.gz", np.where(mask.data == 1, 0, mask.data), mask.affine)
    report = generate_set(tmp_path / "out", masks=tmp_path / "masks")
    assert (report.done, report.failed) == (1, {"mask": 1})
    assert sidecars(tmp_path / "out")["healthy_r000"]["mask_changes"] == ["no tumour in it"]
    assert "label 1 (head) is missing" in reasons(tmp_path / "out")["no_head_r000"]
    refused = generate_set(tmp_path / "refused", "sampling.mask_fit=refuse", masks=tmp_path / "masks")
    assert refused.failed == {"mask": 2}


# ----------------------------------------------------------------------------------------------- fidelity


def test_volumes_that_score_low_are_made_again(
    generate_set: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The score is a stand-in: how far the volume's first voxel is from 0."""
    score = lambda volume, mask: float(abs(volume[0, 0, 0, 0]) % 1)  # noqa: E731
    monkeypatch.setattr("hpc_ddpm.sampling.run.build_fidelity", lambda config, device: ("test", score))
    settings = ("sampling.fidelity.reject_below=0.6", "sampling.fidelity.max_tries=2", "sampling.clip_x_start=false")
    report = generate_set(tmp_path / "a", *settings, "sampling.replicas=2")
    records = sidecars(tmp_path / "a")
    retried = [record for record in records.values() if record["attempt"]]
    assert retried
    assert report.failed["rejected"] + len(records) == 10
    for record in retried:
        assert record["rejected"][0]["seed"] == record["planned_seed"] != record["seed"]
        assert record["rejected"][0]["fidelity"] < 0.6 <= record["fidelity"]
    found = read_status(tmp_path / "a")
    assert set(found["rejected"]) == {record["id"] for record in retried}
    assert all("0.6 asked for" in failure["reason"] for failure in found["failures"])
    generate_set(tmp_path / "b", *settings, "sampling.replicas=2", "sampling.batch_size=3")
    assert voxels(tmp_path / "a") == voxels(tmp_path / "b")
    more = generate_set(tmp_path / "a", settings[0], settings[2], "sampling.fidelity.max_tries=40", retry=True)
    assert (more.done, more.failed) == (10, {})


def test_nothing_to_score_with(generate_set: Generate, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"do not cover the whole brain.*give sampling\.fidelity\.segmenter"):
        generate_set(tmp_path, "sampling.fidelity.reject_below=0.5")
    with pytest.raises(ConfigError, match="no TorchScript network"):
        generate_set(tmp_path, f"sampling.fidelity.segmenter={tmp_path / 'none.ts'}")


def test_the_threads_of_a_gpu_less_worker(generate_set: Generate, tmp_path: Path) -> None:
    """PyTorch computes some convolutions otherwise on one thread: a worker with one core makes the same voxels."""
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            generate_set(tmp_path / str(threads), "sampling.replicas=1")
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert voxels(tmp_path / "1") == voxels(tmp_path / "3")
