"""From measured points to curves: efficiency, ratios to DDP, and where the time goes as it drops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from hpc_ddpm.benchmark.figures import make_row
from hpc_ddpm.benchmark.record import table
from hpc_ddpm.benchmark.scaling.race import DDP
from hpc_ddpm.benchmark.timing import Spread, spread
from hpc_ddpm.config import Config
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.model.gpus import peak_flops

PARTS = ("compute", "optimizer", "communication", "data", "checkpoint", "host")
COMPUTE = ("conv", "norm", "attention", "up/down")
Row = dict[str, Any]


def config_at(config: Config, gpus: int, mode: str) -> Config:
    """The configuration of one point.

    Args:
        config: its `training.global_batch` is of one GPU (weak) or of all together (strong).
        gpus: ranks of the point.
        mode: weak or strong.

    Raises:
        ConfigError: the batch cannot be divided among so many; or the curve would not keep one setting.
    """
    if config.model.activation_checkpointing == "auto":
        raise ConfigError("a curve has one setting for all points: set model.activation_checkpointing, `auto` may vary")
    batch = config.training.global_batch * (gpus if mode == "weak" else 1)
    config = config.model_copy(update={"training": config.training.model_copy(update={"global_batch": batch})})
    config.training.accumulation(gpus)
    return config


def measured_rows(
    results: Mapping[int, Sequence[Mapping[str, Any]]], config: Config, mode: str, per_node: int, price: float | None
) -> list[Row]:
    """A row for each number of GPUs and contestant.

    Args:
        results: of every number of GPUs, what its ranks found in each round.
        config: of one GPU; see `config_at`.
        mode: weak or strong.
        per_node: GPUs of a node.
        price: of a GPU-hour.
    """
    rows = [
        _row(gpus, name, rounds, config_at(config, gpus, mode), per_node, price)
        for gpus, rounds in sorted(results.items())
        for name in [found["contestant"] for found in rounds[0]["rows"]]
    ]
    for row in rows:
        same = [other for other in rows if other["contestant"] == row["contestant"]]
        base = same[0]
        row["base_gpus"] = base["gpus"]
        row["efficiency"] = _ratio(base, row)
        node = next((other for other in same if other["gpus"] == per_node), None)
        row["efficiency_of_node"] = _ratio(node, row) if node and row["gpus"] > per_node else None
        ddp = next((other for other in rows if other["gpus"] == row["gpus"] and other["contestant"] == DDP), None)
        row["times_ddp"] = _ratio(row, ddp) if ddp else None
        row["lost_to"] = {part: row["parts_s"][part] - base["parts_s"][part] for part in PARTS}
    return rows


def _row(
    gpus: int, name: str, rounds: Sequence[Mapping[str, Any]], config: Config, per_node: int, price: float | None
) -> Row:
    per_rank = config.training.global_batch / gpus
    found = [next(row for row in each["rows"] if row["contestant"] == name) for each in rounds]
    turns_s = [[step_s / per_rank for step_s in row["step_s"]] for row in found]
    samples = [seconds for turns in turns_s for seconds in turns]
    first = rounds[0]
    row = make_row(
        "train",
        config,
        first["precision"],
        samples,
        first["ceilings"],
        peak_flops(first["device"], first["precision"]),
        excluded=0,
        price=price,
        joules_per_volume=None,
        policy=config.model.activation_checkpointing,
        device=first["device"],
        kind="measured",
        gpus=gpus,
        nodes=-(-gpus // per_node),
        contestant=name,
        global_batch=config.training.global_batch,
        volumes_per_s=gpus / median(samples),
    )
    del row["samples_s"]
    every = config.training.checkpoint_every_steps
    stalls = [each["checkpoint_stall_s"] for each in found if "checkpoint_stall_s" in each]
    stall_s = median(stalls) if stalls else 0.0
    wait_share = fmean(share for each in found for share in each["data_wait_share"])
    return row | {
        "turns_s": turns_s,
        "round_s": [median(turns) for turns in turns_s],
        "data_wait_share": wait_share,
        "communication_share": fmean(each["shares"]["communication"] for each in found),
        "host_overhead_share": fmean(each["shares"]["other"] for each in found),
        "checkpoint_stall_s": stall_s,
        "checkpoint_gib": found[0].get("checkpoint_gib"),
        "loss": found[0].get("loss"),
        "read_s": median(each["read_s"] for each in found),
        "parts_s": _parts_s(found, median(samples), wait_share, stall_s / every / per_rank),
    }


def _parts_s(found: Sequence[Row], seconds: float, wait_share: float, stall_s: float) -> dict[str, float]:
    """Seconds of a volume on one GPU; of communication, what no other part hides."""
    shares = {part: fmean(each["shares"][part] for each in found) for part in found[0]["shares"]}
    compute = sum(shares[part] for part in COMPUTE)
    known = compute + shares["optimizer"] + shares["other"] + wait_share
    exposed = max(0.0, min(shares["communication"], 1 - known))
    scale = seconds / max(known + exposed, 1e-9)
    return {
        "compute": compute * scale,
        "optimizer": shares["optimizer"] * scale,
        "communication": exposed * scale,
        "data": wait_share * scale,
        "checkpoint": stall_s,
        "host": shares["other"] * scale,
    }


def _ratio(above: Row, below: Row) -> Spread:
    """Ratio of times: turn by turn where both rows took turns in the same race, else round by round."""
    pairs = zip(above["round_s"], below["round_s"], strict=True)
    if above["gpus"] == below["gpus"]:
        turns = [[second for turns in row["turns_s"] for second in turns] for row in (above, below)]
        pairs = zip(*turns, strict=True)
    return spread([first / second for first, second in pairs])


def curve_table(rows: Sequence[Row]) -> str:
    """What was measured and predicted, in Markdown."""
    header = ["GPUs", "nodes", "engine", "volumes/s", "per GPU", "efficiency", "of one node", "time / DDP"]
    lines = []
    for row in rows:
        name = row["contestant"] + (" (prediction)" if row["kind"] == "predicted" else "")
        line = [str(row["gpus"]), str(row["nodes"]), name]
        line += [f"{row['volumes_per_s']:.4g}", f"{row['volumes_per_s_per_gpu']:.4g}"]
        line += [_spread(row.get(key), kind) for key, kind in (("efficiency", "%"), ("efficiency_of_node", "%"))]
        lines.append([*line, _spread(row.get("times_ddp"), "f")])
    return table(header, lines)


def _spread(found: Spread | None, kind: str) -> str:
    if found is None:
        return ""
    middle, low, high = (
        f"{found[key]:.0%}" if kind == "%" else f"{found[key]:.3f}" for key in ("median", "p10", "p90")
    )
    return f"{middle} ({low} to {high})" if (low, high) != (middle, middle) else middle


def parts_table(rows: Sequence[Row]) -> str:
    """Milliseconds of a volume on one GPU by part."""
    lines = [
        [str(row["gpus"]), row["contestant"], *(f"{1e3 * row['parts_s'][part]:.3g}" for part in PARTS)]
        for row in rows
        if row["kind"] == "measured"
    ]
    return table(["GPUs", "engine", *(f"{part} ms" for part in PARTS)], lines)


def sentences(rows: Sequence[Row]) -> list[str]:
    """Where the time goes as efficiency drops, worst part first."""
    said = []
    for row in rows:
        if row["kind"] != "measured" or row["gpus"] == row["base_gpus"]:
            continue
        lost = {part: seconds for part, seconds in row["lost_to"].items() if seconds > 0}
        total = sum(lost.values())
        worst = [part for part in sorted(lost, key=lambda part: -lost[part])[:3] if lost[part] > 0.01 * total]
        where = ", ".join(f"{part} {lost[part] / total:.0%}" for part in worst) or "nothing"
        said.append(
            f"{row['contestant']} on {row['gpus']} GPUs keeps {row['efficiency']['median']:.0%} of the speed per GPU "
            f"of {row['base_gpus']}; the added time is {where}."
        )
    return said
