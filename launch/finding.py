"""What a check of `hpc-ddpm doctor` found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    status: str
    """pass, warn or fail."""
    found: str
    advice: str = ""
