"""Dotted keys: which settings there are, and what was meant by one that is not."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from hpc_ddpm.config.sections import Config, Section
from hpc_ddpm.errors import ConfigError


@lru_cache(maxsize=1)
def sections() -> dict[str, type[Section]]:
    """Dotted prefix -> section class, the root as ''."""
    found: dict[str, type[Section]] = {}

    def visit(prefix: str, section: type[Section]) -> None:
        found[prefix] = section
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                visit(f"{prefix}.{name}".strip("."), field.annotation)

    visit("", Config)
    return found


def children(section: str) -> list[str]:
    """Dotted keys of a section's settings and sections."""
    prefix = f"{section}." if section else ""
    return [f"{prefix}{name}" for name in sections()[section].model_fields]


@lru_cache(maxsize=1)
def all_keys() -> tuple[str, ...]:
    """Dotted keys of all settings."""
    return tuple(key for section in sections() for key in children(section) if key not in sections())


def flatten(tree: Mapping[str, Any], where: str, lines: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Nested sections to dotted keys.

    Raises:
        ConfigError: no section knows a key, or a section has a value of its own.
    """
    flat: dict[str, Any] = {}

    def place(key: str) -> str:
        return f"{where}:{lines[key]}" if lines and key in lines else where

    def visit(prefix: str, node: Mapping[str, Any]) -> None:
        for name, value in node.items():
            key = f"{prefix}.{name}" if prefix else str(name)
            if key in all_keys():
                flat[key] = value
            elif key in sections() and isinstance(value, Mapping):
                visit(key, value)
            else:
                raise unknown(key, place(key))

    visit("", tree)
    return flat


def split_key(key: str, where: str) -> tuple[str, list[str]]:
    """`data.labels.names.1` to the setting `data.labels.names` and the way into its value, `[1]`.

    Raises:
        ConfigError: there is no such setting.
    """
    parts, prefix = key.split("."), ""
    for number, name in enumerate(parts, start=1):
        if name not in sections()[prefix].model_fields:
            break
        prefix = f"{prefix}.{name}".strip(".")
        if prefix not in sections():
            return prefix, parts[number:]
    raise unknown(".".join(parts[:number]), where)


def unknown(key: str, where: str) -> ConfigError:
    """The error about a key that is no setting: a section, or nothing at all."""
    if key and key in sections():
        return ConfigError(f"{where}: '{key}' is a section; give one of {', '.join(children(key))}")
    section = key.rpartition(".")[0]
    while section not in sections():
        section = section.rpartition(".")[0]
    return ConfigError(f"{where}: unknown setting '{key}'{_suggest(key, section)}")


def _suggest(key: str, section: str) -> str:
    siblings, leaf = children(section), key.rsplit(".", 1)[-1]
    elsewhere = [name for name in all_keys() if name.rsplit(".", 1)[-1] == leaf and name != key]
    near = elsewhere or _close(key, siblings, 0.7) or _close(key, list(all_keys()), 0.7)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; {section or 'the top level'} has: {', '.join(name.rsplit('.', 1)[-1] for name in siblings)}"


def did_you_mean(word: str, known: list[str]) -> str:
    """`; did you mean 'NAME'?` for an error about a wrong name, empty where nothing is near."""
    near = _close(word, known, 0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def _close(word: str, known: list[str], cutoff: float) -> list[str]:
    """Comparing takes the square of the length."""
    return difflib.get_close_matches(word[:200], known, n=1, cutoff=cutoff)
