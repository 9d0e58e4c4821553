"""`hpc-ddpm data ...` as a user meets it: exit codes, tables, JSON, one line per mistake."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import image as images

from hpc_ddpm.data.phantom import write_phantoms
from launch.cli import main

SETTINGS = ["data.size=[16,16,16]"]
NO_VOLUME = b"nothing" * 100
"""As long as a volume, and none."""


class Result:
    """Exit code and output of one command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run `hpc-ddpm data ARGUMENTS`."""

    def run(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["hpc-ddpm", "data", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        assert isinstance(caught.value.code, int)
        return Result(caught.value.code, *capfd.readouterr())

    return run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_phantoms(tmp_path / "source", 3, (16, 16, 16))


@pytest.fixture
def packed(tiny_packed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_packed, tmp_path / "packed")


@pytest.mark.parametrize("command", ["check", "verify", "ls", "show", "stats", "split", "export"])
def test_help_loads_no_numpy(command: str) -> None:
    code = (
        "import sys; from launch.cli import app\n"
        "try: app(['data', sys.argv[1], '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_check_tells_by_its_exit_code(data, source: Path, tmp_path: Path) -> None:
    clean = data("check", source, "-q", *SETTINGS)
    assert (clean.code, clean.err) == (0, "")
    assert clean.out == f"3 subjects of {source} (tree): nothing found\n"
    shutil.copy(source / "t1" / "head_0000.nii.gz", source / "t1" / "[red]alone.nii.gz")
    warned = data("check", source, "-q", *SETTINGS)
    assert warned.code == 0
    assert "warning unmatched-file (1)  -> give it the partner it lacks" in warned.out
    assert "subject [red]alone has no mask" in warned.out
    assert data("check", source, "-q", "--strict", *SETTINGS).code == 2
    (source / "t1" / "head_0001.nii.gz").write_bytes(NO_VOLUME)
    failed = data("check", source, "-q", "--report", tmp_path / "page.html", "--workers", "1", *SETTINGS)
    assert failed.code == 2
    assert "error unreadable (1)  -> copy or convert the file again" in failed.out
    assert "t1/head_0001.nii.gz" in failed.out
    assert failed.out.endswith(f"1 error, 1 warning\nreport: {tmp_path / 'page.html'}\n")
    assert (tmp_path / "page.html").read_text().count("<article") == 3


def test_check_as_json(data, source: Path) -> None:
    (source / "t1" / "head_0001.nii.gz").write_bytes(NO_VOLUME)
    done = data("check", source, "-q", "--json", *SETTINGS)
    result = json.loads(done.out)
    assert done.code == 2
    assert [subject["id"] for subject in result["subjects"]] == ["head_0000", "head_0001", "head_0002"]
    (finding,) = result["findings"]
    assert (finding["severity"], finding["kind"], finding["subjects"]) == ("error", "unreadable", ["head_0001"])
    assert finding["do"]


def test_many_findings_of_a_kind_are_cut_short(data, tmp_path: Path) -> None:
    source = write_phantoms(tmp_path / "source", 10, (16, 16, 16))
    for file in (source / "t1").iterdir():
        file.write_bytes(NO_VOLUME)
    done = data("check", source, "-q", *SETTINGS)
    assert "and 2 more (--json lists all)" in done.out
    assert "head_0007" in done.out and "head_0008" not in done.out


def test_verify_tells_by_its_exit_code(data, packed: Path) -> None:
    for options in ([], ["--deep"]):
        done = data("verify", packed, "-q", *options)
        assert (done.code, done.out) == (0, f"{packed}: nothing found\n")
    (packed / "shard-00000.h5").unlink()
    done = data("verify", packed, "-q")
    assert done.code == 2
    assert "error missing-shard (1)  -> copy the shard again" in done.out
    assert "and 7 more" in done.out
    findings = json.loads(data("verify", packed, "-q", "--json").out)
    assert [finding["kind"] for finding in findings] == ["missing-shard"]
    assert len(findings[0]["subjects"]) == 10


def test_look_at_a_packed_dataset(data, packed: Path, tmp_path: Path) -> None:
    listed = data("ls", packed)
    assert listed.code == 0
    assert listed.out.splitlines()[0].split() == ["subject", "split", "shard", "row", "head", "tumour"]
    assert len(listed.out.splitlines()) == 11
    held_out = json.loads(data("ls", packed, "--split", "val", "--json").out)
    assert {row["split"] for row in held_out} == {"val"}
    assert data("ls", packed, "--split", "test").code == 0
    assert "original_sizes" in data("stats", packed).out
    assert json.loads(data("stats", packed, "--json").out)["subjects"] == 10
    shown = data("show", packed, "head_0004", "--out", tmp_path / "head.png")
    assert shown.code == 0
    assert "head_0004" in shown.out and str(tmp_path / "head.png") in shown.out.replace("\n", "")
    assert images.imread(tmp_path / "head.png").shape[0] == 320
    assert json.loads(data("show", packed, "head_0004", "--json").out)["original_size"] == [16, 16, 16]


def test_split_and_export(data, packed: Path, tmp_path: Path) -> None:
    done = data("split", packed, "--val", "0.3", "--test", "0.2", "--seed", "3")
    assert done.code == 0
    counts = [int(part.split()[0]) for part in done.out.partition(": ")[2].split(", ")]
    assert sum(counts) == 10 and min(counts) > 0
    assert data("split", packed, "--val", "0.3", "--test", "0.2", "--seed", "3").out == done.out
    table = tmp_path / "t.csv"
    rows = json.loads(data("ls", packed, "--json").out)
    table.write_text("subject,split\n" + "".join(f"{row['id']},train\n" for row in rows))
    assert data("split", packed, "--table", table).out == f"{packed}: 10 train\n"
    done = data("export", packed, "--out", tmp_path / "out", "--original-grid", "--intensities", "original", "-q")
    assert (done.code, done.out) == (0, f"10 subjects in {tmp_path / 'out'}\n")
    assert len(list((tmp_path / "out" / "t1").iterdir())) == 10


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["check", "nowhere"], "no such folder or table"),
        (["verify", "nowhere"], "no such packed dataset"),
        (["ls", "nowhere"], "no such packed dataset"),
        (["show", "PACKED", "head_12"], "no subject head_12; nearest of 10: head_"),
        (["show", "PACKED", "head_0001", "--out", "x.jpg"], "written as .png"),
        (["split", "PACKED", "--val", "1"], "leave nothing to train on"),
        (["split", "PACKED", "--table", "nowhere.csv"], "not a readable table"),
        (["export", "PACKED", "--out", "PACKED"], "holds other files"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(data, tiny_packed: Path, arguments: list[str], part: str) -> None:
    done = data(*[str(tiny_packed) if word == "PACKED" else word for word in arguments])
    assert (done.code, done.out) == (2, "")
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("hpc-ddpm: ") and part in lines[0]


def test_reports_that_cannot_be_written_cost_no_check(
    data, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = data("check", source, "-q", "--report", ".", *SETTINGS)
    assert (done.code, done.out) == (2, "") and "'.' is a directory" in done.err
    (tmp_path / "file").write_text("in the way")
    done = data("check", source, "-q", "--report", tmp_path / "file" / "x.html", *SETTINGS)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"hpc-ddpm: {tmp_path / 'file'}: cannot write here (File exists); make room or choose")
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x.html"))
    monkeypatch.setattr("hpc_ddpm.data.check.report.atomic_path", lambda path: (_ for _ in ()).throw(full))
    done = data("check", source, "-q", "--report", tmp_path / "x.html", *SETTINGS)
    assert (done.code, done.out) == (2, f"3 subjects of {source} (tree): nothing found\n")
    assert "cannot write here (No space left on device)" in done.err


def test_split_of_a_dataset_that_cannot_be_written(data, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = PermissionError(errno.EACCES, "Permission denied", str(packed / "x"))
    monkeypatch.setattr("hpc_ddpm.data.shards.write_json", lambda *_, **__: (_ for _ in ()).throw(refused))
    done = data("split", packed)
    assert done.code == 2
    assert done.err.startswith(f"hpc-ddpm: {packed}: cannot write here (Permission denied); make room or choose")
