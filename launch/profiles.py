"""Cluster profiles: what a site wants to be told with every job, typed; shipped ones in `configs/cluster/`."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from hpc_ddpm.config import Section, did_you_mean, presets_dir, read_yaml
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.text import has_control, show

USER_FOLDER = Path("~/.config/hpc_ddpm/cluster")
GPU_OPTIONS = ("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket")
TIME = re.compile(r"(?:(\d{1,5})-)?(\d{1,6}):([0-5]\d):([0-5]\d)", re.ASCII)
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
OPTION = r"^[A-Za-z][A-Za-z0-9_-]*$"


def _check_time(value: Any) -> Any:
    if not TIME.fullmatch(str(value)):
        raise ValueError(
            f"{show(str(value))} is no time; expected HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS, "
            "such as 24:00:00 or 1-00:00:00"
        )
    return value


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def seconds_of(time: str) -> int | None:
    """`1-12:00:00` in seconds; None for what is no time, such as SLURM's UNLIMITED."""
    match = TIME.fullmatch(time)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 86400 * days + 3600 * hours + 60 * minutes + seconds


class Profile(Section):
    """How jobs are started on one cluster. A job has one task (rank) per GPU."""

    executor: Literal["slurm", "local", "debug"] = "slurm"
    """slurm: batch jobs. local: ranks on this machine, in the background. debug: in this process."""
    partition: str = ""
    cpu_partition: str = ""
    """For packing, which needs no GPU; `partition` where empty."""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    nodes: int = Field(default=1, ge=1)
    gpus_per_node: int = Field(default=1, ge=1)
    gpu_type: str = ""
    """As SLURM calls it, for example a100; any where empty."""
    gpu_option: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """The option of `sbatch` that asks for them; some sites take --gres=gpu:a100:4 only."""
    cpus_per_gpu: int = Field(default=4, ge=1)
    memory_per_gpu: Annotated[str, Field(pattern=r"^([1-9]\d{0,8}[MGT])?$")] = ""
    """The node's memory, for example 60G; the site's default where empty. Packing takes that of all the node's GPUs."""
    time: Annotated[str, BeforeValidator(_check_time)] = "24:00:00"
    """Limit of one start; a job that needs more saves, requeues itself and goes on."""
    array_parallelism: int = Field(default=64, ge=1)
    """Tasks of an array that run at a time."""
    signal_delay_s: int = Field(default=300, ge=1)
    """Warning time before the limit, enough for a step and a checkpoint."""
    max_requeues: int = Field(default=100, ge=0)
    """Restarts of a job, for whatever reason, before it ends as failed."""
    max_crashes: int = Field(default=3, ge=1)
    """Starts in a row without progress before a job ends as failed, orderly stops in the first half of `time` aside."""
    modules: tuple[str, ...] = ()
    """`module load` before everything else."""
    setup: tuple[str, ...] = ()
    """Lines of shell before the command starts, for example the activation of an environment."""
    container: str = ""
    """Words before the Python interpreter, for example `apptainer exec --nv /images/torch.sif`."""
    python: str = ""
    """Interpreter on the nodes; the one that submits where empty."""
    scratch: str = "${TMPDIR:-/tmp}"
    """Folder on the node's own disk, for compilers' caches; the shell of the job expands it."""
    environment: dict[Annotated[str, Field(pattern=VARIABLE)], str | int] = Field(default={})
    """Variables of the job, for example NCCL_SOCKET_IFNAME."""
    sbatch: dict[Annotated[str, Field(pattern=OPTION)], str | int | bool] = Field(default={})
    """Any other `sbatch` option, without the dashes, for example {reservation: course}; none that asks for GPUs."""

    @model_validator(mode="after")
    def _check(self) -> Profile:
        self._check_characters()
        if self.executor != "slurm" and self.nodes != 1:
            raise ValueError(f"executor {self.executor} has one node, found nodes={self.nodes}")
        if self.executor != "debug" and self.limit_s <= self.signal_delay_s:
            raise ValueError(
                f"time={self.time} is no longer than the warning before its end, signal_delay_s={self.signal_delay_s}: "
                "every start would end at once; give more time, or a shorter signal_delay_s in the profile"
            )
        for name, value in self.sbatch.items():
            option = name.replace("_", "-")
            if option in GPU_OPTIONS or (option == "gres" and re.search(r"\bgpu\b", str(value))):
                raise ValueError(
                    f"sbatch: {name}={value} asks for GPUs a second time, and SLURM then gives the smaller number "
                    "without a word; set gpus_per_node and gpu_type instead, and gpu_option: gres where the site "
                    "takes --gres only"
                )
        return self

    def gpu_request(self, count: int) -> dict[str, str]:
        """The option of `sbatch` that asks for so many GPUs of a node; other generic resources are in the same list."""
        wanted = f"{self.gpu_type}:{count}".lstrip(":")
        if self.gpu_option == "gpus-per-node":
            return {"gpus-per-node": wanted}
        return {"gres": ",".join(filter(None, (f"gpu:{wanted}", str(self.sbatch.get("gres", "")))))}

    def _check_characters(self) -> None:
        """All of it becomes lines of a batch script; only `setup` is meant as several."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            for text in map(str, value.values() if isinstance(value, dict) else _as_tuple(value)):
                if has_control(re.sub(r"[\n\t]", "", text) if name == "setup" else text):
                    raise ValueError(f"{name}: {show(text)} has a line break or another control character; remove it")
        if re.search(r'["`\\]|\$\(', self.scratch):
            raise ValueError(f"scratch: {show(self.scratch)} is no path; expected for example ${{TMPDIR:-/tmp}}")

    def memory(self, gpus: int) -> str:
        """What so many GPUs of a node come with, as `sbatch --mem` takes it."""
        amount, unit = self.memory_per_gpu[:-1], self.memory_per_gpu[-1:]
        return f"{int(amount) * gpus}{unit}" if amount else ""

    @property
    def limit_s(self) -> int:
        """The time limit."""
        limit_s = seconds_of(self.time)
        assert limit_s is not None
        return limit_s

    @property
    def hours(self) -> float:
        """The time limit."""
        return self.limit_s / 3600


def list_profiles() -> dict[str, Path]:
    """Names that `--cluster` accepts besides files; a user's own wins over a shipped one of the same name."""
    folders = (presets_dir() / "cluster", USER_FOLDER.expanduser())
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def load_profile(source: str, changes: dict[str, Any] | None = None) -> Profile:
    """A profile by name or file, with the changes of the command line (None is no change).

    Raises:
        ConfigError: no such profile, unknown key or wrong value; one line with place and nearest right name.
    """
    path = _find(source)
    values, lines = read_yaml(path)
    known = list(Profile.model_fields)
    for key in map(str, values):
        if key not in known:
            near = did_you_mean(key, known) or f"; a profile has: {', '.join(known)}"
            raise ConfigError(f"{path}:{lines.get(key, 1)}: unknown setting '{key}'{near}")
    given = {key: value for key, value in (changes or {}).items() if value is not None}
    try:
        return Profile.model_validate(values | given)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = str(problem["loc"][0]) if problem["loc"] else ""
        place = f"--{key.replace('_', '-')}" if key in given else f"{path}:{lines.get(key, 1)}"
        message = problem["msg"].removeprefix("Value error, ")
        found = f"{key}={show(problem['input'])}: " if problem["type"] != "value_error" else ""
        raise ConfigError(f"{place}: {found}{message[:1].lower()}{message[1:]}") from None


def _find(source: str) -> Path:
    path, profiles = Path(source), list_profiles()
    with suppress(OSError):  # a name that is too long
        if path.is_file():
            return path
    if source in profiles:
        return profiles[source]
    raise ConfigError(
        f"no cluster profile called '{source}'{did_you_mean(source, list(profiles))}; give a YAML file, put one into "
        f"{USER_FOLDER}{os.sep}, or use one of: {', '.join(profiles)}"
    )
