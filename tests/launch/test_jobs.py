"""What the run directory tells of a job, long after it."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpc_ddpm.errors import ClusterError
from hpc_ddpm.files import write_json
from launch.after_job import progress_mark
from launch.cli import app
from launch.executor import again, refuse_if_busy
from launch.jobs_tables import describe
from launch.ledger import time_ledger
from launch.profiles import load_profile
from launch.records import Submission, add_event, find_runs, read_events, read_submissions
from launch.watch import live_job, look

TIMED_OUT = "echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2; exit 1"
NO_ACCOUNTS = "echo 'Slurm accounting storage is disabled' >&2; exit 1"


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """A SLURM cluster whose squeue and sacct are these lines of shell."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def set_up(squeue: str, sacct: str = NO_ACCOUNTS) -> None:
        for name, line in {"squeue": squeue, "sacct": sacct, "sbatch": "exit 1"}.items():
            (folder / name).write_text(f"#!/bin/sh\n{line}\n")
            (folder / name).chmod(0o755)

    return set_up


def submission(run: Path, num_tasks: int = 0, job_id: str = "7") -> Submission:
    profile = load_profile("devcluster").model_dump(mode="json")
    return Submission(job_id, "train", ["train"], str(run), str(run), profile, num_tasks, 1, 2, 100.0, "host", None)


def test_records_follow_a_moved_run_and_survive_a_torn_line(tmp_path: Path) -> None:
    submission(tmp_path / "before").write()
    add_event(tmp_path / "before", "7", {"event": "start", "time": 1})
    with (tmp_path / "before" / "jobs" / "7.events.jsonl").open("a") as file:
        file.write('{"event": "en')
    (tmp_path / "before").rename(tmp_path / "after")
    assert find_runs([tmp_path]) == [tmp_path / "after"]
    (found,) = read_submissions(tmp_path / "after")
    assert found.run_dir == str(tmp_path / "after")
    assert read_events(tmp_path / "after", "7") == [{"event": "start", "time": 1}]


def test_states_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for task, code in (("7_0", 0), ("7_1", 2)):
        add_event(tmp_path, task, {"event": "end", "time": 200, "code": code})
    (job,) = look([submission(tmp_path, num_tasks=3)])
    assert [state.state for state in job.tasks.values()] == ["COMPLETED", "FAILED", "ELSEWHERE"]
    assert job.unfinished == ["7_1"]


@pytest.mark.parametrize("text", ["{}", "[1]", '{"job_id": "7", "sta', '"\\ud800'])
def test_a_foreign_or_torn_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """`jobs ls` shows the others; a second job is not started beside one that it may have been."""
    monkeypatch.setenv("PATH", "/nowhere")
    submission(tmp_path / "good").write()
    (tmp_path / "bad" / "jobs").mkdir(parents=True)
    (tmp_path / "bad" / "jobs" / "8.json").write_text(text)
    done = CliRunner().invoke(app, ["jobs", "ls", str(tmp_path), "--json"])
    assert [row["run"] for row in json.loads(done.stdout)] == [str(tmp_path / "good")]
    for call in (lambda: read_submissions(tmp_path / "bad"), lambda: refuse_if_busy(tmp_path / "bad")):
        with pytest.raises(ClusterError, match=r"8\.json: .*; no record of a job, or a damaged one: remove it"):
            call()


def test_a_record_of_what_is_refused_now_is_not_repeated(tmp_path: Path) -> None:
    old = submission(tmp_path)
    with pytest.raises(ClusterError, match="job 7 cannot be repeated as it was: time=0:00:10 is no longer than"):
        again(replace(old, profile=old.profile | {"time": "0:00:10"}), 1)


def test_a_job_whose_state_nobody_tells_has_not_ended(tmp_path: Path, says: Callable[..., None]) -> None:
    """Or a second one would be started in the same run."""
    submission(tmp_path).write()
    says(TIMED_OUT)
    with pytest.raises(ClusterError, match="Socket timed out"):
        refuse_if_busy(tmp_path)
    for command in ("ls", "show", "wait", "retry"):
        done = CliRunner().invoke(app, ["jobs", command, str(tmp_path)])
        assert isinstance(done.exception, ClusterError)
    says(TIMED_OUT, "echo '7|COMPLETED|00:01:00|n1'")
    assert live_job(tmp_path) is None
    says("true")
    assert live_job(tmp_path) is None


