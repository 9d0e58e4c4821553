import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.dataset import Batch, VolumeDataset
from hpc_ddpm.data.loader import build_loader, copy_ahead
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.sampler import StepBatches
from hpc_ddpm.errors import DataFormatError


@pytest.fixture
def dataset(heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]) -> VolumeDataset:
    """Five subjects in two shards."""
    pack(heads, tmp_path / "out", tiny(shard_size_gib=4 * 8 * 10 * 12 * 3 / 2**30))
    return VolumeDataset(tmp_path / "out")


class SlowFirst(VolumeDataset):
    """Reads slower the earlier a volume was asked for; the first ones wait until as many readers have come."""

    def __init__(self, path: Path, num_readers: int) -> None:
        super().__init__(path)
        self.asked, self.lock, self.all_there = 0, threading.Lock(), threading.Barrier(num_readers)

    def fill(self, batch: Batch, position: int) -> None:
        with self.lock:
            self.asked += 1
            asked = self.asked
        if asked <= self.all_there.parties:
            self.all_there.wait(timeout=60)
        time.sleep(0.03 if asked % 3 == 1 else 0)
        super().fill(batch, position)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_order_and_content(dataset: VolumeDataset, num_workers: int, micro_batch: int) -> None:
    slow, expected = SlowFirst(dataset.packed.path, max(1, num_workers)), [dataset[i] for i in range(len(dataset))]
    batches = StepBatches(len(dataset), 0, 2, 6, 4, micro_batch, 0, 1)
    indices = []
    for batch in copy_ahead(build_loader(slow, batches, num_workers), torch.device("cpu")):
        time.sleep(0.01)  # readers are ahead now: they must leave this batch alone
        indices.append(batch["index"].tolist())
        for position, index in enumerate(indices[-1]):
            assert torch.equal(batch["image"][position], expected[index]["image"])
            assert torch.equal(batch["mask"][position], expected[index]["mask"])
    assert indices == list(batches)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_few_buffers_serve_many_batches(dataset: VolumeDataset, num_workers: int) -> None:
    loader = build_loader(dataset, [[i % 5] for i in range(40)], num_workers)
    assert len({batch["image"].data_ptr() for batch in loader}) <= num_workers + 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_a_gpu_stay_as_they_were_read(dataset: VolumeDataset) -> None:
    indices = [[i % len(dataset)] for i in range(30)]
    for batch, (index,) in zip(
        copy_ahead(build_loader(dataset, indices, 2), torch.device("cuda")), indices, strict=True
    ):
        time.sleep(0.01)
        assert torch.equal(batch["image"][0].cpu(), dataset[index]["image"])
        assert torch.equal(batch["mask"][0].cpu(), dataset[index]["mask"])


def test_damage_is_reported_when_its_turn_comes(dataset: VolumeDataset) -> None:
    shard = dataset.packed.path / "shard-00001.h5"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    shards = [dataset.packed._index.shard[subject.index] for subject in dataset.subjects]
    sound, damaged = shards.index(0), shards.index(1)
    loader = build_loader(dataset, [[sound], [sound], [damaged], [sound]], 2)
    assert [next(loader)["index"].item() for _ in range(2)] == [sound, sound]
    with pytest.raises(DataFormatError, match=r"shard-00001\.h5: damaged shard"):
        next(loader)
    assert not readers()


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("hpc_ddpm-read")]


def test_leaving_early_ends_the_readers(dataset: VolumeDataset) -> None:
    loader: Iterator[Batch] = copy_ahead(build_loader(dataset, [[0]] * 1000, 2), torch.device("cpu"))
    next(loader)
    assert readers()
    loader.close()
    assert not readers()


SIGNALS = """
    import os, signal, sys, threading
    from hpc_ddpm.data.dataset import VolumeDataset
    from hpc_ddpm.data.loader import build_loader
    from hpc_ddpm.distributed import StopFlag

    with StopFlag() as stop:
        loader = build_loader(VolumeDataset(sys.argv[1]), [[0]] * 1000, 2)
        for number, batch in zip(range(50), loader):
            os.kill(os.getpid(), signal.SIGTERM)
    print("served", number + 1, flush=True)
    keep = globals()["loader"]  # alive at exit, as after an exception in a training loop
"""


def test_a_signal_disturbs_no_reader(dataset: VolumeDataset, tmp_path: Path) -> None:
    script = tmp_path / "signals.py"
    script.write_text(textwrap.dedent(SIGNALS))
    command = [sys.executable, script, dataset.packed.path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "served 50\n"), done.stderr
    assert signal.SIGTERM.name not in done.stderr
