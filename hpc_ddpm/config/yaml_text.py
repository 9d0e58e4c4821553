"""YAML as settings need it: plain values only, with the line of every key, and bounds that no honest file reaches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hpc_ddpm.errors import ConfigError
from hpc_ddpm.sealed import UnreadableError, unseal
from hpc_ddpm.text import show

MAX_BYTES = 2**16
"""Most bytes of a text. Presets have 1 to 2 KiB; PyYAML takes a second for this much."""
MAX_EXPANDED = 2**16
"""Characters and values, after `*aliases` are filled in."""
MAX_DEPTH = 20
DEEPEST_SETTING = 6
LONGEST_KEY = 200
MAX_DIGITS = 70
LARGEST_INTEGER = 2**63 - 1

_TAG = "tag:yaml.org,2002:"
_PLAIN = {f"{_TAG}{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_FAULTS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""PyYAML's own, and what its constructors raise for `!!int ''` and the like."""


class Parsed(NamedTuple):
    """The value of a text, and the line of every dotted key, from 1."""

    value: Any
    lines: dict[str, int]


class _Loader(yaml.SafeLoader):
    """Dates and times of day are text, as users mean them: YAML 1.1 makes 8:30:00 a number of base 60."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth == MAX_DEPTH:
            raise _error(f"nested more than {MAX_DEPTH} deep", self.peek_event())
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        tag: str = super().resolve(kind, value, implicit)
        is_time = tag in (f"{_TAG}int", f"{_TAG}float") and ":" in value
        return f"{_TAG}str" if is_time or tag in (f"{_TAG}timestamp", f"{_TAG}value") else tag

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = 0 if len(node.value) > MAX_DIGITS else super().construct_yaml_int(node)
        if len(node.value) > MAX_DIGITS or abs(number) > LARGEST_INTEGER:
            raise _error(f"{show(node.value)} is too large a number", node)
        return number


_Loader.add_constructor(f"{_TAG}int", _Loader.construct_yaml_int)


def _error(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A settings file's mapping and the line of every dotted key.

    Raises:
        ConfigError: unreadable, not YAML, too large, no mapping, or a key given twice.
    """
    try:
        with path.open("rb") as file:
            text = unseal(file.read(MAX_BYTES + 1))[0].decode("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnreadableError as error:
        raise ConfigError(f"{path}: {error}; restore it, or take 'checksum' out of it if you changed it") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not valid YAML: no UTF-8 text") from None
    tree, lines = parse_yaml(text, str(path))
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections (data:, model:, ...), found a {type(tree).__name__}")
    return tree, lines


def parse_yaml(text: str, where: str) -> Parsed:
    """The value of a YAML text, of plain types.

    Raises:
        ConfigError: not YAML, tags of other types, a key given twice, something that refers to itself, nested or large
            beyond what settings are.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{where}: larger than {MAX_BYTES // 1024} KiB, which no settings are")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Parsed(None, {})
        _weigh(node, {})
        lines = _lines_of(node)
        return Parsed(loader.construct_document(node), lines)
    except _FAULTS as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark and "\n" in text else ""
        problem = (
            getattr(error, "problem", None) or getattr(error, "reason", None) or "a value that is none of its type"
        )
        raise ConfigError(f"{where}{line}: not valid YAML: {problem}") from None


def _weigh(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Characters and values of a node with its aliases filled in; each node is looked at once."""
    if id(node) in known:
        weight = known[id(node)]
        if weight is None:
            raise _error("refers to itself by an alias; write it out", node)
        return weight
    known[id(node)] = None
    if node.tag not in _PLAIN:
        raise _error(f"tag {show(node.tag)} is no plain value; write it without", node)
    if isinstance(node, yaml.ScalarNode):
        if _UNSEEN.search(node.value):
            raise _error(f"{show(node.value)} has a control character; remove it", node)
        weight = 1 + len(node.value)
    else:
        pairs = isinstance(node, yaml.MappingNode)
        parts = [part for pair in node.value for part in pair] if pairs else node.value
        weight = 1 + sum(_weigh(part, known) for part in parts)
    if weight > MAX_EXPANDED:
        raise _error("too large once its aliases are filled in; write out what is needed", node)
    known[id(node)] = weight
    return weight


def _lines_of(node: yaml.Node) -> dict[str, int]:
    lines: dict[str, int] = {}

    def visit(mapping: yaml.Node, prefix: str, depth: int) -> None:
        if not isinstance(mapping, yaml.MappingNode) or depth == DEEPEST_SETTING:
            return
        for key_node, value_node in mapping.value:
            if not isinstance(key_node, yaml.ScalarNode) or len(key_node.value) > LONGEST_KEY:
                raise _error(f"a key that is no word of at most {LONGEST_KEY} letters", key_node)
            key = f"{prefix}{key_node.value}"
            if key in lines and key_node.tag != f"{_TAG}merge":
                raise _error(f"{show(key)} is given twice", key_node)
            lines[key] = key_node.start_mark.line + 1
            visit(value_node, f"{key}.", depth + 1)

    visit(node, "", 0)
    return lines
