"""What all parts share: the device, the sizes, and how a row of results is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hpc_ddpm.benchmark.timing import spread
from hpc_ddpm.config import Config, load_config
from hpc_ddpm.model.planner import Planner

Row = dict[str, Any]
Part = Callable[["Setup"], Iterator[Row]]
"""Rows as they are found. `is_ok` False in one fails the part; a row without it is a figure."""
PRESETS = ("whole_head_128", "brats_192")
TINY = (
    "data.size=[8,8,8]",
    "model.base_channels=8",
    "model.num_groups=4",
    "model.channel_multipliers=[1,2]",
    "model.attention_factors=[2]",
)
OFFLOADED = ("model.activation_checkpointing=block", "model.offload_activations=cpu")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}


@dataclass(frozen=True)
class Setup:
    """Where and how large."""

    device: torch.device
    is_full: bool
    """The presets themselves; else networks that a CPU runs in a second."""

    @property
    def budget_s(self) -> float:
        """Time for the counted calls of one figure."""
        return 1.5 if self.is_full else 0.05

    @property
    def warm_up(self) -> int:
        """Calls before the counted ones."""
        return 3 if self.is_full else 1

    @property
    def compiled_layouts(self) -> list[str]:
        """Layouts to compile for: it takes a minute each."""
        return list(LAYOUTS) if self.is_full else ["channels_last"]

    def preset(self, name: str, *overrides: str) -> Config:
        """As shipped, or tiny; `overrides` win."""
        tiny = () if self.is_full else TINY
        return load_config(name, ["training.global_batch=1", *tiny, *overrides]).config

    @cache  # noqa: B019 - one setup per process
    def planner(self, preset: str, precision: str, *overrides: str) -> Planner:
        """The planner for this preset on this device; it traces every policy once."""
        return Planner(self.preset(preset, *overrides), 1, precision, self.device.type)

    def small(self, name: str, *overrides: str) -> Config:
        """A network whose reference a CPU computes soon: the preset at 48^3, or tiny.

        No level has 2^3 voxels: there PyTorch 2.13 computes bf16 weight gradients wrongly on CPUs with bf16.
        """
        return self.preset(name, *(["data.size=[48,48,48]"] if self.is_full else []), *overrides)


def relative_error(found: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> float:
    """|found - expected| / |expected| over all values (Euclidean, float64, where `found` is); NaN stays NaN."""
    found, expected = ([each] if isinstance(each, Tensor) else each for each in (found, expected))
    pairs = [(a.detach().double(), b.detach().to(a.device).double()) for a, b in zip(found, expected, strict=True)]
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    return float((difference / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5)


def check(name: str, error: float, band: float, **facts: Any) -> Row:
    """A row that is ok where the error lies within the band; NaN never does."""
    return {"name": name, **facts, "error": error, "band": band, "is_ok": error <= band}


def milliseconds(times: Sequence[float]) -> Row:
    """Median, 10th and 90th percentile."""
    found = spread([1e3 * seconds for seconds in times])
    return {"ms": found["median"], "ms_p10": found["p10"], "ms_p90": found["p90"], "calls": len(times)}


def attempt(facts: Row, measure: Callable[[], Row]) -> Row:
    """A row with what `measure` found; running out of memory is a result, any other error a row that is not ok."""
    try:
        return facts | measure()
    except torch.OutOfMemoryError:
        return facts | {"error": "out of memory"}
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        return facts | {"error": reason, "is_ok": False}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
