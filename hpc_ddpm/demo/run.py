"""The main job end to end, by the commands a user would type: pack, train, sample, report."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from hpc_ddpm.config import Config, load_config
from hpc_ddpm.data.shards import open_packed
from hpc_ddpm.demo.cohort import write_cohort
from hpc_ddpm.demo.pace import choose_steps
from hpc_ddpm.demo.source import describe_source
from hpc_ddpm.demo.summary import report_run
from hpc_ddpm.errors import HpcDdpmError
from hpc_ddpm.files import write_text

NUM_SUBJECTS = 24

Note = Callable[[str], None]


def run_demo(
    out: Path,
    data: Path | None,
    num_ranks: int,
    overrides: Sequence[str],
    *,
    say: Note = print,
    on_cohort: Callable[[int, int], None] = lambda done, total: None,
    quiet: bool = False,
) -> Path:
    """Run all stages into `out`; what is finished is reused. Returns the report's HTML file.

    Args:
        out: gets cohort/, packed/, train/, samples/, demo.yaml, report.png and report.html.
        data: a source that `hpc-ddpm pack` takes; None makes a cohort from the ICBM-152 template.
        num_ranks: processes for training and sampling.
        overrides: `section.key=value` on top of the demo preset.
        say: prints one line about each stage.
        on_cohort: progress of making the cohort.
        quiet: no progress bars in the stages.

    Raises:
        HpcDdpmError: whatever the stages say; a stage's own message is already on the screen.
    """
    began = time.perf_counter()
    if data is None:
        source = out / "cohort"
        say(f"1/5 brains: {NUM_SUBJECTS} subjects from the ICBM-152 template -> {source}")
        write_cohort(source, NUM_SUBJECTS, progress=on_cohort)
        settings: list[str] = []
    else:
        source = data
        say(f"1/5 brains: yours -> {source}")
        settings = describe_source(source, load_config("demo", overrides).config)
    config = _fitting_config(out / "demo.yaml", [*settings, *overrides])
    preset = _write_config(out / "demo.yaml", config)
    stages = _Stages(say, num_ranks, ["--quiet"] if quiet else [])

    packed_dir, run_dir, samples = out / "packed", out / "train", out / "samples"
    stages.run(f"2/5 packing -> {packed_dir}", ["pack", source, "--out", packed_dir, "--config", preset], ranks=1)
    train: list[str | Path] = ["train", "--config", preset, "--data", packed_dir, "--out", run_dir]
    stages.run(
        f"3/5 training: {config.training.num_steps} steps on {num_ranks} ranks -> {run_dir}", train, ranks=num_ranks
    )
    has_held_out = bool(open_packed(packed_dir).subjects("val"))
    masks: list[str | Path] = ["--split", "val"] if has_held_out else ["--masks", source]
    sample: list[str | Path] = ["sample", run_dir, "--out", samples, *masks]
    stages.run(f"4/5 sampling on {num_ranks} ranks -> {samples}", sample, ranks=num_ranks)

    say("5/5 report")
    title = "New volumes for held-out masks" if has_held_out else "New volumes for the masks given"
    png, page = report_run(out, packed_dir, run_dir, samples, stages.shown, title=title)
    say("")
    say(f"report    {page}")
    say(f"picture   {png}")
    say(f"volumes   {samples}")
    say(f"training  {run_dir} (tensorboard --logdir {run_dir})")
    say(f"took      {time.perf_counter() - began:.0f} s; the same command reuses what is finished")
    say("ran       " + "\n          ".join(stages.shown))
    return page


class _Stages:
    """Runs stages as the command line would, and remembers the commands."""

    def __init__(self, say: Note, num_ranks: int, options: list[str]) -> None:
        self.say = say
        self.options = options
        self.shown: list[str] = []
        threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
        self.env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}

    def run(self, title: str, arguments: Sequence[str | Path], ranks: int) -> None:
        words = [str(argument) for argument in arguments]
        launcher = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), "-m", "launch.cli"] if ranks > 1 else []
        self.shown.append(shlex.join([*(launcher or ["hpc-ddpm"]), *words]))
        self.say(title)
        if ranks > 1:
            command = [sys.executable, "-m", "torch.distributed.run", *launcher[1:]]
        else:
            command = [sys.executable, "-m", "launch.cli"]
        code = subprocess.run([*command, *words, *self.options], env=self.env, check=False).returncode
        if code in (130, -2):
            raise KeyboardInterrupt
        if code:
            raise HpcDdpmError(f"this stage failed (exit code {code}); its own message is above: {self.shown[-1]}")


def _fitting_config(preset: Path, overrides: Sequence[str]) -> Config:
    """The demo's settings, with as many steps as fit here unless the user names their number."""
    config = load_config("demo", overrides).config
    if any(override.startswith("training.num_steps") for override in overrides):
        return config
    return load_config("demo", [*overrides, f"training.num_steps={choose_steps(preset, config)}"]).config


def _write_config(path: Path, config: Config) -> Path:
    """The demo's settings as a file that `--config` takes."""
    tree: dict[str, Any] = config.dump()
    write_text(path, "# The resolved settings of this demo.\n" + yaml.safe_dump(tree, sort_keys=False))
    return path
