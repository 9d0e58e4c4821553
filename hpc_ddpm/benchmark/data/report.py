"""The report of `bench data` as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hpc_ddpm.benchmark.data.contestants import NETWORK, OURS, STORED
from hpc_ddpm.benchmark.data.run import CACHES
from hpc_ddpm.benchmark.record import Report, describe, table

Rows = list[dict[str, Any]]
STAGES = {
    STORED: "Ready to be sent to a GPU: int16 image and uint8 mask, decoded",
    NETWORK: "Ready for the network on the CPU: float32 image, one float32 channel per label",
}
HOW = (
    "All contestants read the same subject in turns, in one run; times are medians with 10th and 90th percentile, "
    "ratios are of medians. Written: in the operating system's cache as the writer left them, in the large pages "
    "that fresh files get. Cold: open, but dropped from the cache before every read with `posix_fadvise(DONTNEED)`; a "
    "disk's or a hypervisor's own cache may still help. Warm: in the cache as the contestant's own last cold read left "
    "them, as in every epoch after the first. CPU is the time of all "
    "threads of the process. MB/s counts the decoded integers. Workers are threads for hpc_ddpm and processes of "
    "torch's DataLoader for the others; 0 is the loader without any, and the first volume of every worker is not "
    "counted. A memory map is made anew for each read, as for every new subject of a dataset; `kept` reads the same "
    "pages again and again, which no training does, and bounds what is possible."
)


def to_markdown(report: Report) -> str:
    """A page with all figures."""
    settings = report["settings"]
    parts = ["# Reading one subject", describe(report["environment"]), _what(settings), HOW]
    for title, tables in stage_tables(report["rows"]).items():
        parts += [f"## {title}", *tables]
    if settings["missing"]:
        parts.append(
            "Not measured: "
            + ", ".join(f"{name} (`pip install {package}`)" for name, package in settings["missing"].items())
            + "; `pip install 'hpc_ddpm[bench]'` brings all."
        )
    parts += ["## Aims", "Warm where nothing else is said, without workers.", _aims(report["rows"])]
    return "\n\n".join(parts) + "\n"


def stage_tables(rows: Rows) -> dict[str, tuple[str, str]]:
    """By what was measured: alone, and with workers."""
    of_stages = {title: [row for row in rows if row["stage"] == stage] for stage, title in STAGES.items()}
    return {title: (_alone(each), _workers(each)) for title, each in of_stages.items()}


def _what(settings: dict[str, Any]) -> str:
    shape = " × ".join(map(str, settings["shape"]))
    return (
        f"The subject: {settings['sample']}, {shape} {settings['dtype']} and a uint8 mask, "
        f"{settings['mb_per_volume']:.1f} MB; {settings['repeats']} repeats, {settings['repeats_with_workers']} with "
        f"workers; {settings['torch_threads']} torch threads."
    )


def _alone(rows: Rows) -> str:
    """The table of reading times without a loader, for each state of the page cache."""
    lines = []
    for name, by in _by_contestant(row for row in rows if row["workers"] is None).items():
        written, cold, warm = (by[cache, None] for cache in CACHES)
        lines.append(
            [
                name,
                warm["note"],
                _spread(warm["ms"]),
                f"{warm['times_ours']:.2f}",
                _spread(cold["ms"]),
                f"{cold['times_ours']:.2f}",
                _spread(written["ms"]),
                f"{written['times_ours']:.2f}",
                _number(warm["cpu_ms"]["median"]),
                f"{warm['mb_per_s']:.0f}",
                _number(warm["volumes_per_s"]),
            ]
        )
    header = [
        "contestant",
        "how",
        "warm ms",
        "× ours",
        "cold ms",
        "× ours",
        "written ms",
        "× ours",
        "CPU ms",
        "warm MB/s",
        "volumes/s",
    ]
    return table(header, lines)


def _workers(rows: Rows) -> str:
    """Speed by number of workers."""
    numbers = sorted({row["workers"] for row in rows if row["workers"] is not None})
    lines = []
    for name, by in _by_contestant(row for row in rows if row["workers"] is not None).items():
        cells = [(by["warm", number]["volumes_per_s"], by["warm", number]["cpu_ms"]["median"]) for number in numbers]
        lines.append([name, *[f"{_number(speed)} ({_number(cpu_ms)})" for speed, cpu_ms in cells]])
    return "Volumes/s (CPU ms per volume), warm:\n\n" + table(["workers", *map(str, numbers)], lines)


def _by_contestant(rows: Iterable[dict[str, Any]]) -> dict[str, dict[tuple[str, int | None], dict[str, Any]]]:
    found: dict[str, dict[tuple[str, int | None], dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["contestant"], {})[row["cache"], row["workers"]] = row
    return found


def _aims(rows: Rows) -> str:
    """What this project promises, and what was measured."""
    ms = {
        (row["stage"], row["contestant"]): row["ms"]["median"]
        for row in rows
        if (row["cache"], row["workers"]) == ("warm", None)
    }
    peer = next(name for stage, name in ms if stage == NETWORK and name != OURS)
    theirs, ours = ms[NETWORK, peer], ms[STORED, OURS]
    written = {
        row["contestant"]: row["ms"]["median"] for row in rows if (row["cache"], row["stage"]) == ("written", STORED)
    }
    aims = [
        (f"at least 15 times as fast as {peer}, for the network", theirs / ms[NETWORK, OURS], 15.0),
        (f"at least 100 times as fast as {peer}, to be sent to a GPU", theirs / ours, 100.0),
        (
            "uncompressed: at least 1/1.5 of a memory map's speed",
            ms[STORED, "memory map"] / ms[STORED, f"{OURS}, uncompressed"],
            1 / 1.5,
        ),
        (
            "the same, of files just written",
            written["memory map"] / written[f"{OURS}, uncompressed"],
            1 / 1.5,
        ),
        ("compressed: at least 1/3 of a memory map's speed", ms[STORED, "memory map"] / ours, 1 / 3),
    ]
    aims += [
        (f"no slower than {name}", ms[STORED, name] / ours, 1.0)
        for name in ("Zarr", "WebDataset", "MONAI PersistentDataset")
        if (STORED, name) in ms
    ]
    lines = [[aim, f"{found:.2f}", "met" if found >= least else "**not met**"] for aim, found, least in aims]
    return table(["aim", "times as fast", ""], lines)


def _spread(ms: dict[str, float]) -> str:
    return f"{_number(ms['median'])} ({_number(ms['p10'])}–{_number(ms['p90'])})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
