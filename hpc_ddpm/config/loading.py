"""From defaults, presets, YAML files and `section.key=value` strings to one Config, with where each value came from.

Later wins: defaults < preset (`extends` chains) < YAML file < command line.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from hpc_ddpm.config.keys import all_keys, did_you_mean, flatten, sections
from hpc_ddpm.config.overrides import set_from_text
from hpc_ddpm.config.sections import Config
from hpc_ddpm.config.yaml_text import read_yaml
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.text import show


@dataclass(frozen=True)
class Loaded:
    """A validated configuration and, for every setting that is not a default, where it came from."""

    config: Config
    origins: Mapping[str, str]

    def origin(self, key: str) -> str:
        """`default`, `preset NAME`, `FILE:LINE` or `command line` for a dotted key."""
        return self.origins.get(key, "default")


def presets_dir() -> Path:
    """The folder of shipped presets: inside the wheel, or the checkout's `configs/`."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def list_presets() -> list[str]:
    """Names that `--config` accepts besides files."""
    return sorted(path.stem for path in presets_dir().glob("*.yaml"))


def load_config(source: str | Path | None = None, overrides: Iterable[str] = ()) -> Loaded:
    """Merge defaults, a preset or YAML file, and `section.key=value` strings into one validated Config.

    Raises:
        ConfigError: unknown key, wrong value, unreadable file; one line with place and nearest right name.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if source is not None:
        for path in _chain(_find(source)):
            _merge_file(path, values, origins)
    for override in overrides:
        origins[set_from_text(values, override)] = "command line"
    values.setdefault("name", Path(source).stem if source is not None else "custom")
    return Loaded(_validate(values, origins), origins)


def with_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """A configuration with `section.key=value` changes.

    Raises:
        ConfigError: unknown key, wrong value, or changes that contradict it.
    """
    values = flatten_config(config)
    changed = [set_from_text(values, override) for override in overrides]
    return _validate(values, dict.fromkeys(changed, "command line"))


def config_from_dict(tree: Mapping[str, Any], where: str) -> Config:
    """Validate a stored configuration (of a run or of weights); `where` names it in errors."""
    values = flatten(tree, where)
    return _validate(values, dict.fromkeys(values, where))


def flatten_config(config: Config) -> dict[str, Any]:
    """Dotted key -> plain value, sections in order."""
    return flatten(config.dump(), "config")


def _find(source: str | Path) -> Path:
    path = Path(source)
    if _is_file(path):
        return path
    preset = presets_dir() / f"{source}.yaml"
    if len(path.parts) == 1 and not path.suffix and _is_file(preset):
        return preset
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        raise ConfigError(f"no configuration file {path}; give an existing YAML file or a preset: {_presets()}")
    raise ConfigError(
        f"no preset or file called '{source}'{did_you_mean(str(source), list_presets())}; presets: {_presets()}"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _presets() -> str:
    return ", ".join(list_presets())


def _chain(path: Path) -> list[Path]:
    """The files to apply, furthest ancestor first."""
    chain = [path]
    while base := read_yaml(chain[0])[0].get("extends"):
        if not isinstance(base, str):
            raise ConfigError(f"{chain[0]}: 'extends' is one preset or file, found {show(base)}")
        parent = _find(base)
        if parent in chain:
            raise ConfigError(f"{path}: 'extends' goes round in a circle through {parent}")
        chain.insert(0, parent)
    return chain


def _merge_file(path: Path, values: dict[str, Any], origins: dict[str, str]) -> None:
    tree, lines = read_yaml(path)
    tree.pop("extends", None)
    is_preset = path.parent == presets_dir()
    for key, value in flatten(tree, str(path), lines).items():
        values[key] = value
        origins[key] = f"preset {path.stem}" if is_preset else f"{path}:{lines.get(key, 1)}"
    values["name"] = tree.get("name", path.stem)


def _validate(values: dict[str, Any], origins: Mapping[str, str]) -> Config:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, origins)) from None


def _explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    """The first problem of a validation error, as one line."""
    problem = error.errors(include_url=False)[0]
    parts = [str(part) for part in problem["loc"]]
    key = next((k for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in all_keys()), ".".join(parts))
    where = origins.get(key)
    prefix = f"{where}: " if where else ""
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        section = f"{key}: " if key else ""
        changed = "" if where else _changed_in(key, origins)
        return f"{prefix}{section}{message}{changed}"
    return f"{prefix}{key}={show(problem['input'])}: {message[:1].lower()}{message[1:]}{_allowed(key)}"


def _changed_in(section: str, origins: Mapping[str, str]) -> str:
    """For a contradiction between settings: those of the section that the user set."""
    mine = [f"{key} from {where}" for key, where in origins.items() if key.startswith(section) and key != "name"]
    mine = [line for line in mine if "preset" not in line] or mine
    return f" (set: {'; '.join(mine[:4])})" if mine else ""


def _allowed(key: str) -> str:
    section, _, name = key.rpartition(".")
    field = sections().get(section, Config).model_fields.get(name)
    if field is None:
        return ""
    annotation = field.annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is Literal:
        return ""  # pydantic lists the values itself
    return f"; example: {key}={json.dumps(field.default, default=str)}" if field.default is not None else ""
