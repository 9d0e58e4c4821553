import json
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data import cache as caching
from hpc_ddpm.data.cache import VolumeCache, size_bytes
from hpc_ddpm.data.dataset import VolumeDataset, new_batch
from hpc_ddpm.data.loader import build_loader
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.sampler import StepBatches
from hpc_ddpm.distributed import Ranks, process_group
from hpc_ddpm.errors import ClusterError
from tests.conftest import rank_environment


@pytest.fixture
def packed_path(heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]) -> Path:
    pack(heads, tmp_path / "packed", tiny())
    return tmp_path / "packed"


@pytest.fixture
def cached(packed_path: Path) -> Iterator[VolumeDataset]:
    """The train split, kept in memory."""
    with process_group(Ranks()):
        dataset = VolumeDataset(packed_path)
        dataset.keep_in_ram()
        yield dataset


def crop(dataset: VolumeDataset, index: int, window: tuple[slice, slice, slice]) -> dict[str, torch.Tensor]:
    d, h, w = (part.stop - part.start for part in window)
    batch = new_batch(dataset.packed.data, (d, h, w), [index], pin_memory=False)
    dataset.fill_crop(batch, 0, index, window)
    return {"image": batch["image"][0], "mask": batch["mask"][0]}


def refuse(*arguments: object) -> None:
    raise AssertionError("decoded again")


def test_volumes_are_decoded_once(cached: VolumeDataset, packed_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, window = VolumeDataset(packed_path), np.s_[2:9, 0:10, 3:6]
    for _ in range(2):
        for index in range(len(plain)):
            whole, part = plain[index], crop(plain, index, window)
            for name in ("image", "mask"):
                assert torch.equal(cached[index][name], whole[name])
                assert torch.equal(crop(cached, index, window)[name], part[name])
        monkeypatch.setattr(cached.packed, "read", refuse)
    cached[0]["image"].zero_()
    assert torch.equal(cached[0]["image"], plain[0]["image"])


def test_readers_fill_the_same_memory(cached: VolumeDataset, packed_path: Path) -> None:
    batches = StepBatches(len(cached), 0, 0, 2 * len(cached), 1, 1, 0, 1)
    for _ in build_loader(cached, batches, 2):
        pass
    cached.packed.read = refuse
    plain = VolumeDataset(packed_path)
    for index in range(len(plain)):
        assert torch.equal(cached[index]["image"], plain[index]["image"])


RANK = """
    import json, os, signal, sys
    import torch.distributed as dist
    from hpc_ddpm.data.dataset import VolumeDataset

    rank, store, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    dataset, plain = VolumeDataset(path), VolumeDataset(path)
    dataset.keep_in_ram()
    if rank == 0:
        for index in range(len(dataset)):
            dataset[index]
    dist.barrier()
    memory = os.fstat(dataset.source._descriptor)
    if rank == 0:
        print(json.dumps([memory.st_dev, memory.st_ino, memory.st_size]), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.readline()  # rank 0 is gone
    dataset.packed.read = None
    equal = all((dataset[i][name] == plain[i][name]).all() for i in range(len(plain)) for name in ("image", "mask"))
    print(json.dumps([memory.st_dev, memory.st_ino, memory.st_size]), bool(equal), flush=True)
    os._exit(0)
"""


def test_ranks_share_one_copy_that_outlives_a_killed_owner(packed_path: Path, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(RANK))
    for attempt in range(2):
        command = [sys.executable, str(script)]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(tmp_path / f"store-{attempt}"), str(packed_path)],
                env=rank_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        first, _ = ranks[0].communicate(timeout=60)
        assert ranks[0].returncode == -signal.SIGKILL
        second, _ = ranks[1].communicate("\n", timeout=60)
        assert ranks[1].returncode == 0
        assert second.strip() == f"{first.strip()} True"
        data = VolumeDataset(packed_path)
        device, inode, size = json.loads(first)
        assert size == size_bytes(data.packed.data, len(data))
        assert not is_held(device, inode)


def is_held(device: int, inode: int) -> bool:
    """Whether any process still has this memory."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if (descriptor.stat().st_dev, descriptor.stat().st_ino) == (device, inode):
                return True
    return False


def test_the_memory_goes_with_its_last_holder(cached: VolumeDataset) -> None:
    cache = cached.source
    assert isinstance(cache, VolumeCache)
    other = pickle.loads(pickle.dumps(cache))
    path = Path(f"/proc/self/fd/{other._descriptor}")
    assert path.stat().st_ino == Path(f"/proc/self/fd/{cache._descriptor}").stat().st_ino
    assert not Path(str(path.readlink()).removesuffix(" (deleted)")).exists()
    del other
    assert not path.exists()


def test_not_enough_memory(packed_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "free_memory", lambda: 100)
    with (
        process_group(Ranks()),
        pytest.raises(ClusterError, match=r"cache=ram needs 0\.00 GiB for 5 volumes, 0\.00 GiB of memory are") as found,
    ):
        VolumeDataset(packed_path).keep_in_ram()
    assert found.value.is_on_all_ranks
