"""What partition, account and QOS allow, beside what a profile asks: SLURM may queue what is too much for ever."""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launch import slurm
from launch.finding import Finding
from launch.profiles import Profile, seconds_of

PIPELINE_JOBS = 4
"""Jobs that `submit pipeline` queues at once."""
ENFORCED = ("limits", "safe", "qos", "all")
QOS_FIELDS = ("Name", "MaxWall", "MaxTRES", "MaxTRESPU", "GrpTRES", "MaxJobsPU", "MaxSubmitPU")
ACCOUNT_FIELDS = ("Account", "Partition", "QOS", "DefaultQOS", "MaxWall", "MaxTRES", "GrpTRES", "MaxJobs", "MaxSubmit")
Row = Mapping[str, str]


@dataclass(frozen=True)
class Limits:
    """Where they were found, and what they are; an empty text is no limit."""

    place: str
    time: str = ""
    resources: tuple[tuple[str, str], ...] = ()
    """Name of the limit, and `cpu=8,gres/gpu=4`."""
    jobs: str = ""
    """Most jobs of one user that run at a time."""
    queued: str = ""
    """Jobs and array tasks that are queued or run, of one user."""


# -------------------------------------------------------------------------------------------------- partitions


def partition_limits(profile: Profile, name: str) -> Iterator[Finding]:
    """Check the limits of one partition for GPU jobs: time, nodes, cores, memory, and who may use it."""
    text = slurm.ask("scontrol", "show", "partition", "--oneliner", name)
    facts = dict(re.findall(r"(\w+)=(\S*)", text))
    yield from _too_long(profile, f"partition {name}", facts.get("MaxTime", ""))
    most, least = facts.get("MaxNodes", ""), facts.get("MinNodes", "")
    if most.isdigit() and profile.nodes > int(most):
        yield Finding("limits", "fail", f"partition {name} takes jobs of {most} nodes at most, {profile.nodes} asked")
    if least.isdigit() and profile.nodes < int(least):
        yield Finding("limits", "fail", f"partition {name} takes jobs of {least} nodes or more, {profile.nodes} asked")
    for kind, own in (("Accounts", profile.account), ("Qos", profile.qos)):
        allowed, denied = (facts.get(f"{verb}{kind}", "").split(",") for verb in ("Allow", "Deny"))
        if own and ((allowed not in ([""], ["ALL"]) and own not in allowed) or own in denied):
            found = f"partition {name} is not open to {'account' if kind == 'Accounts' else 'QOS'} {own}"
            yield Finding("limits", "fail", found, "choose another of the two")
    yield from _node_size(profile, name)


def _node_size(profile: Profile, name: str) -> Iterator[Finding]:
    """Cores and memory of its largest node."""
    rows = [line.split("|") for line in slurm.ask("sinfo", "-h", "-N", "-p", name, "-o", "%c|%m").splitlines()]
    sizes = [(int(cores), int(megabytes)) for cores, megabytes in rows]
    cores = profile.cpus_per_gpu * profile.gpus_per_node
    memory_mb = _megabytes(profile.memory(profile.gpus_per_node))
    if sizes and cores > (most := max(size[0] for size in sizes)):
        advice = f"set cpus_per_gpu to {max(1, most // profile.gpus_per_node)} or less"
        yield Finding("limits", "fail", f"partition {name} has {most} cores per node, {cores} asked", advice)
    if sizes and memory_mb > (most := max(size[1] for size in sizes)):
        advice = f"set memory_per_gpu to {most // profile.gpus_per_node}M or less"
        yield Finding("limits", "fail", f"partition {name} has {most} MB per node, {memory_mb} MB asked", advice)


def _megabytes(memory: str) -> int:
    return int(memory[:-1] or 0) * {"": 0, "M": 1, "G": 1024, "T": 1024**2}[memory[-1:]]


def _too_long(profile: Profile, place: str, most: str) -> Iterator[Finding]:
    limit_s = seconds_of(most)
    if limit_s is not None and profile.limit_s > limit_s:
        advice = f"set time to {most} or less; a job that needs more goes on by itself"
        yield Finding("limits", "fail", f"{place} ends jobs after {most}, {profile.time} asked", advice)


# -------------------------------------------------------------------------------------------- accounts and QOS


