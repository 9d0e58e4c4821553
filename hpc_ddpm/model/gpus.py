"""GPUs by name: memory and peak rates from their vendors' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hpc_ddpm.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """Memory in GiB, and dense matrix-product peak in TFLOP/s without sparsity (0: unknown)."""

    memory_gib: float
    half_tflops: float
    fp32_tflops: float
    has_bf16: bool = True


GPUS = {
    "h200-141g": Gpu(139.8, 989.4, 67.0),
    "h100-80g": Gpu(79.6, 989.4, 67.0),
    "a100-80g": Gpu(79.3, 312.0, 19.5),
    "a100-40g": Gpu(39.6, 312.0, 19.5),
    "l40s-48g": Gpu(44.5, 362.0, 91.6),
    "v100-32g": Gpu(31.7, 125.0, 15.7, has_bf16=False),
    "rtx4090-24g": Gpu(23.6, 165.2, 82.6),
}
"""Data sheets of the vendor; memory as the driver reports it, about."""
SLOWER = ("pcie", "nvl", "mig", "laptop", "4090d")
"""In the names of variants that run at other clocks, and of parts of a device."""


def find_gpu(name: str) -> Gpu:
    """A GPU by name, or one of that many GiB.

    Raises:
        ConfigError: neither.
    """
    if name in GPUS:
        return GPUS[name]
    try:
        memory_gib = float(name)
    except ValueError:
        memory_gib = 0.0
    if memory_gib <= 0:
        raise ConfigError(f"--gpu {name} is not known; give memory in GiB, or one of {', '.join(GPUS)}")
    return Gpu(memory_gib, 0.0, 0.0)


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s on the data sheet of the device that the driver calls `device_name`; None where we do not know it.

    `SLOWER` variants than the SXM and desktop ones listed here are unknown.
    """
    words = re.sub(r"[^a-z0-9]", "", device_name.lower())
    known = [gpu for name, gpu in GPUS.items() if name.split("-")[0] in words]
    if not known or any(variant in words for variant in SLOWER):
        return None
    return 1e12 * (known[0].fp32_tflops if precision == "fp32" else known[0].half_tflops)
