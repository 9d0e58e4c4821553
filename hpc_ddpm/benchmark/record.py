"""What a benchmark writes: figures with command, commit, hardware and software, as JSON and as Markdown."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.files import write_json
from hpc_ddpm.runlog import provenance
from hpc_ddpm.sealed import read_json

SCHEMA, VERSION = "hpc_ddpm benchmark", 1
GIB = 2**30


class Environment(TypedDict):
    """Where and how it was measured."""

    created: str
    """ISO 8601, UTC."""
    command: list[str]
    git_commit: str | None
    versions: dict[str, str]
    cpu: str
    cores: int
    """That this process may use."""
    memory_gib: float
    os: str
    load_average: float
    """Over the last minute, when the benchmark began."""
    gpu: dict[str, Any] | None
    """Name, driver, CUDA, cuDNN, NCCL, clocks, power cap; None where no GPU was used."""
    conv_kernels: NotRequired[list[str]]
    """Kernels in which a convolution spends its time, longest first (`bench train`, `sample`); operations on a CPU."""


class Kind(TypedDict):
    """Which kind of file it is."""

    schema: str
    version: int


class Report(Kind):
    """One run of one benchmark."""

    benchmark: str
    """data, train, sample, ..."""
    environment: Environment
    settings: dict[str, Any]
    """What was measured: sizes, repeats."""
    rows: list[dict[str, Any]]
    """The benchmark's own columns."""


def environment(packages: Iterable[str] = (), gpu: dict[str, Any] | None = None) -> Environment:
    """This machine, now.

    Args:
        packages: distributions whose versions count besides our own dependencies; missing ones are left out.
        gpu: from `describe_gpu`.
    """
    facts = provenance()
    versions = dict(facts["versions"])
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "created": facts["created"],
        "command": facts["command"],
        "git_commit": facts["git_commit"],
        "versions": versions,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "os": _operating_system(),
        "load_average": round(os.getloadavg()[0], 2),
        "gpu": gpu,
    }


def new_report(benchmark: str, where: Environment, settings: dict[str, Any], rows: list[dict[str, Any]]) -> Report:
    """A report of this schema."""
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "benchmark": benchmark,
        "environment": where,
        "settings": settings,
        "rows": rows,
    }


def write_report(path: Path, report: Report) -> None:
    """As JSON, at once."""
    write_json(path, report, indent=2)


def read_report(path: Path) -> Report:
    """A report as written.

    Raises:
        DataFormatError: not a report, or of another version.
    """
    advice = "not a benchmark report; measure again"
    kind = read_json(path, Kind, advice, is_sealed=False)
    found = kind["schema"], kind["version"]
    if found != (SCHEMA, VERSION):
        raise DataFormatError(f"{path}: {found[0]} {found[1]} found, {SCHEMA} {VERSION} expected; measure again")
    return read_json(path, Report, advice, is_sealed=False)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, with columns as wide as they must be to be read as plain text too."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines]
    return "\n".join([text[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *text[1:]])


def describe(where: Environment) -> str:
    """Command, date, hardware and software, in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    gpu = where.get("gpu")
    device = "" if gpu is None else f"{gpu['name']} ({', '.join(f'{key} {value}' for key, value in gpu.items())}); "
    kernels = f" Convolutions by {', '.join(where['conv_kernels'])}." if where.get("conv_kernels") else ""
    return (
        f"Measured {where['created'][:10]} (commit {(where['git_commit'] or 'unknown')[:12]}) with\n\n"
        f"```\n{' '.join(where['command'])}\n```\n\n"
        f"Hardware: {device}{where['cores']} cores of {where['cpu']}, {where['memory_gib']:.0f} GiB; load average "
        f"{where['load_average']:.1f} at the start. Software: {where['os']}; {versions}.{kernels}"
    )


def cpu_model() -> str:
    """The processor's name as Linux tells it, else the machine's type."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _operating_system() -> str:
    """Kernel version and C library, without what a site has added to their names."""
    release = platform.release().partition("-")[0]
    return f"{platform.system()} {release}, {' '.join(platform.libc_ver())}"
