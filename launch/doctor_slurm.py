"""What `hpc-ddpm doctor` asks SLURM: does this cluster have what the profile asks, and let the user have it?"""

from __future__ import annotations

import re
from collections.abc import Iterator

from hpc_ddpm.errors import ClusterError
from launch import slurm
from launch.doctor_limits import account_limits, partition_limits
from launch.finding import Finding
from launch.profiles import Profile


def look_at_slurm(profile: Profile | None) -> Iterator[Finding]:
    """Its settings, and whether it has what the profile asks."""
    is_needed = profile is not None and profile.executor == "slurm"
    try:
        text = slurm.ask("scontrol", "show", "config")
    except ClusterError as error:
        advice = "use a login node; elsewhere only --cluster local works"
        yield Finding("slurm", "fail" if is_needed else "warn", str(error), advice)
        return
    settings = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", text, re.MULTILINE))
    yield Finding("slurm", "pass", f"{settings.get('SLURM_VERSION')}, cluster {settings.get('ClusterName')}")
    asked = profile if is_needed else None
    if asked and not asked.partition:
        asked = asked.model_copy(update={"partition": _default_partition()})
    limits = [lambda: account_limits(asked, settings)] if asked else []
    for check in (lambda: _partitions(asked), *limits, lambda: _restarts(settings)):
        try:
            yield from check()
        except ClusterError as error:
            yield Finding("slurm", "fail", str(error))
    limit = int(settings.get("MaxArraySize", 0))
    yield Finding("arrays", "pass" if limit > 1 else "fail", f"{limit} tasks at most (MaxArraySize)")
    try:
        slurm.ask("sacct", "-n", "-X", "--starttime=now-1hour")
        yield Finding("accounting", "pass", "sacct answers")
    except ClusterError as error:
        advice = "jobs that ended over five minutes ago are known by what they wrote only"
        yield Finding("accounting", "warn", str(error), advice)


def _partitions(profile: Profile | None) -> Iterator[Finding]:
    rows = [line.split("|") for line in slurm.ask("sinfo", "-h", "-o", "%R|%G|%D|%l|%a").splitlines()]
    shown = "; ".join(f"{name}: {nodes} nodes, {gpus}, {limit}" for name, gpus, nodes, limit, _ in rows)
    yield Finding("partitions", "pass", shown)
    if profile is None:
        return
    with_gpus, without = profile.partition.split(","), profile.cpu_partition.split(",")
    for name in dict.fromkeys(filter(None, (*with_gpus, *without))):
        own = [row for row in rows if row[0] == name]
        if not own:
            known = ", ".join(sorted({row[0] for row in rows}))
            yield Finding("profile", "fail", f"no partition {name}", f"one of {known}")
        elif all(row[4] != "up" for row in own):
            yield Finding("profile", "fail", f"partition {name} is down", "choose another one, or wait")
        else:
            yield from _gpus(profile, own, name in with_gpus)
            if name in with_gpus:
                yield from partition_limits(profile, name)


def _default_partition() -> str:
    """Where jobs go that name none; SLURM marks it with a star."""
    try:
        names = slurm.ask("sinfo", "-h", "-o", "%P").split()
    except ClusterError:
        return ""  # the next question says so
    return next((name.removesuffix("*") for name in names if name.endswith("*")), "")


def _gpus(profile: Profile, rows: list[list[str]], are_needed: bool) -> Iterator[Finding]:
    """Type and number of the GPUs of one partition, and of its nodes that have them."""
    name, kind, wanted = rows[0][0], profile.gpu_type, profile.gpus_per_node
    groups = [
        (found_kind, int(count), int(nodes))
        for _, gres, nodes, *_ in rows
        for found_kind, count in re.findall(r"\bgpu(?::([\w.-]+))?:(\d+)", gres)
    ]
    types = sorted({group[0] for group in groups if group[0]})
    right = [group for group in groups if kind.lower() in ("", group[0].lower())]
    most = max((count for _, count, _ in right), default=0)
    large = sum(nodes for _, count, nodes in right if count >= wanted)
    if are_needed and groups and not right:
        there = f"{', '.join(types)}" if types else "GPUs without a type"
        advice = "set gpu_type to one of them (`sinfo -o '%P %G'`)" if types else "leave gpu_type empty"
        yield Finding("profile", "fail", f"{name} has no GPU of type {kind}, it has {there}", advice)
    elif are_needed and most < wanted:
        advice = f"set gpus_per_node to {most} or less"
        yield Finding("profile", "fail", f"{name} has {most} GPUs per node, {wanted} asked", advice)
    elif are_needed and large < profile.nodes:
        advice = f"set nodes to {large} or less"
        found = f"{name} has {large} nodes with {wanted} such GPUs, {profile.nodes} asked"
        yield Finding("profile", "fail", found, advice)
    else:
        yield Finding("profile", "pass", f"partition {name} is up, {most} {kind} GPUs per node".replace("  ", " "))


def _restarts(settings: dict[str, str]) -> Iterator[Finding]:
    if settings.get("JobRequeue") == "1":
        yield Finding("requeue", "pass", "JobRequeue=1: jobs come back after the loss of a node")
    else:
        yield Finding("requeue", "pass", "JobRequeue=0; our jobs ask for it themselves (--requeue)")
    if settings.get("PreemptType", "preempt/none") == "preempt/none":
        yield Finding("preemption", "pass", "off on this cluster")
        return
    both = settings.get("SlurmctldParameters", "") + settings.get("PreemptParameters", "")
    told = "the job's own signal (send_user_signal)" if "send_user_signal" in both else "SIGTERM"
    yield Finding("preemption", "pass", f"{settings['PreemptType']}: announced by {told}; both are handled")
    found = re.findall(
        r"PartitionName=(\S+)[\s\S]*?GraceTime=(\d+)[\s\S]*?PreemptMode=(\S+)",
        slurm.ask("scontrol", "show", "partition"),
    )
    for name, grace_s, mode in found:
        if mode == "REQUEUE" and int(grace_s) == 0:
            advice = "lower training.checkpoint_every_steps there"
            yield Finding("preemption", "warn", f"{name} gives no grace time: work since a checkpoint is lost", advice)
        elif mode == "REQUEUE":
            yield Finding("preemption", "pass", f"{name} gives {grace_s} s to save")
