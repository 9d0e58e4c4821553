"""What the documents promise is true: examples run, links lead somewhere, commands exist."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from tests.conftest import REPOSITORY

DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def test_the_format_example_reads_a_packed_dataset(
    tiny_packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (REPOSITORY / "docs" / "format.md").read_text()
    example = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1]
    shutil.copytree(tiny_packed, tmp_path / "packed")  # HDF5 opens no file twice with other locking
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(example, names)
    assert names["image"].shape == (1, 16, 16, 16)
    assert abs(names["volume"]).max() <= 1


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(document: Path) -> None:
    blocks = re.findall(r"```\n(.*?)```", document.read_text(), re.DOTALL)
    for words in re.findall(
        r"(?:hpc-ddpm|launch\.cli) +([a-z]+)(?: +(ls|show|import|export|check|verify|stats|split)\b)?",
        "\n".join(blocks),
    ):
        command = [word for word in words if word]
        assert CliRunner().invoke(app, [*command, "--help"]).exit_code == 0, command
