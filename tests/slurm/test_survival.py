"""Trainings side by side on the cluster, each disturbed in another way: all end with the losses of one left alone.

The drill (`test_submit.py`) adds a rank that is killed and `scancel --signal=USR2`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from launch.profiles import list_profiles
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.runs import ROUNDING, STEPS, files, losses, shown, submitted

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

BEFORE = 7
"""Steps, one checkpoint among them, before it is disturbed."""


def preempt(cluster: Cluster, job: str, out: Path) -> None:
    """The site sends SIGCONT and SIGTERM."""
    first = ["-N2", f"--nodelist={cluster.job(job)['NodeList']}", "--gpus-per-node=2", "--wrap=true"]
    cluster.sbatch(*first, cwd=out)


def reach_the_time_limit(cluster: Cluster, job: str, out: Path) -> None:
    """SLURM looks every 30 seconds whether it is time for the signal; on a slow machine it may have come already."""
    wait_for(
        lambda: cluster.job(job)["Restarts"] != "0" or cluster.is_pending(job, signal.SIGUSR2),
        lambda: str(cluster.job(job)),
    )
    cluster.attempt("scancel", "--signal=CONT", job)


def terminate(cluster: Cluster, job: str, out: Path) -> None:
    for name in ("TERM", "CONT"):
        cluster.run("scancel", f"--signal={name}", job)


def requeue(cluster: Cluster, job: str, out: Path) -> None:
    cluster.run("scontrol", "requeue", job)


def hang(cluster: Cluster, job: str, out: Path) -> None:
    os.kill(cluster.ranks(job)[0], signal.SIGCONT)


def lose_the_node(cluster: Cluster, job: str, out: Path) -> None:
    """Its slurmd and all that it has started."""
    cluster.kill_node(cluster.job(job)["BatchHost"])


@dataclass(frozen=True)
class Disturbed:
    """A training, what is done to it, and the words in which the log tells of it."""

    disturb: Callable[[Cluster, str, Path], None]
    why: str
    nodes: int = 1
    ranks_per_node: int = 2
    options: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    profile: tuple[tuple[str, object], ...] = ()


RUNS = {
    "preempted": Disturbed(preempt, "stopped by SIGTERM at step", nodes=2),
    "time limit": Disturbed(
        reach_the_time_limit,
        "stopped by SIGUSR2 at step",
        options=("--time", "0:02:00"),
        profile=(("signal_delay_s", 60),),
    ),
    "lost node": Disturbed(lose_the_node, "", nodes=2, ranks_per_node=1, profile=(("sbatch", {"exclusive": True}),)),
    "hanging rank": Disturbed(hang, "a rank hung, see stacks-of-rank-*.txt", settings=("training.hang_timeout_s=10",)),
    "SIGTERM": Disturbed(terminate, "stopped by SIGTERM at step"),
    "scontrol requeue": Disturbed(requeue, "", ranks_per_node=1),
}


Runs = dict[str, Future[tuple[Path, str]]]
"""Run directory and log of each test that was chosen."""


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, cluster: Cluster, tiny_packed: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    """By and by. Only what preempts is in the partition `gpu`."""
    folder = tmp_path_factory.mktemp("survival")
    cluster.up("--no-user-signal")

    def run(name: str) -> tuple[Path, str]:
        case, out = RUNS[name], folder / name.replace(" ", "_")
        profile = folder / f"{out.name}.yaml"
        base = yaml.safe_load(list_profiles()["devcluster"].read_text())
        profile.write_text(yaml.safe_dump(base | {"partition": "scavenge"} | dict(case.profile)))
        shape = ["--nodes", str(case.nodes), "--gpus-per-node", str(case.ranks_per_node), *case.options]
        words = ["--out", out, "--data", tiny_packed, *STEPS, "training.zero_stage=2", *case.settings]
        job = submitted(cluster, "train", "--cluster", profile, *shape, *words)
        before = 1 if case.disturb is reach_the_time_limit else BEFORE  # it may come earlier on a slow machine
        wait_for(lambda: len(losses(out)) >= before, lambda: f"{name}: {shown(cluster, out)}", timeout_s=500)
        cluster.attempt("scancel", "--signal=STOP", job)  # so that it does not end in the meantime
        if case.disturb is not reach_the_time_limit:
            wait_for(lambda: cluster.are_stopped(job), lambda: f"{name}: {cluster.job(job)}")
        case.disturb(cluster, job, out)
        return out, cluster.run("hpc-ddpm", "jobs", "logs", "-f", out, timeout_s=500)

    own = (item for item in request.session.items if item.path == request.path and hasattr(item, "callspec"))
    names = [item.callspec.params["name"] for item in own]
    with ThreadPoolExecutor(len(names)) as threads:
        yield {name: threads.submit(run, name) for name in names}
    cluster.up()  # the lost node comes back


@pytest.mark.parametrize("name", list(RUNS))
def test_it_ends_as_if_nothing_had_been(cluster: Cluster, runs: Runs, alone: Path, name: str) -> None:
    (out, said), case = runs[name].result(), RUNS[name]
    facts = shown(cluster, out)
    events = next(iter(facts["tasks"].values()))["events"]
    assert facts["state"] == "COMPLETED", events
    assert facts["restarts"] >= 1
    assert facts["ranks"] == case.nodes * case.ranks_per_node
    assert case.why in said
    assert "trained to step 40 (went on from step" in said
    assert losses(out) == pytest.approx(losses(alone), rel=ROUNDING)
    asked = [event for event in events if event.get("comes_back")]
    assert [event["requeued"] for event in events if event["event"] == "requeue"] == [True] * len(asked)
    assert bool(asked) == bool(case.why)
    if name == "hanging rank":
        assert "nothing was done in the 10 s (training.hang_timeout_s) after step" in said


def test_a_crash_loop_ends_with_the_reason(cluster: Cluster, tiny_packed: Path, tmp_path: Path) -> None:
    out, profile = tmp_path / "run", tmp_path / "two_crashes.yaml"
    base = yaml.safe_load(list_profiles()["devcluster"].read_text())
    profile.write_text(yaml.safe_dump(base | {"max_crashes": 2}))
    words = ["--out", out, "--data", tiny_packed, *STEPS, "training.num_steps=100000"]
    job = submitted(cluster, "train", "--cluster", profile, *words)
    for restarts in ("0", "1"):
        wait_for(
            lambda start=restarts: cluster.job(job)["Restarts"] == start and cluster.ranks(job),
            lambda: str(cluster.job(job)),
        )
        os.kill(cluster.ranks(job)[0], signal.SIGKILL)
    said = cluster.run("hpc-ddpm", "jobs", "logs", "-f", out, timeout_s=300)
    assert "2 starts in a row without progress, the last: " in said
    assert (shown(cluster, out)["state"], cluster.job(job)["Restarts"]) == ("FAILED", "1")


def test_what_slurm_does_not_requeue_is_not_called_so(cluster: Cluster, tiny_packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["--out", out, "--data", tiny_packed, *STEPS, "training.num_steps=100000"]
    job = submitted(cluster, "train", "--cluster", "devcluster", *words)
    wait_for(lambda: bool(losses(out)), lambda: str(shown(cluster, out)))
    cluster.run("scontrol", "update", f"JobId={job}", "Requeue=0")
    os.kill(cluster.ranks(job)[0], signal.SIGKILL)
    cluster.run("hpc-ddpm", "jobs", "logs", "-f", out, timeout_s=300)
    assert (shown(cluster, out)["state"], cluster.job(job)["Restarts"]) == ("FAILED", "0")
    assert f"not requeued: SLURM said: Requested operation is presently disabled for job {job}" in cluster.run(
        "hpc-ddpm", "jobs", "show", out
    )


def test_preempted_tasks_of_an_array_come_back(
    cluster: Cluster, alone: Path, sampled_alone: dict[str, bytes], tmp_path: Path
) -> None:
    """They give back the volumes that they had begun."""
    cluster.up()  # a node that another test lost comes back
    out, profile = tmp_path / "out", tmp_path / "scavenge.yaml"
    base = yaml.safe_load(list_profiles()["devcluster"].read_text())
    profile.write_text(yaml.safe_dump(base | {"partition": "scavenge"}))
    words = [alone, "--out", out, "sampling.replicas=2"]
    job = submitted(cluster, "sample", "--cluster", profile, "--tasks", "2", *words)
    tasks = [f"{job}_0", f"{job}_1"]
    ids = {task: cluster.job(task)["JobId"] for task in tasks}
    wait_for(lambda: all(cluster.ranks(ids[task]) for task in tasks), lambda: str(shown(cluster, out)))
    cluster.attempt("scancel", "--signal=STOP", job)  # so that they do not end in the meantime
    wait_for(lambda: all(cluster.are_stopped(ids[task]) for task in tasks), lambda: str(shown(cluster, out)))
    first = cluster.sbatch("-N4", "--exclusive", "--gpus-per-node=2", "--wrap=true", cwd=tmp_path)
    cluster.run("hpc-ddpm", "jobs", "wait", out, timeout_s=500)
    cluster.wait(first, tmp_path)
    facts = shown(cluster, out)
    assert facts["restarts"] == 2
    assert files(out, "t1/*.nii.gz") == sampled_alone
    assert not (out / ".sample").exists()
