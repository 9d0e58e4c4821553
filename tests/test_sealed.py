"""Every single flipped bit of a sealed file is found; every other content than expected is one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from hpc_ddpm.config import load_config
from hpc_ddpm.errors import ClusterError, ConfigError, DataFormatError
from hpc_ddpm.files import append_json, atomic_folder, write_json
from hpc_ddpm.sealed import UnreadableError, parse, read_json, read_lines, read_log, seal, unseal

CONTENT = {"id": "ü_r000", "seed": 5, "parts": [1.5, None], "inner": {"a": "b"}}


@with_config(ConfigDict(extra="forbid"))
class Shape(TypedDict):
    id: str
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    parts: list[float | None]
    inner: dict[str, str]


@pytest.mark.parametrize("indent", [None, 2])
def test_every_flipped_bit_is_found(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "a.json"
    write_json(path, CONTENT, indent=indent)
    whole = path.read_bytes()
    assert json.loads(whole) == CONTENT | {"checksum": json.loads(whole)["checksum"]}
    assert read_json(path, Shape, "copy it") == CONTENT
    harmless = 0
    for position in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        try:
            content, is_sealed = parse(bytes(damaged), dict[str, Any])
        except UnreadableError:
            continue
        assert is_sealed
        assert content == CONTENT
        harmless += 1
    assert harmless <= 8  # of the last line's end


def test_empty_and_formatted_anew(tmp_path: Path) -> None:
    assert unseal(seal("{}").encode()) == (b"{}", True)
    with pytest.raises(UnreadableError, match="does not fit its checksum: damaged, or changed by hand"):
        unseal(json.dumps(json.loads(seal(json.dumps(CONTENT))), indent=4).encode())
    path = tmp_path / "list.json"
    write_json(path, [1, 2])
    assert read_json(path, list[int], "copy it", is_sealed=False) == [1, 2]


def test_files_of_earlier_versions_are_read_and_named_once(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps(CONTENT))
    with pytest.warns(UserWarning, match=rf"{tmp_path}: written by an earlier version, without checksums") as seen:
        for _ in range(3):
            assert read_json(path, Shape, "copy it") == CONTENT
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"\xff", "not readable as JSON"),
        (b"", "not readable as JSON"),
        (b"[" * 200_000, "not readable as JSON"),
        (b"[]", r"Input should be .*, found a list"),
        (json.dumps(CONTENT | {"seed": "5"}).encode(), r"seed: Input should be a valid integer, found '5'"),
        (json.dumps(CONTENT | {"seed": 2**63}).encode(), r"seed: Input should be less than"),
        (json.dumps(CONTENT | {"seed": True}).encode(), r"seed: Input should be a valid integer"),
        (json.dumps(CONTENT).replace("5", "9" * 6000, 1).encode(), r"not readable as JSON"),
        (json.dumps(CONTENT | {"more\nlines": 1}).encode(), r"more lines: "),
        (json.dumps(CONTENT | {"id": 10**6 * ["x"]}).encode(), "id: Input should be a valid string, found a list"),
        (json.dumps(CONTENT | {"seed": 10**6 * "x"}).encode(), "seed: "),
    ],
)
def test_other_content_is_one_short_line(tmp_path: Path, text: bytes, found: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(ClusterError, match=rf"{path}: {found}") as caught:
        read_json(path, Shape, "copy it again", ClusterError)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < len(str(path)) + 250
    assert str(caught.value).endswith("; copy it again")


def test_missing_and_forbidden(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match=r"gone\.json: cannot be read \(No such file or directory\); copy it"):
        read_json(tmp_path / "gone.json", Shape, "copy it")
    with pytest.raises(DataFormatError, match=r"cannot be read \(Is a directory\); copy it"):
        read_json(tmp_path, Shape, "copy it")


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{seal(json.dumps({'n': n}))}\n" for n in range(3)))
    assert read_lines(path, dict[str, int], "restore it") == [{"n": 0}, {"n": 1}, {"n": 2}]
    path.write_text(path.read_text().replace('"n": 1', '"n": 3'))
    with pytest.raises(DataFormatError, match=rf"{re.escape(str(path))}:2: its content does not .*; restore it"):
        read_lines(path, dict[str, int], "restore it")


def test_a_log_passes_over_a_torn_last_line_and_names_damaged_ones(tmp_path: Path) -> None:
    path = tmp_path / "log" / "a.jsonl"
    assert read_log(path, dict[str, int]) == []
    append_json(path, {"n": 0})
    append_json(path, {"n": 1})
    path.write_bytes(path.read_bytes()[:-9])
    assert read_log(path, dict[str, int]) == [{"n": 0}]
    append_json(path, {"n": 2})
    with pytest.warns(UserWarning, match=r"a\.jsonl: 1 damaged lines passed over; line 2: not readable as JSON"):
        assert read_log(path, dict[str, int]) == [{"n": 0}, {"n": 2}]


def test_a_folder_is_complete_or_absent(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "a") as one, atomic_folder(tmp_path / "b") as other:
        (one / "x").write_text("one")
        (other / "x").write_text("other")
    assert [path.read_text() for path in sorted(tmp_path.glob("*/x"))] == ["one", "other"]
    with pytest.raises(FileExistsError, match="a"), atomic_folder(tmp_path / "a") as folder:
        (folder / "y").write_text("y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_configuration_with_a_checksum_is_one_without(tmp_path: Path) -> None:
    path, config = tmp_path / "config.json", load_config(None, ["training.num_steps=7"]).config
    write_json(path, config.dump(), indent=2)
    assert load_config(path).config == config
    path.write_text(path.read_text().replace('"num_steps": 7', '"num_steps": 3'))
    with pytest.raises(ConfigError, match=r"config\.json: its content does not fit its checksum.*restore it"):
        load_config(path)
