"""Single flipped bits in every kind of file: found, or harmless.

`python -m tests.integrity.test_flips` prints the table of docs/reliability.md; HPC_DDPM_FLIPS sets the flips of each.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from hpc_ddpm.config import load_config
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.phantom import write_phantoms
from tests.conftest import TINY
from tests.integrity.products import Product, build, changed, judge

FLIPS = int(os.environ.get("HPC_DDPM_FLIPS", "25"))


def flip(product: Product, count: int) -> Counter[str]:
    chance, content, wanted = random.Random(product.name), product.path.read_bytes(), product.look()
    verdicts: Counter[str] = Counter()
    for _ in range(count):
        damaged, place = bytearray(content), chance.randrange(8 * len(content))
        damaged[place // 8] ^= 1 << place % 8
        with changed(product.path, bytes(damaged)):
            verdicts[judge(product, wanted)] += 1
    return verdicts


@pytest.mark.slow
def test_flipped_bits_are_found_or_harmless(tiny_packed: Path, tmp_path: Path) -> None:
    verdicts = {product.name: flip(product, FLIPS) for product in build(tmp_path, tiny_packed) if product.is_checked}
    assert {name: dict(found) for name, found in verdicts.items() if found["missed"]} == {}
    assert all(found["found"] for found in verdicts.values())


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        config, folder = load_config(None, TINY).config, Path(name)
        write_phantoms(folder / "source", 10, (16, 16, 16), seed=1, modalities=("t1",), labels=config.data.labels)
        pack(folder / "source", folder / "tiny", config.data)
        print("| file | flips | found | harmless | missed |\n|---|---|---|---|---|")
        for product in filter(lambda product: product.is_checked, build(folder / "all", folder / "tiny")):
            found = flip(product, FLIPS)
            print(f"| {product.name} | {FLIPS} | {found['found']} | {found['harmless']} | {found['missed']} |")


if __name__ == "__main__":
    main()
