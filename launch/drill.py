"""`hpc-ddpm drill`: short trainings on a cluster that are disturbed on purpose, and must end as if they were not."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hpc_ddpm.config import load_config
from hpc_ddpm.errors import ClusterError
from hpc_ddpm.files import write_json
from hpc_ddpm.runlog import package_versions, read_metrics
from launch import slurm
from launch.executor import Request, submit
from launch.profiles import Profile
from launch.records import read_events, read_submissions
from launch.watch import DONE, look

SETTINGS = (
    "data.size=[16,16,16]",
    "data.num_workers=0",
    "model.base_channels=8",
    "model.num_groups=4",
    "model.channel_multipliers=[1,2]",
    "training.global_batch=4",
    "training.learning_rate=1e-4",
    "training.precision=fp32",
    "training.zero_stage=2",
    "training.log_every_steps=1",
    "training.checkpoint_every_steps=4",
)
STEPS, HALF = 16, 8
TOLERANCE = 1e-3
"""Relative, of every loss: another number of ranks rounds otherwise."""
LIMIT = "0:15:00"
POLL_S = 1.0


@dataclass
class Trial:
    """One training, and how it is disturbed."""

    name: str
    run: Path
    signals: tuple[str, ...] = ()
    """Sent to its ranks at work; STOP first, so that they do not end in the meantime."""
    resumes_at: int = 0
    """It ends after HALF steps and is started again; where it must go on: earlier if the newest checkpoint is torn."""
    ranks_after: int = 2
    """Of the second half."""
    was_disturbed: bool = field(default=False, init=False)


@dataclass(frozen=True)
class Verdict:
    """How a trial ended."""

    trial: str
    passed: bool
    found: str


def drill(profile: Profile, out: Path, say: Callable[[str], None]) -> list[Verdict]:
    """Run all trials at the same time; `out` takes their run directories and the certificate, drill.json.

    Raises:
        ClusterError: SLURM refuses, or `out` is not empty.
    """
    if profile.executor != "slurm":
        raise ClusterError(f"a drill needs a SLURM profile, this one is {profile.executor}")
    if out.exists() and any(out.iterdir()):
        raise ClusterError(f"{out} is not empty; choose another --out")
    _write_data(out)
    trials = [
        Trial("undisturbed", out / "undisturbed"),
        Trial("signal before the time limit", out / "signal", signals=("STOP", "USR2", "CONT")),
        Trial("killed rank", out / "killed_rank", signals=("STOP", "KILL")),
        Trial("torn checkpoint", out / "torn_checkpoint", resumes_at=HALF // 2),
        Trial("half the ranks", out / "half_the_ranks", resumes_at=HALF, ranks_after=1),
    ]
    for trial in trials:
        _start(trial, profile, HALF if trial.resumes_at else STEPS, 2)
    say(f"{len(trials)} jobs of 2 ranks submitted; waiting for them")
    _watch(trials)
    halves = [trial for trial in trials if trial.resumes_at]
    for trial in halves:
        if trial.resumes_at < HALF:
            _tear(trial.run)
        _start(trial, profile, STEPS, trial.ranks_after)
    _watch(halves)
    verdicts = [_judge(trial, trials[0]) for trial in trials]
    record = {"profile": profile.model_dump(mode="json"), "versions": package_versions(), "created": time.time()}
    write_json(out / "drill.json", record | {"trials": [asdict(verdict) for verdict in verdicts]}, indent=2)
    return verdicts


def _write_data(out: Path) -> None:
    from hpc_ddpm.data.pack import pack
    from hpc_ddpm.data.phantom import write_phantoms

    data = load_config(None, SETTINGS).config.data
    source = out / "source"
    write_phantoms(source, 8, data.size, seed=0, modalities=data.modalities, labels=data.labels)
    pack(source, out / "packed", data)


def _start(trial: Trial, profile: Profile, num_steps: int, ranks: int) -> None:
    nodes, per_node = (1, ranks) if profile.gpus_per_node >= ranks else (ranks, 1)
    settings = [*SETTINGS, f"training.num_steps={num_steps}", "--quiet"]
    command = ("train", "--out", str(trial.run), "--data", str(trial.run.parent / "packed"), *settings)
    limited = profile.model_copy(update={"time": LIMIT})
    submit(Request("train", command, trial.run, limited, 0, nodes, per_node))


def _watch(trials: Sequence[Trial]) -> None:
    """Until all have ended; those that wait for a signal get it once they train."""
    while True:
        jobs = [look(read_submissions(trial.run)[-1:])[0] for trial in trials]
        for trial, job in zip(trials, jobs, strict=True):
            if trial.signals and not trial.was_disturbed and job.live and any(read_metrics(trial.run)):
                trial.was_disturbed = True
                with suppress(ClusterError):  # it has just ended; the verdict will say so
                    for signal in trial.signals:
                        slurm.ask("scancel", f"--signal={signal}", f"{job.submission.job_id}.0")
        if not any(job.live for job in jobs):
            return
        time.sleep(POLL_S)


def _tear(run: Path) -> None:
    """Change the last byte of the newest checkpoint."""
    piece = max(run.glob("checkpoints/step_*/pieces-*"))
    content = piece.read_bytes()
    piece.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def _judge(trial: Trial, reference: Trial) -> Verdict:
    submissions = read_submissions(trial.run)
    job = look(submissions[-1:])[0]
    events = [event for submission in submissions for event in read_events(trial.run, submission.job_id)]
    codes = [event["code"] for event in events if event["event"] == "end"]
    losses, wanted = ([row["loss"] for row in read_metrics(each.run)] for each in (trial, reference))
    same = sum(math.isclose(one, other, rel_tol=TOLERANCE) for one, other in zip(losses, wanted, strict=False))
    found = f"{job.in_words}, exit codes {codes}, {same} of {STEPS} losses as undisturbed"
    if trial.signals and len(codes) < 2:
        return Verdict(trial.name, False, f"{found}; it ended before it could be disturbed")
    log = job.submission.log(job.submission.job_id)
    if trial.resumes_at and f"went on from step {trial.resumes_at})" not in log.read_text(encoding="utf-8"):
        return Verdict(trial.name, False, f"{found}; it did not go on from step {trial.resumes_at}, see {log}")
    return Verdict(trial.name, job.in_words == DONE and len(losses) == same == STEPS, found)
