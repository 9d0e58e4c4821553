"""`hpc-ddpm drill`: short trainings on a cluster that are disturbed on purpose, and must end as if they were not."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hpc_ddpm.checkpoint import step_dirs, step_of
from hpc_ddpm.config import load_config
from hpc_ddpm.errors import ClusterError
from hpc_ddpm.files import write_json
from hpc_ddpm.runlog import package_versions, read_metrics
from launch import slurm
from launch.executor import Request, submit
from launch.profiles import Profile
from launch.records import FOLDER, read_events, read_submissions
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
STEPS, HALF, LAST_BUT_ONE, FAULT = 16, 8, 12, 6
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
    fault: str = ""
    """As `hpc_ddpm.training.faults` takes it."""
    resumes_at: int = 0
    """It is a copy of the undisturbed one; where it must go on."""
    ranks: int = 2
    was_disturbed: bool = field(default=False, init=False)


@dataclass(frozen=True)
class Verdict:
    """How a trial ended."""

    trial: str
    passed: bool
    found: str


def drill(profile: Profile, out: Path, say: Callable[[str], None]) -> list[Verdict]:
    """Run all trials, most at the same time; `out` takes their run directories and the certificate, drill.json.

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
        Trial("killed rank", out / "killed_rank", fault=f"kill@{FAULT}"),
        Trial("NaN", out / "nan", fault=f"nan@{FAULT}"),
        Trial("torn checkpoint", out / "torn_checkpoint", resumes_at=LAST_BUT_ONE),
        Trial("half the ranks", out / "half_the_ranks", resumes_at=HALF, ranks=1),
    ]
    for resumed in (False, True):
        now = [trial for trial in trials if bool(trial.resumes_at) == resumed]
        for trial in now:
            if resumed:
                _copy(trials[0].run, trial)
            _start(trial, profile)
        say(f"{len(now)} jobs submitted; waiting for them")
        _watch(now)
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


def _start(trial: Trial, profile: Profile) -> None:
    from hpc_ddpm.training.faults import VARIABLE

    nodes, per_node = (1, trial.ranks) if profile.gpus_per_node >= trial.ranks else (trial.ranks, 1)
    settings = [*SETTINGS, f"training.num_steps={STEPS}", "--quiet"]
    command = ("train", "--out", str(trial.run), "--data", str(trial.run.parent / "packed"), *settings)
    environment = profile.environment | {VARIABLE: trial.fault}
    changed = profile.model_copy(update={"time": LIMIT, "environment": environment})
    submit(Request("train", command, trial.run, changed, 0, nodes, per_node))


def _watch(trials: Sequence[Trial]) -> None:
    """Wait until all trials have ended; send their signals to those that have begun to train."""
    while True:
        try:
            jobs = [look(read_submissions(trial.run)[-1:])[0] for trial in trials]
        except ClusterError:  # SLURM is busy
            time.sleep(POLL_S)
            continue
        for trial, job in zip(trials, jobs, strict=True):
            if trial.signals and not trial.was_disturbed and job.live and any(read_metrics(trial.run)):
                trial.was_disturbed = True
                with suppress(ClusterError):  # it has just ended; the verdict will say so
                    for signal in trial.signals:
                        slurm.ask("scancel", f"--signal={signal}", f"{job.submission.job_id}.0")
        if not any(job.live for job in jobs):
            return
        time.sleep(POLL_S)


def _copy(undisturbed: Path, trial: Trial) -> None:
    """The run, with another last byte in every checkpoint after the one where it shall go on."""
    shutil.copytree(undisturbed, trial.run, ignore=shutil.ignore_patterns(FOLDER))
    for folder in step_dirs(trial.run / "checkpoints"):
        if step_of(folder) > trial.resumes_at:
            piece = max(folder.glob("pieces-*"))
            content = piece.read_bytes()
            piece.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def _judge(trial: Trial, reference: Trial) -> Verdict:
    submissions = read_submissions(trial.run)
    job = look(submissions[-1:])[0]
    events = [event for submission in submissions for event in read_events(trial.run, submission.job_id)]
    codes = [event["code"] for event in events if event["event"] == "end"]
    rows = list(read_metrics(trial.run))
    losses, wanted = [row["loss"] for row in rows], [row["loss"] for row in read_metrics(reference.run)]
    same = [math.isclose(one, other, rel_tol=TOLERANCE) for one, other in zip(losses, wanted, strict=False)]
    found = f"{job.in_words}, exit codes {codes}, {sum(same)} of {STEPS} losses as undisturbed"
    if trial.fault.startswith("nan"):
        skipped = [row["step"] for row in rows if row.get("skipped_steps")]
        before, after = same[: FAULT - 1], losses[FAULT:]
        is_skipped = skipped == [FAULT] and all(before) and len(losses) == STEPS and all(map(math.isfinite, after))
        found = f"{job.in_words}, steps {skipped} skipped, {sum(before)} of {FAULT - 1} losses before as undisturbed"
        return Verdict(trial.name, job.in_words == DONE and is_skipped, found)
    if (trial.signals or trial.fault) and len(codes) < 2:
        return Verdict(trial.name, False, f"{found}; it ended before it could be disturbed")
    log = job.submission.log(job.submission.job_id)
    if trial.resumes_at and f"went on from step {trial.resumes_at})" not in log.read_text(encoding="utf-8"):
        return Verdict(trial.name, False, f"{found}; it did not go on from step {trial.resumes_at}, see {log}")
    return Verdict(trial.name, job.in_words == DONE and len(losses) == sum(same) == STEPS, found)
