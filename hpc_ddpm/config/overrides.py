"""`section.key=value` of the command line, put among other values; also into one: `data.labels.names.1=brain`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hpc_ddpm.config.keys import sections, split_key
from hpc_ddpm.config.sections import Config
from hpc_ddpm.config.yaml_text import parse_yaml
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.text import show

_POWER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d{1,3}", re.ASCII)
_NOT_VERBATIM = re.compile(r"""["'\[{]|(null|Null|NULL|~)$""")


def set_from_text(values: dict[str, Any], text: str) -> str:
    """Change `values` (dotted key -> value; what is absent is the default) as `section.key=value` says; the setting.

    Raises:
        ConfigError: no such setting or part of one, or a value that is not YAML.
    """
    key, separator, raw = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"{show(text)} is not of the form section.key=value, for example training.zero_stage=2")
    setting, way = split_key(key.strip(), "command line")
    value = _value(raw.strip(), show(text), is_text=not way and _is_text(setting))
    if way:
        before = values[setting] if setting in values else _default(setting)
        value = _with(before, way, value, setting)
    values[setting] = value
    return setting


def _value(raw: str, where: str, *, is_text: bool) -> Any:
    """As YAML reads it; but what a text setting is given is text, and `a,b` is a list."""
    if is_text and not _NOT_VERBATIM.match(raw):
        return raw
    value = parse_yaml(raw, where).value
    if not isinstance(value, str) or raw[:1] in {"'", '"'}:
        return value
    if _POWER.fullmatch(value):  # YAML 1.1 reads 1e-4 as text
        return float(value)
    return parse_yaml(f"[{raw}]", where).value if "," in value else value


def _is_text(setting: str) -> bool:
    section, _, name = setting.rpartition(".")
    return sections()[section].model_fields[name].annotation is str


def _default(setting: str) -> Any:
    value: Any = Config().model_dump(mode="json")
    for name in setting.split("."):
        value = value[name]
    return value


def _with(node: Any, way: list[str], value: Any, name: str) -> Any:
    """A copy of a value with one part of it changed; `way` leads there, by numbers from 0 or names.

    Raises:
        ConfigError: there is no such part.
    """
    step, *rest = way
    if isinstance(node, Mapping):
        key = next((each for each in node if str(each) == step), step)
        return {**node, key: _with(node.get(key, {}), rest, value, f"{name}.{step}") if rest else value}
    if not isinstance(node, list | tuple):
        found = "is not set" if node is None else f"is {show(node)}"
        raise ConfigError(f"command line: {name} {found}, and has no part '{step}'; give it whole, {name}=...")
    if not step.isdecimal() or int(step[:9]) >= len(node):
        there = f"has the parts 0 to {len(node) - 1}" if node else f"is empty; give it whole, {name}=[...]"
        raise ConfigError(f"command line: {name} {there}, found '{step}'")
    parts = list(node)
    parts[int(step)] = _with(parts[int(step)], rest, value, f"{name}.{step}") if rest else value
    return parts
