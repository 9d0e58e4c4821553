"""How `hpc-ddpm data` prints: findings by kind, subjects, facts, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from hpc_ddpm.data.check.findings import KINDS, SEVERITIES, Finding, by_kind

MAX_LISTED = 8
STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold blue"}
PIPE_WIDTH = 160


def print_json(value: Any) -> None:
    """Indented, on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_findings(title: str, findings: Sequence[Finding]) -> None:
    """Kinds, the worst first; each with what to do and the first few that it concerns."""
    console = _console()
    for kind, group in by_kind(findings).items():
        severity, advice = KINDS[kind].severity, KINDS[kind].advice
        style = STYLES[severity]
        console.print(f"[{style}]{severity}[/] [bold]{kind}[/] ({len(group)})  {escape(f'-> {advice}')}")
        table = Table("", "", "", Column(style="dim"), show_header=False, box=None, padding=(0, 2, 0, 0))
        for finding in group[:MAX_LISTED]:
            table.add_row(" ", escape(_subjects(finding)), escape(finding.found), escape(_file(finding)))
        console.print(table)
        if len(group) > MAX_LISTED:
            console.print(f"    and {len(group) - MAX_LISTED} more (--json lists all)")
    counts = [(name, sum(finding.severity == name for finding in findings)) for name in SEVERITIES]
    summary = ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts if count)
    console.print(f"{escape(title)}: {summary or 'nothing found'}", highlight=False)


def print_subjects(rows: Iterable[Mapping[str, Any]]) -> None:
    """The table of `data ls`."""
    rows = list(rows)
    names = list(rows[0]["voxels"]) if rows else []
    table = Table(
        "subject", "split", "shard", "row", *map(escape, names), box=None, header_style="bold", pad_edge=False
    )
    for row in rows:
        counts = [str(row["voxels"][name]) for name in names]
        table.add_row(escape(row["id"]), row["split"], row["shard"], str(row["row"]), *counts)
    _console().print(table)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Names and values; nested ones indented."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _flat(facts, ""):
        table.add_row(escape(name), escape(value))
    _console().print(table)


def _flat(facts: Mapping[str, Any], indent: str) -> Iterable[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, Mapping) and any(isinstance(inner, Mapping) for inner in value.values()):
            yield f"{indent}{name}", ""
            yield from _flat(value, f"{indent}  ")
        else:
            yield f"{indent}{name}", _text(value)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return " ".join(_text(inner) for inner in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _file(finding: Finding) -> str:
    """The last two parts of its path: a role and a name."""
    return "/".join(Path(finding.file).parts[-2:]) if finding.subjects else ""


def _subjects(finding: Finding) -> str:
    shown = ", ".join(finding.subjects[:3]) or finding.file
    more = f" and {len(finding.subjects) - 3} more" if len(finding.subjects) > 3 else ""
    return f"{shown}{more}"


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
