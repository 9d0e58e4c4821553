"""Whether a job comes back after its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.after_job import End, decide
from launch.cli import app
from launch.executor import Request, _setup, _teardown
from launch.jobs import SIGNALS, StageJob
from launch.profiles import load_profile
from launch.records import Submission, add_event, read_events
from launch.watch import look
from tests.conftest import REPOSITORY


def ended(mark: str, *, is_excused: bool = False, is_orderly: bool = False) -> dict[str, object]:
    return {"event": "end", "mark": mark, "is_excused": is_excused, "is_orderly": is_orderly}


def stopped(mark: str) -> dict[str, object]:
    return ended(mark, is_orderly=True)


def at_limit(mark: str) -> End:
    return End(140, mark, (140,), share=0.99)


@pytest.mark.parametrize(
    ("end", "ends", "restarts", "comes_back", "part"),
    [
        (End(0), [], 0, False, "done"),
        (End(2), [], 0, False, "failed with exit code 2; the log says why"),
        (End(143, ranks=(2,)), [], 0, False, "failed with exit code 2"),  # srun ended the others, the highest code wins
        (End(143, "a", (143, 143)), [], 9, True, "stopped by SIGTERM"),
        (End(143, "a", (143,), share=0.1), [ended("a", is_excused=True)] * 8, 8, True, "stopped by SIGTERM"),
        (at_limit("b"), [stopped("a"), stopped("a")], 2, True, "stopped by SIGUSR2, comes back"),
        (at_limit("a"), [stopped("0"), stopped("a"), stopped("a")], 3, True, "stopped by SIGUSR2"),
        (
            at_limit("a"),
            [stopped("a")] * 3,
            3,
            False,
            "3 starts in a row without progress, the last: stopped by SIGUSR2",
        ),
        (at_limit("a"), [stopped("a"), ended("a", is_excused=True), stopped("a")], 3, True, "stopped by SIGUSR2"),
        (at_limit("a"), [ended("a"), stopped("a")], 2, False, "3 starts in a row without progress"),
        (End(137, "a", (75,)), [stopped("a"), ended("a")], 2, True, "a rank was lost"),
        (End(143, "a", (140,)), [], 8, True, "stopped by SIGUSR2"),  # srun ended a slower rank
        (End(143, "a", (143,)), [], 10, False, "max_requeues"),
        (End(137, "a", (75,)), [], 0, True, "a rank was lost"),
        (End(75, "start", (75,)), [], 0, True, "a rank was lost or did not come (exit code 75, at start), comes back"),
        (End(143, "a"), [], 0, True, "ended by a signal before it could save"),
        (End(143, "a", is_hang=True), [], 0, True, "a rank hung, see stacks-of-rank-*.txt"),
        (End(143, "a"), [ended("a")] * 2, 2, False, "3 starts in a row without progress, the last: ended by a signal"),
        (End(137, "a"), [ended("0"), ended("a")], 2, True, "a rank was lost"),
        (End(137, "a"), [ended("a"), ended("a"), ended("a", is_excused=True)], 3, True, "a rank was lost"),
    ],
)
def test_what_comes_back(end: End, ends: list[dict[str, object]], restarts: int, comes_back: bool, part: str) -> None:
    found, why = decide(end, ends, restarts, max_requeues=10, max_crashes=3)
    assert found == comes_back
    assert part in why


# ------------------------------------------------------------------------------------------- the batch script


def end_of_job(
    run: Path, scontrol: str, code: int = 137, restarts: int = 0, **profile: int
) -> tuple[list[dict[str, Any]], str]:
    """What the batch script of a job records and prints when srun has ended, where `scontrol` is this line of shell."""
    (run / "bin").mkdir(parents=True, exist_ok=True)
    if scontrol:
        (run / "bin" / "scontrol").write_text(f"#!/bin/sh\n{scontrol}\n")
        (run / "bin" / "scontrol").chmod(0o755)
    settings = load_profile("devcluster").model_copy(update=profile)
    request = Request("train", ("train",), run, settings)
    (began, *_), end = _setup(settings, run), _teardown(request, sys.executable)
    script = "\n".join([began, f"(exit {code})", *end])
    env = {"PATH": str(run / "bin"), "SLURM_JOB_ID": "7", "PYTHONPATH": str(REPOSITORY)}
    env |= {"SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run(
        ["/bin/bash", "-c", script], env=env, capture_output=True, text=True, check=False, start_new_session=True
    )
    assert (done.returncode, done.stderr) == (code, "")
    return read_events(run, "7"), done.stdout


def state(run: Path) -> str:
    """As a login node sees it once SLURM has forgotten the job, or a machine without SLURM."""
    profile = load_profile("devcluster").model_dump(mode="json")
    submission = Submission("7", "train", ["train"], str(run), str(run), profile, 0, 1, 2, 100.0, "host", None)
    submission.write()
    (job,) = look([submission])
    return job.in_words


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", "/nowhere")
    return tmp_path / "a run"


def test_a_requeue_is_recorded_once_slurm_has_done_it(run: Path) -> None:
    """Which ends the script, too: it records first."""
    (end, requeue), said = end_of_job(run, "kill -TERM 0; /bin/sleep 0.2; echo $* > $0.asked", restarts=3)
    assert (run / "bin" / "scontrol.asked").read_text() == "requeue 7\n"
    assert (end["event"], end["comes_back"], end["restarts"]) == ("end", True, 3)
    assert end["why"] == "a rank was lost or did not come (exit code 137, at start), comes back"
    assert 0 <= end["ran_s"] < 600
    assert (requeue["requeued"], requeue["why"]) == (True, "requeued after 3 restarts")
    assert "requeued after 3 restarts" in said
    assert state(run) == "ELSEWHERE"


@pytest.mark.parametrize(
    ("scontrol", "part"),
    [
        ("echo 'slurm_requeue error: Access/permission denied' >&2; exit 1", "slurm_requeue error: Access/permission"),
        ("", "scontrol: command not found"),
        ("exit 3", "exit code 3"),
    ],
)
def test_a_requeue_that_slurm_refuses_is_not_recorded_as_one(run: Path, scontrol: str, part: str) -> None:
    (end, requeue), said = end_of_job(run, scontrol)
    assert end["comes_back"] and not requeue["requeued"]
    for text in (requeue["why"], said):
        assert "not requeued: SLURM said: " in text and part in text
        assert f"`hpc-ddpm jobs retry {run}` on a login node starts it again" in text
    assert state(run) == "FAILED"
    shown = CliRunner().invoke(app, ["jobs", "show", str(run)]).output
    assert "not requeued: SLURM said: " in shown and "comes back" in shown


def test_what_does_not_come_back_does_not_ask(run: Path) -> None:
    (end,), _ = end_of_job(run, ": > $0.asked", code=2)
    assert not end["comes_back"] and not (run / "bin" / "scontrol.asked").exists()
    assert state(run) == "FAILED"


def test_records_from_before_are_read(run: Path) -> None:
    add_event(run, "7", {"event": "start", "time": 110, "restarts": 0, "nodes": "n1"})
    add_event(
        run, "7", {"event": "end", "time": 120, "code": 137, "mark": "start", "is_excused": False, "requeued": True}
    )
    assert state(run) == "ELSEWHERE"


def test_clocks_of_nodes_need_not_agree(run: Path) -> None:
    """Ranks and hangs of this start are told from those of earlier ones by what is recorded, not by when."""
    add_event(run, "7", {"event": "end", "time": 900, "code": 2, "restarts": 0}, kind="ranks")
    (run / "stacks-of-rank-00001.txt").write_text("somewhere")
    os.utime(run / "stacks-of-rank-00001.txt", (1, 1))
    first = end_of_job(run, "exit 0", code=143, restarts=0)[0][0]
    assert first["why"] == "failed with exit code 2; the log says why"
    add_event(run, "7", {"event": "end", "time": 5, "code": 140, "restarts": 1}, kind="ranks")
    assert end_of_job(run, "exit 0", code=143, restarts=1)[0][1]["why"] == "stopped by SIGUSR2, comes back"
    (run / "stacks-of-rank-00001.txt").write_text("somewhere else")
    os.utime(run / "stacks-of-rank-00001.txt", (2, 2))
    third, fourth = (end_of_job(run, "exit 0", code=137, restarts=restarts)[0][-2] for restarts in (2, 3))
    assert third["why"].startswith("a rank hung, see stacks") and fourth["why"].startswith("a rank was lost")
    events = [json.dumps(event) for event in read_events(run, "7")]
    assert len(events) == 7


# --------------------------------------------------------------------------------------------------- the ranks


@pytest.fixture
def rank(run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Run one rank of a job; its exit code."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "RANK", "WORLD_SIZE"))]:
        monkeypatch.delenv(name)
    facts = {"JOB_ID": "7", "STEP_ID": "0", "PROCID": "1", "STEP_NUM_TASKS": "2", "STEP_NODELIST": "n1"}
    for name, value in (facts | {"RESTART_COUNT": "2"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (run / "jobs").mkdir(parents=True)

    def start() -> int:
        before, words, where = {number: signal.getsignal(number) for number in SIGNALS}, sys.argv, Path.cwd()
        try:
            StageJob(("config", "ls"), str(run), str(run))()
        except SystemExit as end:
            return int(str(end.code))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            sys.argv = words
            os.chdir(where)
        return 0

    return start


def test_a_rank_that_a_variable_confuses_is_a_mistake(
    run: Path, rank: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, and recorded, so that the job does not come back."""
    assert rank() == 0
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert rank() == 2
    assert capsys.readouterr().err.startswith("hpc-ddpm: WORLD_SIZE=1 set, but srun started this as rank 1 of 2")
    (end,) = read_events(run, "7", "ranks")
    assert (end["code"], end["restarts"]) == (2, 2)


def test_a_bug_in_one_rank_is_recorded(
    run: Path, rank: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or srun, which ends the others by a signal, would report that one, and the job would come back to it."""
    monkeypatch.setattr("launch.cli.app", lambda **_: [][0])
    assert rank() == 1
    assert "IndexError" in capsys.readouterr().err
    assert [end["code"] for end in read_events(run, "7", "ranks")] == [1]


def test_an_event_that_cannot_be_recorded_costs_no_job(
    run: Path, rank: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "jobs").rmdir()
    (run / "jobs").write_text("a file")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert rank() == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "jobs: the start of job 7 is not recorded (" in said
