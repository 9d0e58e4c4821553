"""How a generated set stands, by looking at its folder: from anywhere, while workers are busy or long after."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hpc_ddpm.sampling.folder import SampleFolder, find_folder
from hpc_ddpm.sampling.plan import read_manifest
from hpc_ddpm.workers.claims import look_at_claims

RECENT_S, MAX_RECENT = 3600.0, 500


def read_status(out: Path) -> dict[str, Any]:
    """Counts, rate, time left, failures and rejected tries of a set.

    Raises:
        DataFormatError: `out` is not a generated set.
    """
    folder = find_folder(out)
    planned = {item.id for item in read_manifest(folder.path)}
    done = folder.done() & planned
    failures = [failure for failure in folder.failures() if failure.id in planned]
    workers, claims = look_at_claims(folder.state)
    left = len(planned) - len(done) - len(failures)
    rate = _rate(folder, done) if workers else None
    return {
        "planned": len(planned),
        "done": len(done),
        "failed": len(failures),
        "left": left,
        "leased": len(claims & (planned - done)),
        "workers": [str(worker) for worker in workers],
        "volumes_per_hour": round(3600 * rate, 1) if rate else None,
        "eta_s": round(left / rate) if rate else None,
        "failed_by_kind": dict(Counter(failure.kind for failure in failures)),
        "failures": [asdict(failure) for failure in failures],
        "rejected": _rejected(folder, done),
    }


def _rate(folder: SampleFolder, done: set[str]) -> float | None:
    """Volumes per second, by the times of the sidecars that were written last."""
    times = sorted(folder.sidecar(item_id).stat().st_mtime for item_id in done)[-MAX_RECENT:]
    recent = [time for time in times if time >= times[-1] - RECENT_S]
    span = recent[-1] - recent[0] if recent else 0.0
    return (len(recent) - 1) / span if span > 0 else None


def _rejected(folder: SampleFolder, done: set[str]) -> dict[str, list[dict[str, Any]]]:
    """Tries that scored too low, of volumes of which a later one passed."""
    if not folder.made_with()["identity"]["fidelity"]["reject_below"]:
        return {}
    tries = {item_id: folder.record(item_id)["rejected"] for item_id in sorted(done)}
    return {item_id: rejected for item_id, rejected in tries.items() if rejected}
