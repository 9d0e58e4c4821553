"""From defaults, presets, YAML files and `section.key=value` strings to one Config, with where each value came from.

Later wins: defaults < preset (`extends` chains) < YAML file < command line.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from hpc_ddpm.config.sections import Config, Section
from hpc_ddpm.errors import ConfigError


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
        key, value = _parse_override(override)
        values[key] = value
        origins[key] = "command line"
    values.setdefault("name", Path(source).stem if source is not None else "custom")
    return Loaded(_validate(values, origins), origins)


def with_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """A configuration with `section.key=value` changes.

    Raises:
        ConfigError: unknown key, wrong value, or changes that contradict it.
    """
    changes = dict(map(_parse_override, overrides))
    return _validate(flatten_config(config) | changes, dict.fromkeys(changes, "command line"))


def config_from_dict(tree: Mapping[str, Any], where: str) -> Config:
    """Validate a stored configuration (of a run or of weights); `where` names it in errors."""
    values = _flatten(tree, where)
    return _validate(values, dict.fromkeys(values, where))


def flatten_config(config: Config) -> dict[str, Any]:
    """Dotted key -> plain value, sections in order."""
    return _flatten(config.dump(), "config")


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    preset = presets_dir() / f"{source}.yaml"
    if len(path.parts) == 1 and not path.suffix and preset.is_file():
        return preset
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        raise ConfigError(f"no configuration file {path}; give an existing YAML file or a preset: {_presets()}")
    raise ConfigError(
        f"no preset or file called '{source}'{did_you_mean(str(source), list_presets())}; presets: {_presets()}"
    )


def _presets() -> str:
    return ", ".join(list_presets())


def _chain(path: Path) -> list[Path]:
    """The files to apply, furthest ancestor first."""
    chain = [path]
    while base := read_yaml(chain[0])[0].get("extends"):
        parent = _find(base)
        if parent in chain:
            raise ConfigError(f"{path}: 'extends' goes round in a circle through {parent}")
        chain.insert(0, parent)
    return chain


def _merge_file(path: Path, values: dict[str, Any], origins: dict[str, str]) -> None:
    tree, lines = read_yaml(path)
    tree.pop("extends", None)
    is_preset = path.parent == presets_dir()
    for key, value in _flatten(tree, str(path), lines).items():
        values[key] = value
        origins[key] = f"preset {path.stem}" if is_preset else f"{path}:{lines.get(key, 1)}"
    values["name"] = tree.get("name", path.stem)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A settings file's mapping and the line of every dotted key.

    Raises:
        ConfigError: unreadable, not YAML, no mapping, or a key given twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections (data:, model:, ...), found a {type(tree).__name__}")
    lines: dict[str, int] = {}

    def visit(mapping: yaml.Node | None, prefix: str) -> None:
        if isinstance(mapping, yaml.MappingNode):
            for key_node, value_node in mapping.value:
                key = f"{prefix}{key_node.value}"
                if key in lines:
                    raise ConfigError(f"{path}:{key_node.start_mark.line + 1}: '{key}' is given twice")
                lines[key] = key_node.start_mark.line + 1
                visit(value_node, f"{key}.")

    visit(node, "")
    return tree, lines


def _parse_override(text: str) -> tuple[str, Any]:
    key, separator, raw = text.partition("=")
    key = key.strip()
    if not separator or not key:
        raise ConfigError(f"'{text}' is not of the form section.key=value, for example training.zero_stage=2")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"'{text}': the value is not valid YAML") from error
    if isinstance(value, str):
        try:  # YAML 1.1 reads 1e-4 as text
            value = float(value)
        except ValueError:
            if "," in value and not value.startswith(("[", "{")):
                value = [yaml.safe_load(part) for part in value.split(",")]
    nested = _flatten(_nest(key, value), "command line")
    if list(nested) != [key]:
        raise ConfigError(f"'{text}': '{key}' is a section; give one of its settings: {', '.join(_children(key))}")
    return key, value


def _nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return typing.cast("dict[str, Any]", value)


def _sections() -> dict[str, type[Section]]:
    """Dotted prefix -> section class, the root as ''."""
    found: dict[str, type[Section]] = {}

    def visit(prefix: str, section: type[Section]) -> None:
        found[prefix] = section
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                visit(f"{prefix}.{name}".strip("."), field.annotation)

    visit("", Config)
    return found


def _children(section: str) -> list[str]:
    prefix = f"{section}." if section else ""
    return [f"{prefix}{name}" for name in _sections()[section].model_fields]


def _all_keys() -> list[str]:
    sections = _sections()
    return [key for section in sections for key in _children(section) if key not in sections]


def _flatten(tree: Mapping[str, Any], where: str, lines: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Nested sections to dotted keys, refusing what no section knows."""
    sections = _sections()
    flat: dict[str, Any] = {}

    def place(key: str) -> str:
        return f"{where}:{lines[key]}" if lines and key in lines else where

    def visit(prefix: str, node: Mapping[str, Any]) -> None:
        for name, value in node.items():
            key = f"{prefix}.{name}".strip(".")
            if key in sections:
                if not isinstance(value, Mapping):
                    raise ConfigError(f"{place(key)}: '{key}' is a section; give one of {', '.join(_children(key))}")
                visit(key, value)
            elif name in sections[prefix].model_fields:
                flat[key] = value
            else:
                raise ConfigError(f"{place(key)}: unknown setting '{key}'{_suggest(key, prefix)}")

    visit("", tree)
    return flat


def _suggest(key: str, section: str) -> str:
    siblings = _children(section)
    elsewhere = [name for name in _all_keys() if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = elsewhere or difflib.get_close_matches(key, siblings, n=1, cutoff=0.7)
    near = near or difflib.get_close_matches(key, _all_keys(), n=1, cutoff=0.7)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; {section or 'the top level'} has: {', '.join(name.rsplit('.', 1)[-1] for name in siblings)}"


def did_you_mean(word: str, known: list[str]) -> str:
    """`; did you mean 'NAME'?` for an error about a wrong name, empty where nothing is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


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
    key = next((k for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in _all_keys()), ".".join(parts))
    where = origins.get(key)
    prefix = f"{where}: " if where else ""
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        section = f"{key}: " if key else ""
        changed = "" if where else _changed_in(key, origins)
        return f"{prefix}{section}{message}{changed}"
    return f"{prefix}{key}={problem['input']!r}: {message[0].lower()}{message[1:]}{_allowed(key)}"


def _changed_in(section: str, origins: Mapping[str, str]) -> str:
    """For a contradiction between settings: those of the section that the user set."""
    mine = [f"{key} from {where}" for key, where in origins.items() if key.startswith(section) and key != "name"]
    mine = [line for line in mine if "preset" not in line] or mine
    return f" (set: {'; '.join(mine[:4])})" if mine else ""


def _allowed(key: str) -> str:
    section, _, name = key.rpartition(".")
    field = _sections().get(section, Config).model_fields.get(name)
    if field is None:
        return ""
    annotation = field.annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is Literal:
        return ""  # pydantic lists the values itself
    return f"; example: {key}={json.dumps(field.default, default=str)}" if field.default is not None else ""
