"""Where the time of a step goes: a trace, a memory snapshot, and a table, of chosen steps on rank 0.

    RUN/profile/trace.json.gz       for https://ui.perfetto.dev or chrome://tracing
    RUN/profile/memory.pickle       CUDA: for https://pytorch.org/memory_viz
    RUN/profile/where.txt           the table
    RUN/profile/where.json          its numbers

While it runs, hooks mark what each module does forward; what that does backward is found by autograd's sequence number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from hpc_ddpm.files import atomic_path, write_json, write_text
from hpc_ddpm.model.attention import AttentionBlock
from hpc_ddpm.model.blocks import Conv3d, Downsample, Upsample
from hpc_ddpm.model.norm import GroupNormSiLU

FOLDER = "profile"
WHERE_FILE = "where.json"
PREFIX = "hpc_ddpm::"
STEP, DATA, OPTIMIZER = f"{PREFIX}step", f"{PREFIX}data", f"{PREFIX}optimizer"
MODULES = {
    AttentionBlock: "attention",
    Downsample: "up/down",
    Upsample: "up/down",
    GroupNormSiLU: "norm",
    Conv3d: "conv",
}
PARTS = ("conv", "norm", "attention", "up/down", "optimizer", "communication", "data", "other")
COLLECTIVES = ("c10d::", "record_param_comms", "gloo:", "nccl:")
MAX_MEMORY_EVENTS = 100_000
US = 1e-6


class Profiler:
    """Profiles the steps `first` to `last`, counted from 1; with None for them, none."""

    def __init__(
        self, steps: tuple[int, int] | None, folder: Path, network: torch.nn.Module, device: torch.device
    ) -> None:
        self.steps, self.folder, self.network, self.device = steps, folder, network, device
        self._profile: Any = None
        self._hooks: list[Any] = []

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Context of the `number`-th step."""
        if self.steps and number == self.steps[0]:
            self._start()
        if self._profile is None:
            yield
            return
        with record_function(STEP):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        if self.steps and number == self.steps[1]:
            self.close()

    def close(self) -> None:
        """Write what was seen, if it is not written yet."""
        if self._profile is None:
            return
        self._profile.stop()
        for hook in self._hooks:
            hook.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.device.type == "cuda":
            with atomic_path(self.folder / "memory.pickle") as temporary:
                torch.cuda.memory._dump_snapshot(str(temporary))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile.export_chrome_trace(str(self.folder / "trace.json.gz"))
        num_steps, wall_s, seconds = where_time_goes(self._profile.events(), is_cuda=self.device.type == "cuda")
        facts = {"steps": num_steps, "wall_s": wall_s, "parts_s": seconds}
        write_json(self.folder / WHERE_FILE, facts, indent=2)
        write_text(self.folder / "where.txt", table(num_steps, wall_s, seconds, self.device.type))
        self._profile = None

    def _start(self) -> None:
        is_cuda = self.device.type == "cuda"
        if is_cuda:
            torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
        for module in self.network.modules():
            kind = next((part for cls, part in MODULES.items() if isinstance(module, cls)), None)
            if kind is not None:
                self._mark(module, PREFIX + kind)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
        self._profile = profile(activities=activities)
        self._profile.start()

    def _mark(self, module: torch.nn.Module, name: str) -> None:
        open_ranges: list[Any] = []

        def enter(*_: Any) -> None:
            open_ranges.append(record_function(name))
            open_ranges[-1].__enter__()

        def leave(*_: Any) -> None:
            open_ranges.pop().__exit__(None, None, None)

        # always: the repeated forward of activation checkpointing ends by an exception once it has what it needs
        self._hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def where_time_goes(events: Iterable[Any], *, is_cuda: bool) -> tuple[int, float, dict[str, float]]:
    """Steps seen, their seconds, and the seconds of each of PARTS in them.

    Of the GPU where there is one, else of the thread that trains. Collectives are counted from their start to their
    end; they may run beside the other parts. `other` is all that is left: Python, waiting, sums and concatenations.
    """
    events = list(events)
    steps = [event for event in events if event.name == STEP]
    threads = {event.thread for event in steps}
    ranges = {id(event): _outermost_range(event) for event in events}
    part_of_node = {
        event.sequence_nr: ranges[id(event)] for event in events if event.sequence_nr >= 0 and ranges[id(event)]
    }
    us: Counter[str] = Counter()
    for event in events:
        if event.name == DATA:
            us["data"] += event.cpu_time_total
        elif event.name.startswith(("gloo:", "nccl:")) and not is_cuda:
            us["communication"] += event.cpu_time_total
        elif event.device_type == torch.autograd.DeviceType.CPU and event.thread in threads:
            part = _part(event, ranges, part_of_node)
            if part in PARTS and part != "data":
                us[part] += event.self_device_time_total if is_cuda else event.self_cpu_time_total
    wall_us = sum(event.cpu_time_total for event in steps)
    us["other"] = max(0, wall_us - sum(us.values()))
    return len(steps), wall_us * US, {part: us[part] * US for part in PARTS}


def table(num_steps: int, wall_s: float, seconds: dict[str, float], device: str) -> str:
    """The page for people."""
    lines = [f"{num_steps} steps on rank 0 ({device}), {wall_s / max(1, num_steps):.4f} s each", ""]
    lines.append(f"{'part':<14}{'s per step':>12}{'share':>9}")
    lines += [
        f"{part:<14}{seconds[part] / max(1, num_steps):>12.4f}{seconds[part] / max(wall_s, US):>9.1%}" for part in PARTS
    ]
    return "\n".join(
        [*lines, "", "communication may run beside the other parts; other is Python, waiting and small work", ""]
    )


def _part(event: Any, ranges: dict[int, str | None], part_of_node: dict[int, str | None]) -> str | None:
    """The part of PARTS to which an event belongs: its collective, its module, or the module of its gradient."""
    node = None
    above = event
    while above is not None:
        if above.name.startswith(COLLECTIVES):
            return "communication"
        if above.name.startswith("autograd::engine::evaluate_function"):
            node = part_of_node.get(above.sequence_nr)
        above = above.cpu_parent
    return ranges[id(event)] or node


def _outermost_range(event: Any) -> str | None:
    """The first of our marks on the way down to an event, without that of the step."""
    found = None
    while event is not None:
        if event.name.startswith(PREFIX) and event.name != STEP:
            found = event.name.removeprefix(PREFIX)
        event = event.cpu_parent
    return found
