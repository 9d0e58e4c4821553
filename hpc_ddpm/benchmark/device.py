"""The ruler: what a device is, how fast it multiplies and copies, how long a call takes, what energy it drew."""

from __future__ import annotations

import importlib
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch

GPU_FACTS = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.limit",
    "power.draw",
    "temperature.gpu",
)


RAPL = Path("/sys/class/powercap")
"""One zone per CPU package, of Intel and AMD alike."""


class Ceilings(TypedDict):
    """Measured on this device, now."""

    matmul_flops: float
    """FLOP/s of a large matrix product in the precision of the run."""
    copy_bytes_per_s: float
    """Read and written, of a copy that fits into no cache."""


def device_name(device: torch.device) -> str:
    """As the driver calls it; of a CPU, its architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


def describe_gpu(device: torch.device) -> dict[str, Any] | None:
    """Name, memory, driver, CUDA, cuDNN, NCCL, clocks and power cap; None on a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    facts: dict[str, Any] = {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
    }
    query = [
        "nvidia-smi",
        f"--query-gpu={','.join(GPU_FACTS)}",
        "--format=csv,noheader",
        "-i",
        f"GPU-{properties.uuid}",
    ]
    with suppress(OSError, subprocess.SubprocessError):
        line = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
        facts |= dict(zip(GPU_FACTS, line.split(", "), strict=False))
    return facts


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(
    call: Callable[[], object],
    device: torch.device,
    *,
    budget_s: float = 1.0,
    warm_up: int = 2,
    least: int = 5,
    most: int = 50,
) -> list[float]:
    """Seconds of each call after the warm-up: of the device's own clock on a GPU.

    Args:
        call: gives the device work; need not wait for it.
        device: that does the work.
        budget_s: calls end when this is spent,
        warm_up: calls that do not count.
        least: but so many count at least,
        most: and so many at most.
    """
    for _ in range(warm_up):
        call()
    synchronize(device)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < least or (len(times) < most and time.perf_counter() - began < budget_s):
        times.append(_time_one(call, device))
    return times


def _time_one(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, budget_s: float = 0.5) -> Ceilings:
    """A square matrix product of random values, and a copy; the best tenth of the calls counts."""
    is_gpu = device.type == "cuda"
    side, num_bytes = (8192, 2**31) if is_gpu else (1024, 2**27)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    matmul = time_calls(lambda: torch.mm(left, right, out=product), device, budget_s=budget_s)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_calls(lambda: target.copy_(source), device, budget_s=budget_s)
    return {"matmul_flops": 2 * side**3 / _best(matmul), "copy_bytes_per_s": 2 * num_bytes / _best(copy)}


def _best(times: list[float]) -> float:
    """The 10th percentile: a ceiling, without trusting one lucky call."""
    return sorted(times)[len(times) // 10]


@contextmanager
def exact_fp32() -> Iterator[None]:
    """float32 without TF32 inside."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


class Energy:
    """Joules that a rank's device drew since this was made: its GPU by NVML's counter, or its share of the CPUs' RAPL.

    Args:
        device: of this rank.
        local_ranks: that share the CPUs of the node.
    """

    def __init__(self, device: torch.device, local_ranks: int = 1) -> None:
        self._read = _gpu_joules(device) if device.type == "cuda" else partial(_cpu_joules, local_ranks)
        self._start = self._read()

    def joules(self) -> float | None:
        """None where no counter can be read: an old GPU, no `nvidia-ml-py`, RAPL for root only, or it ran over."""
        now = self._read()
        return None if now is None or self._start is None or now < self._start else now - self._start


def _gpu_joules(device: torch.device) -> Callable[[], float | None]:
    with suppress(Exception):  # whatever NVML raises: then there is no counter
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    return lambda: None


def _cpu_joules(local_ranks: int, root: Path = RAPL) -> float | None:
    with suppress(OSError, ValueError):
        packages = [int((zone / "energy_uj").read_text()) for zone in root.glob("intel-rapl:?")]
        return sum(packages) / 1e6 / local_ranks if packages else None
    return None
