"""Every command, with every path it takes: too long, below a file, a file for a folder, where nobody may write."""

from __future__ import annotations

import inspect
import sys
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from hpc_ddpm.config import load_config
from hpc_ddpm.text import has_control
from launch.cli import app, main
from tests.conftest import TINY
from tests.sampling.conftest import QUICK, save_random_weights

WORDS = {"stage": "pack", "preset": "demo", "subjects": "head_0000", "subject": "head_0000", "keep": "2"}
"""What other required words are."""


def commands(group: typer.Typer = app, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Words and function of every command."""
    for one in group.registered_commands:
        name = one.name or one.callback.__name__.replace("_", "-")  # type: ignore[union-attr]
        yield (*words, name), one.callback
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from commands(inner.typer_instance, (*words, str(inner.name)))


def paths_of(function: Any) -> list[str]:
    """Names of the parameters that are paths."""
    hints = typing.get_type_hints(function)
    return [name for name, hint in hints.items() if hint is Path or Path in typing.get_args(hint)]


def line(words: tuple[str, ...], function: Any, which: str, bad: str, good: str) -> list[str]:
    """A command line whose path `which` is bad; the other paths that it needs are good."""
    hints, paths = typing.get_type_hints(function, include_extras=True), paths_of(function)
    options, arguments = [], []
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "context" or (parameter.default is not inspect.Parameter.empty and name != which):
            continue
        value = bad if name == which else good if name in paths else WORDS[name]
        info = next(entry for entry in typing.get_args(hints[name]) if hasattr(entry, "param_decls"))
        if type(info).__name__ == "ArgumentInfo":
            arguments.append(value)
            continue
        declared = [each for each in (info.default, *(info.param_decls or ())) if str(each).startswith("--")]
        options += [(declared or [f"--{name.replace('_', '-')}"])[0], value]
    return [*words, *arguments, *options]


BADLY = ("x" * 300, "afile/x", "afile", "/sys/nobody/may")
STARTS_RANKS = {"bench", "doctor", "drill"}
"""They measure before they write, say more than a line, or need a cluster."""
CASES = [
    pytest.param(words, function, which, id=f"{'-'.join(words)}-{which}")
    for words, function in commands()
    if words[0] not in STARTS_RANKS
    for which in paths_of(function)
]


def refuse(words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """What `hpc-ddpm WORDS` says, in one line, before it ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["hpc-ddpm", *words])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
        main()
    said = capfd.readouterr().err
    assert (end.value.code, said.count("\n")) == (2, 1), said
    assert not has_control(said[:-1])
    return said


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with an empty folder and a file; no SLURM and no GPU."""
    (tmp_path / "good").mkdir()
    (tmp_path / "afile").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPC_DDPM_DEVICE", "cpu")
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("words", "function", "which"), CASES)
def test_a_path_that_cannot_be(
    words: tuple[str, ...],
    function: Any,
    which: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for bad in BADLY[:3]:
        if (words, which) != (("jobs", "ls"), "folders"):  # it looks for runs, and finds none
            refuse(line(words, function, which, bad, "good"), monkeypatch, capfd)
    assert sorted(path.name for path in here.iterdir()) == ["afile", "good"]


@pytest.mark.parametrize(
    "words",
    [
        "pack SOURCE --out BAD data.size=16,16,16",
        "train --data PACKED --out BAD TINY",
        "sample run WEIGHTS --masks MASK --out BAD --quiet",
        "data show PACKED head_0000 --out BAD",
        "data export PACKED --out BAD --quiet",
        "submit pack SOURCE --out BAD --cluster devcluster data.size=16,16,16",
    ],
)
def test_a_place_that_cannot_be_written(
    words: str,
    here: Path,
    goods: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """All else is as it should be, so that the place is what is found wrong."""
    for bad in BADLY:
        filled = [part for word in words.split() for part in (goods | {"BAD": [bad]}).get(word, [word])]
        if bad == "afile" and words.startswith("data show"):
            continue  # a file is what they write
        said = refuse(filled, monkeypatch, capfd)
        assert (bad[:50] if len(bad) > 50 else bad.removesuffix("/x").removesuffix("/may")) in said, said
    assert sorted(path.name for path in here.iterdir()) == ["afile", "good"]


@pytest.fixture(scope="module")
def goods(tiny_packed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    source = tiny_packed.parent / "source"
    weights = save_random_weights(tmp_path_factory.mktemp("goods") / "weights", load_config(None, QUICK).config)
    mask = next((source / "mask").glob("head_0000*"))
    places = {"PACKED": tiny_packed, "SOURCE": source, "WEIGHTS": weights, "MASK": mask}
    return {"TINY": TINY} | {name: [str(place)] for name, place in places.items()}
