"""Many subjects, many shards, and how little packing loads."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hpc_ddpm.config import DataConfig, LabelsConfig
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.phantom import write_phantoms
from hpc_ddpm.data.shards import INDEX, ShardEntry, open_packed, shard_name, write_index


def test_packing_loads_no_torch() -> None:
    code = "import sys, hpc_ddpm.data.pack, hpc_ddpm.data.team; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_a_hundred_thousand_subjects_open_in_no_time(tmp_path: Path) -> None:
    entries, per_shard = [], 400
    for number in range(250):
        (tmp_path / shard_name(number)).write_bytes(b"x")
        entry = ShardEntry(
            file=shard_name(number),
            size_bytes=1,
            sha256="0" * 64,
            digest="0" * 24,
            id=[f"subject-{number * per_shard + i:07d}" for i in range(per_shard)],
            val=list(range(0, per_shard, 10)),
            test=[],
            left_out={},
            crc32_image="0123abcd" * 4 * per_shard,
            crc32_mask="0123abcd" * per_shard,
        )
        entries.append(entry)
    data = DataConfig(modalities=("a", "b", "c", "d"), labels=LabelsConfig())
    write_index(tmp_path, data.model_dump(mode="json"), entries)
    opening, parsing = [], []
    for _ in range(7):
        begin = time.process_time()
        packed = open_packed(tmp_path)
        opening.append(time.process_time() - begin)
        begin = time.process_time()
        json.loads((tmp_path / INDEX).read_bytes())
        parsing.append(time.process_time() - begin)
    assert len(packed) == 100_000
    assert len(packed.subjects("val")) == 10_000
    assert min(opening) < 8 * min(parsing), "a step for each subject in Python takes longer"


@pytest.mark.slow
def test_many_shards_need_few_files(tmp_path: Path) -> None:
    heads = write_phantoms(tmp_path / "heads", 256, (8, 8, 8))
    pack(heads, tmp_path / "out", DataConfig(size=(8, 8, 8), shard_size_gib=1e-9), num_workers=2)
    packed = open_packed(tmp_path / "out")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, limit[1]))
    try:
        for index in np.random.default_rng(0).permutation(np.repeat(np.arange(256), 3)):
            packed.read(int(index))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
