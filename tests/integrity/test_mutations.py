"""Hostile content of every JSON and JSONL file that is read back: taken, or refused in one line.

HPC_DDPM_MUTATIONS=20000 tries that many of each; HPC_DDPM_MUTATION_SEED=N other ones. A failure names its input.
"""

from __future__ import annotations

import copy
import json
import os
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc_ddpm.errors import HpcDdpmError
from hpc_ddpm.sealed import KEY, seal
from hpc_ddpm.text import has_control
from tests.integrity.products import FoundError, Product, build, changed

TRIES = int(os.environ.get("HPC_DDPM_MUTATIONS", "40"))
SEED = int(os.environ.get("HPC_DDPM_MUTATION_SEED", "0"))
LONGEST_S = 20.0
"""Processor time in seconds for one input; an honest input takes milliseconds."""
STRANGE: list[Any] = [
    *(None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "x", "../../OUTSIDE", "/tmp/x"),
    *("a\nb", "\udc80", "x" * 5000, [], [[]], {}, {"": None}, ["x"], [None] * 100, {"a": {"a": {"a": []}}}),
]
TEXTS = [b"", b"\xff", b"[" * 200_000, b'{"a":' * 100_000, b"null", b"[]", b'"x"', b"9" * 5000, b"\0" * 100, b"{}\n{"]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


def twisted(value: dict[str, Any], chance: random.Random) -> Any:
    """With something else in one place, a key gone, or another name of one."""
    value = copy.deepcopy(value)
    *parents, last = chance.choice(places(value)[1:])
    holder = value
    for key in parents:
        holder = holder[key]
    part = holder.pop(last)
    if chance.random() < 0.7:
        new = chance.choice(STRANGE)
        holder.insert(last, new) if isinstance(holder, list) else holder.update({last: new})
    elif isinstance(holder, dict) and chance.random() < 0.5:
        holder[f"{last}x"] = part
    return value


def mutate(whole: bytes, chance: random.Random, has_lines: bool) -> bytes:
    """Bytes of the file changed; or content of another shape, without a checksum or with the right one."""
    way = chance.randrange(6)
    if way == 0:
        return chance.choice(TEXTS)
    lines = whole.splitlines() if has_lines else [whole]
    number = chance.randrange(len(lines))
    if way == 1:
        begin = chance.randrange(len(whole))
        end = min(len(whole), begin + chance.randrange(1, 9))
        return whole[:begin] + chance.choice([b"", b"\xff", b"\0", b"]", b"{", chance.randbytes(4)]) + whole[end:]
    content = json.loads(lines[number])
    content.pop(KEY, None)
    text = json.dumps(twisted(content, chance))
    lines[number] = (text if way == 2 or not text.startswith("{") else seal(text)).encode()
    return b"\n".join(lines) + b"\n"


def refusal(look: Callable[[], Any]) -> str:
    """What the reader says, if it refuses; a bug's exception passes through."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            look()
        except (HpcDdpmError, FoundError) as error:
            return str(error)
    return str(said[0].message) if said else ""


@pytest.mark.slow
def test_readers_take_or_refuse_whatever_comes(tiny_packed: Path, tmp_path: Path) -> None:
    for product in build(tmp_path, tiny_packed):
        if product.is_json:
            attack(product)


def attack(product: Product) -> None:
    chance, whole = random.Random(f"{SEED} {product.name}"), product.path.read_bytes()
    for number in range(TRIES):
        hostile = mutate(whole, chance, product.path.suffix == ".jsonl")
        shown = f"{product.name}, try {number}: {hostile[:2000]!r}"
        began = time.process_time()
        with changed(product.path, hostile):
            try:
                line = refusal(product.look)
            except Exception as error:
                raise AssertionError(shown) from error
        assert time.process_time() - began < LONGEST_S, shown
        assert not has_control(line), f"{shown}: {line!r}"
        assert len(line) < 1500, shown
