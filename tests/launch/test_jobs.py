"""What the run directory tells of a job, long after it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch.after_job import progress_mark
from launch.jobs_tables import describe
from launch.ledger import time_ledger
from launch.profiles import load_profile
from launch.records import Submission, add_event, find_runs, read_events, read_submissions
from launch.watch import look


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
    assert [state.state for state in job.tasks.values()] == ["COMPLETED", "FAILED", "UNKNOWN"]
    assert job.unfinished == ["7_1", "7_2"]


def test_where_the_time_went(tmp_path: Path) -> None:
    """Queued 10 s, ran 30 s; the node was lost and it ran 20 s more; queued 5 s, runs for 15 s."""
    for kind, time in (("start", 110), ("start", 140), ("end", 160), ("start", 165)):
        add_event(tmp_path, "7", {"event": kind, "time": time, "restarts": 0})
    rows = [{"step": 1}, {"step": 2, "step_time_s": 10.0, "data_wait_share": 0.25, "checkpoint_stall_s": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "lost.jsonl").write_text(json.dumps({"step": 2, "step_time_s": 3.0, "data_wait_share": 0}) + "\n")
    assert time_ledger([submission(tmp_path)], ["7"], now=180.0) == {
        "queued": 15,
        "running": 65,
        "computing": 14,
        "waiting_for_data": 5,
        "saving": 1,
        "lost_steps": 3,
        "starting": 42,
    }


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


def test_progress_is_seen(tmp_path: Path) -> None:
    assert progress_mark(tmp_path, "train") == "start"
    (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000020.tmp").mkdir()
    assert progress_mark(tmp_path, "train") == "step_00000010"
    for name in ("sidecar/a.json", "jobs/7.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert progress_mark(tmp_path, "sample") == progress_mark(tmp_path, "pack") == "1 files"