def account_limits(profile: Profile, settings: Mapping[str, str]) -> Iterator[Finding]:
    """Check the limits of this user's account, and of the QOS that jobs of this profile get.

    Raises:
        ClusterError: the accounting does not answer.
    """
    if not any(word in settings.get("AccountingStorageEnforce", "none") for word in ENFORCED):
        yield Finding("limits", "pass", "this cluster enforces no limits of accounts and QOS")
        return
    user = getpass.getuser()
    accounts = _table("assoc", ACCOUNT_FIELDS, f"user={user}")
    own = [row for row in accounts if profile.account in ("", row["Account"])]
    own = [row for row in own if row["Partition"] in ("", *profile.partition.split(","))] or own
    if not own:
        yours = ", ".join(sorted({row["Account"] for row in accounts})) or "none"
        yield Finding("limits", "fail", f"{user} has no account {profile.account}".rstrip(), f"yours: {yours}")
        return
    known = {row["Name"]: row for row in _table("qos", QOS_FIELDS)}
    open_to, name = own[0]["QOS"].split(","), profile.qos or own[0]["DefaultQOS"] or "normal"
    if profile.qos and (name not in known or name not in open_to):
        yield Finding(
            "limits", "fail", f"QOS {name} is not open to account {own[0]['Account']}", f"use {', '.join(open_to)}"
        )
        return
    names = dict.fromkeys([name, *_partition_qos(profile)])
    limits = [_of_qos(known[each]) for each in names if each in known]
    found = [finding for one in (*limits, _of_account(own[0])) for finding in _compare(profile, one)]
    yield from found or [Finding("limits", "pass", f"account {own[0]['Account']} and QOS {', '.join(names)} allow it")]


def _table(what: str, fields: tuple[str, ...], *where: str) -> list[Row]:
    text = slurm.ask("sacctmgr", "-nP", "show", what, *where, f"format={','.join(fields)}")
    return [dict(zip(fields, line.split("|"), strict=False)) for line in text.splitlines()]


def _partition_qos(profile: Profile) -> Iterator[str]:
    """Partitions may have a QOS of their own, whose limits hold besides."""
    for name in filter(None, profile.partition.split(",")):
        found = re.search(r"\bQoS=(\S+)", slurm.ask("scontrol", "show", "partition", "--oneliner", name))
        if found and found.group(1) != "N/A":
            yield found.group(1)


def _of_qos(row: Row) -> Limits:
    resources = (("MaxTRESPerJob", "MaxTRES"), ("MaxTRESPerUser", "MaxTRESPU"), ("GrpTRES", "GrpTRES"))
    named = tuple((shown, row[field]) for shown, field in resources)
    return Limits(f"QOS {row['Name']}", row["MaxWall"], named, row["MaxJobsPU"], row["MaxSubmitPU"])


def _of_account(row: Row) -> Limits:
    named = (("MaxTRESPerJob", row["MaxTRES"]), ("GrpTRES", row["GrpTRES"]))
    return Limits(f"account {row['Account']}", row["MaxWall"], named, row["MaxJobs"], row["MaxSubmit"])


def _compare(profile: Profile, limits: Limits) -> Iterator[Finding]:
    """Findings where the profile exceeds the limits, or where jobs will be slower than it says."""
    yield from _too_long(profile, limits.place, limits.time)
    gpus = profile.nodes * profile.gpus_per_node
    asked = {"gres/gpu": gpus, "node": profile.nodes, "cpu": gpus * profile.cpus_per_gpu}
    if profile.gpu_type:
        asked[f"gres/gpu:{profile.gpu_type}"] = gpus
    for name, text in limits.resources:
        for resource, most in re.findall(r"([\w/:.-]+)=(\d+)(?![\dA-Z])", text):
            if asked.get(resource, 0) > int(most):
                found = f"{limits.place} allows {resource}={most} ({name}), {asked[resource]} asked"
                yield Finding("limits", "fail", found, "ask for fewer, or the site for another QOS")
    at_a_time = profile.array_parallelism
    if limits.queued.isdigit() and int(limits.queued) < max(PIPELINE_JOBS, at_a_time):
        found = f"{limits.place} takes {limits.queued} jobs and array tasks of a user at a time (MaxSubmitJobs)"
        advice = f"give `submit sample` --tasks {limits.queued} or less; a pipeline queues {PIPELINE_JOBS} jobs"
        yield Finding("limits", "warn", found, advice)
    if limits.jobs.isdigit() and int(limits.jobs) < at_a_time:
        found = f"{limits.place} runs {limits.jobs} jobs of a user at a time (MaxJobs), array_parallelism={at_a_time}"
        yield Finding("limits", "warn", found, "arrays take longer than the profile says")
