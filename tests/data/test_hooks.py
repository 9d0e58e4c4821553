"""Hooks are real programs here: Python with a few lines of nibabel."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.check.run import check
from hpc_ddpm.data.discover import Subject
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.preprocess import prepare
from hpc_ddpm.data.shards import config_digest
from hpc_ddpm.errors import ConfigError, DataFormatError

CHANGE = "import sys, nibabel as n; i = n.load(sys.argv[1]); d = i.get_fdata(); "
SAVE = "; n.save(n.Nifti1Image(d, i.affine), sys.argv[2])"


def program(change: str) -> list[str]:
    """A command that changes the voxels `d`."""
    return [sys.executable, "-c", CHANGE + change + SAVE, "{image}", "{output}"]


def subject(folder: Path, write: Callable[..., Path], mask: np.ndarray) -> Subject:
    folder = folder / "a folder; ü"
    images = {
        name: write(folder / name / "s 1.nii.gz", shape=mask.shape, seed=i) for i, name in enumerate(("t1", "t2"))
    }
    return Subject("s 1", write(folder / "mask" / "s 1.nii.gz", mask), images)


def test_hooks_run_in_order_on_the_modalities_they_are_for(
    tiny: Callable[..., DataConfig], write: Callable[..., Path], tmp_path: Path, box_mask: np.ndarray
) -> None:
    config = tiny(modalities=("t1", "t2"), low=0, high=100)
    files = subject(tmp_path, write, box_mask)
    plain = prepare(files, config).intensity
    hooks = [program("d = d + 5"), {"command": program("d = d * 2"), "modalities": ["t2"]}]
    hooked = prepare(files, DataConfig(**{**config.model_dump(), "hooks": hooks})).intensity
    np.testing.assert_allclose(hooked, [plain[0] + 5, 2 * (plain[1] + 5)], rtol=1e-5)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            [sys.executable, "-c", "import sys; print('first\\nlast words', file=sys.stderr); sys.exit(3)"],
            "t1.s 1.nii.gz: subject s 1: .*python.* of data.hooks ended with code 3: last words; try",
        ),
        ([sys.executable, "-c", "pass"], "wrote no output file: it said nothing on stderr"),
        (
            program("i = n.Nifti1Image(d[:-1], i.affine); d = d[:-1]")[:3],
            "t1.s 1.nii.gz: after data.hooks: its grid 7x10x12 .* is not that of its mask",
        ),
    ],
)
def test_failures_name_command_subject_and_last_words(
    tiny: Callable[..., DataConfig],
    write: Callable[..., Path],
    tmp_path: Path,
    box_mask: np.ndarray,
    command: list[str],
    message: str,
) -> None:
    config = tiny(hooks=[[*command, "{image}", "{output}"]])
    with pytest.raises(DataFormatError, match=message) as error:
        prepare(subject(tmp_path, write, box_mask), config)
    assert len(str(error.value).splitlines()) == 1


def test_a_missing_program_is_told_before_anything_is_written(tmp_path: Path, heads: Path) -> None:
    config = DataConfig(size=(8, 10, 12), hooks=[["N4-that-is-not-there", "{image}", "{output}"]])
    for call in (lambda: pack(heads, tmp_path / "out", config), lambda: check(heads, config)):
        with pytest.raises(ConfigError, match="no program N4-that-is-not-there found; install it"):
            call()
    assert not (tmp_path / "out").exists()


def test_check_looks_for_hooks_and_does_not_run_them(heads: Path) -> None:
    config = DataConfig(size=(8, 10, 12), hooks=[[sys.executable, "-c", "exit(1)", "{image}", "{output}"]])
    assert not [finding for finding in check(heads, config).findings if finding.severity == "error"]


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ([["N4", "-i", "{image}"]], "no argument {output}"),
        ([["N4", "--in={image}", "{output}"]], "no argument {image}"),
        ([{"command": ["N4", "{image}", "{output}"], "modalities": "t9"}], r"hooks are for \['t9'\]"),
    ],
)
def test_hook_mistakes(tiny: Callable[..., DataConfig], hooks: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny(hooks=hooks)


def test_the_documented_hooks_are_valid() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")
    block = next(part for part in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "hooks:" in part)
    hooks = DataConfig(**yaml.safe_load(block)["data"]).hooks
    assert [hook.command[0] for hook in hooks] == ["N4BiasFieldCorrection", "mri_synthstrip"]
    assert hooks[1].modalities == ("t1",)


def test_hooks_are_part_of_what_a_dataset_is(tiny: Callable[..., DataConfig]) -> None:
    assert config_digest(tiny(hooks=[program("d = d + 1")])) != config_digest(tiny())