def test_waiting_goes_on_while_slurm_does_not_answer(tmp_path: Path, says: Callable[..., None]) -> None:
    submission(tmp_path).write()
    turns = ["7|RUNNING|0:01|n1|n1", "", "7|COMPLETED|0:01|n1|n1"]
    count = f"n=$(cat {tmp_path}/n 2>/dev/null || echo 1); echo $((n + 1)) > {tmp_path}/n"
    lines = ";; ".join(f"{n}) {f'echo {turn!r}' if turn else TIMED_OUT}" for n, turn in enumerate(turns, start=1))
    says(f"{count}; case $n in {lines};; esac")
    done = CliRunner().invoke(app, ["jobs", "wait", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (0, "job 7: COMPLETED\n")
    assert "Socket timed out" in done.stderr


@pytest.mark.parametrize("state", ["REQUEUE_HOLD", "SPECIAL_EXIT", "REQUEUE_FED", "RESV_DEL_HOLD", "STAGE_OUT", "NEW"])
def test_a_held_job_is_live(tmp_path: Path, says: Callable[..., None], state: str) -> None:
    submission(tmp_path).write()
    says(f"echo '7|{state}|0:00|(JobHoldMaxRequeue)|'")
    assert live_job(tmp_path) == "7"
    (job,) = look(read_submissions(tmp_path))
    assert (job.unfinished, job.tasks["7"].reason) == ([], "JobHoldMaxRequeue")


def test_ranks_of_another_machine_are_left_to_it(tmp_path: Path) -> None:
    """Seen over a shared disk: what it has not recorded as ended may still run."""
    local = replace(submission(tmp_path), profile=load_profile("local").model_dump(mode="json"), host="ws2")
    local.write()
    add_event(tmp_path, "7", {"event": "start", "time": 110, "restarts": 0, "nodes": "ws2"})
    (job,) = look([local])
    assert (job.in_words, job.live, job.unfinished) == ("ELSEWHERE", [], [])
    with pytest.raises(ClusterError, match="job 7 was started on ws2 and may still run"):
        refuse_if_busy(tmp_path)
    for command in ("wait", "cancel", "retry"):
        done = CliRunner().invoke(app, ["jobs", command, str(tmp_path)])
        assert "started on ws2" in str(done.exception)
    (here,) = look([replace(local, host=socket.gethostname())])
    assert (here.in_words, here.unfinished) == ("FAILED", ["7"])
    add_event(tmp_path, "7", {"event": "end", "time": 120, "code": 0})
    assert look([local])[0].in_words == "COMPLETED"
    refuse_if_busy(tmp_path)


def test_where_the_time_went(tmp_path: Path) -> None:
    """Queued 10 s, ran 20 s, queued 5 s, runs for 15 s."""
    for kind, time in (("start", 110), ("end", 130), ("requeue", 131), ("start", 135)):
        add_event(tmp_path, "7", {"event": kind, "time": time, "restarts": 0, "code": 0})
    rows = [{"step": 1}, {"step": 2, "step_time_s": 10.0, "data_wait_share": 0.25, "checkpoint_stall_s": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "lost.jsonl").write_text(json.dumps({"step": 2, "step_time_s": 3.0, "data_wait_share": 0}) + "\n")
    steps = {"computing": 14, "waiting_for_data": 5, "saving": 1, "lost_steps": 3}
    assert (
        time_ledger([submission(tmp_path)], ["7"], now=150.0)
        == {
            "queued": 15,
            "running": 35,
            "starting": 12,
        }
        | steps
    )


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        # a lost node: it ran for a part of 30 s, then waited
        ([("start", 110, {}), ("start", 140, {}), ("end", 160, {})], {"queued": 10, "running": 20, "not_known": 30}),
        # the clock of the node was set back by an hour: the batch script has measured by another one
        ([("start", 3710, {}), ("end", 130, {"ran_s": 20})], {"queued": 3610, "running": 20, "starting": 20}),
        # it is an hour behind that of the login node
        ([("start", -3490, {}), ("end", -3470, {"ran_s": 20})], {"running": 20, "starting": 20}),
        # nothing has measured
        ([("start", 3710, {}), ("end", 130, {})], {"queued": 3610}),
    ],
)
def test_time_that_nobody_measured_is_not_invented(
    tmp_path: Path, events: list[tuple[str, float, dict[str, float]]], expected: dict[str, float]
) -> None:
    for kind, time, more in events:
        add_event(tmp_path, "7", {"event": kind, "time": time, "restarts": 0, "code": 0} | more)
    found = time_ledger([submission(tmp_path)], [], now=1e9)
    steps = dict.fromkeys(("computing", "waiting_for_data", "saving", "lost_steps"), 0.0)
    assert found == steps | expected


def test_restarts_whose_starts_were_not_recorded_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for restarts in (0, 3):
        add_event(tmp_path, "7", {"event": "start", "time": 110, "restarts": restarts, "nodes": "n1"})
    (job,) = look([submission(tmp_path)])
    assert job.restarts == 3


def test_gpu_hours_count_the_gpus_of_each_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour on 64 GPUs, half of it in steps, then an hour on one, all of it in steps."""
    monkeypatch.setenv("PATH", "/nowhere")
    for job, nodes, ranks, began in (("7", 16, 4, 100.0), ("8", 1, 1, 3700.0)):
        replace(submission(tmp_path, job_id=job), nodes=nodes, ranks_per_node=ranks, submitted=began).write()
        for event in ({"event": "start", "time": began}, {"event": "end", "time": began + 3600, "code": 0}):
            add_event(tmp_path, job, event | {"restarts": 0})
    speed = {"data_wait_share": 0.0, "volumes_per_s": 64.0}
    rows = [
        {"step": 1, "step_time_s": 1800.0, "volumes_per_s_per_rank": 1.0} | speed,
        {"step": 2, "step_time_s": 3600.0, "volumes_per_s_per_rank": 64.0} | speed,
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (*_, newest) = look(read_submissions(tmp_path))
    spent = describe(newest, in_full=True)["gpu_hours"]
    assert (spent["running"], spent["computing"], spent["starting"]) == (65, 33, 32)


def test_a_job_that_loads_is_starting(tmp_path: Path, says: Callable[..., None]) -> None:
    """Until the first step of this start is logged; what an earlier start did is not its progress."""

    def listed() -> str:
        return CliRunner().invoke(app, ["jobs", "ls", str(tmp_path)]).stdout

    submission(tmp_path).write()
    settings = {"training": {"num_steps": 100, "global_batch": 2}}
    steps, config = tmp_path / "metrics.jsonl", tmp_path / "config.json"
    says("echo '7|RUNNING|0:01|n1|n1'")
    assert "starting" in listed()
    write_json(config, settings)
    add_event(tmp_path, "7", {"event": "start", "time": 110.0, "restarts": 0})
    assert "starting " in listed() and "0/100" not in listed()
    steps.write_text(json.dumps({"step": 40, "time": 120.0, "loss": 1.0}) + "\n")
    assert "40/100 steps" in listed() and "starting" not in listed()
    add_event(tmp_path, "7", {"event": "end", "time": 130.0, "code": 138, "requeued": True})
    assert "starting at 40/100 steps" in listed()
    add_event(tmp_path, "7", {"event": "start", "time": 150.0, "restarts": 1})
    assert "starting at 40/100 steps" in listed()
    steps.write_text(json.dumps({"step": 41, "time": 151.0, "loss": 1.0}) + "\n")
    assert "41/100 steps" in listed() and "starting" not in listed()
    says("echo '7|PENDING|0:00|(Priority)|'")
    assert "starting" not in listed()


def test_an_array_whose_workers_load_is_starting(tmp_path: Path, says: Callable[..., None]) -> None:
    replace(submission(tmp_path, num_tasks=2), stage="sample").write()
    says("printf '7_0|RUNNING|0:01|n1|n1\\n7_1|PENDING|0:00|(Priority)|\\n'")
    assert " starting " in CliRunner().invoke(app, ["jobs", "ls", str(tmp_path)]).stdout
    says("printf '7_0|PENDING|0:00|(Priority)|\\n7_1|PENDING|0:00|(Priority)|\\n'")
    assert "starting" not in CliRunner().invoke(app, ["jobs", "ls", str(tmp_path)]).stdout


def test_progress_is_seen(tmp_path: Path) -> None:
    assert progress_mark(tmp_path, "train") == "start"
    (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000020.tmp").mkdir()
    assert progress_mark(tmp_path, "train") == "step_00000010"
    for name in ("sidecar/a.json", "jobs/7.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert progress_mark(tmp_path, "sample") == progress_mark(tmp_path, "pack") == "1 files"
