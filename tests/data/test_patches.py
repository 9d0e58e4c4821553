import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_ddpm.config import DataConfig, load_config
from hpc_ddpm.data import shards
from hpc_ddpm.data.dataset import VolumeDataset
from hpc_ddpm.data.loader import build_loader
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.patches import PatchDataset, SampleBatches, patch_window
from hpc_ddpm.data.sampler import StepBatches, dataset_index
from hpc_ddpm.data.shards import config_digest, open_packed
from hpc_ddpm.data.verify import verify
from hpc_ddpm.errors import ConfigError, DataFormatError
from hpc_ddpm.files import write_json

WHOLE, PART = (12, 10, 8), (4, 6, 8)
"""(D, H, W)."""


@pytest.fixture
def chunked(heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]) -> Path:
    """Six subjects; chunks of (Z, Y, X) = (4, 4, 5) do not divide the volume."""
    pack(heads, tmp_path / "chunked", tiny(chunk_size=(5, 4, 4)))
    return tmp_path / "chunked"


def test_chunks_change_the_files_and_no_voxel(
    chunked: Path, heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]
) -> None:
    pack(heads, tmp_path / "whole", tiny())
    whole, parts = open_packed(tmp_path / "whole"), open_packed(chunked)
    window = np.s_[3:9, 0:10, 5:8]
    for index in range(6):
        image, mask = whole.read(index)
        for found, expected in zip(parts.read(index), (image, mask), strict=True):
            np.testing.assert_array_equal(found, expected)
        for packed in (whole, parts):
            cut = packed.read_window(index, window)
            np.testing.assert_array_equal(cut[0], image[:, *window])
            np.testing.assert_array_equal(cut[1], mask[window])
    with shards.open_reader(chunked / "shard-00000.h5") as file:
        assert (file["image"].chunks, file["mask"].chunks) == ((1, 1, 4, 4, 5), (1, 4, 4, 5))
    assert verify(chunked, deep=True) == []


def test_only_touched_chunks_are_read_and_damage_is_named(chunked: Path) -> None:
    shard = chunked / "shard-00000.h5"
    with shards.open_reader(shard) as file:
        chunks = [file["image"].id.get_chunk_info(i) for i in range(file["image"].id.get_num_chunks())]
    chunk = next(chunk for chunk in chunks if chunk.chunk_offset == (2, 0, 4, 0, 5))
    data = bytearray(shard.read_bytes())
    data[chunk.byte_offset + chunk.size // 2] ^= 4
    shard.write_bytes(data)
    packed = open_packed(chunked)
    packed.read_window(2, np.s_[0:4, 0:10, 0:8])
    packed.read_window(2, np.s_[4:8, 4:10, 5:8])
    packed.read_window(1, np.s_[4:8, 0:4, 5:8])
    with pytest.raises(DataFormatError, match=r"shard-00000\.h5: damaged at subject head_0002: the image cannot be"):
        packed.read_window(2, np.s_[7:9, 3:4, 7:8])


def test_datasets_from_before_chunks_are_as_they_were(heads: Path, tmp_path: Path, tiny: Callable) -> None:
    assert config_digest(DataConfig()) == "44136fa355b3"
    assert config_digest(DataConfig(patch_size=(16, 16, 16), cache="ram", stage_dir="/tmp")) == "44136fa355b3"
    assert config_digest(DataConfig(chunk_size=(16, 16, 16))) != "44136fa355b3"
    pack(heads, tmp_path / "old", tiny())
    index = json.loads((tmp_path / "old" / "index.json").read_text())
    for name in ("chunk_size", "patch_size", "cache", "stage_dir"):
        del index["data"][name]
    write_json(tmp_path / "old" / "index.json", index)
    assert pack(heads, tmp_path / "old", tiny()).num_written == 0
    with pytest.raises(DataFormatError, match=r"other settings \(data\.chunk_size\)"):
        pack(heads, tmp_path / "old", tiny(chunk_size=(4, 4, 4)))


def test_crops_lie_inside_and_everywhere() -> None:
    windows = [patch_window(1, sample, WHOLE, PART) for sample in range(400)]
    for axis, (whole, part) in enumerate(zip(WHOLE, PART, strict=True)):
        starts = [window[axis].start for window in windows]
        assert {window[axis].stop - window[axis].start for window in windows} == {part}
        assert set(starts) == set(range(whole - part + 1))
    assert windows != [patch_window(2, sample, WHOLE, PART) for sample in range(400)]


def clone(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The loader reads into its buffers again."""
    return {name: tensor.clone() for name, tensor in batch.items()}


def samples_of_a_step(dataset: VolumeDataset, world_size: int, micro_batch: int) -> list[dict[str, torch.Tensor]]:
    """Eight crops in the order of the samples, put together from all ranks."""

    def rank_batches(rank: int) -> Iterator[dict[str, torch.Tensor]]:
        batches = SampleBatches(StepBatches(len(dataset), 7, 3, 1, 8, micro_batch, rank, world_size))
        assert len(batches) == 8 // (micro_batch * world_size)
        return iter(build_loader(PatchDataset(dataset, 7, PART), batches, 0))

    loaders = [rank_batches(rank) for rank in range(world_size)]
    micro_steps = 8 // (micro_batch * world_size)
    batches = [clone(next(loader)) for _ in range(micro_steps) for loader in loaders]
    return [{key: batch[key][i] for key in batch} for batch in batches for i in range(micro_batch)]


def test_all_world_sizes_see_the_same_crops(chunked: Path) -> None:
    dataset = VolumeDataset(chunked)
    expected = samples_of_a_step(dataset, 1, 1)
    for number, crop in enumerate(expected, 3 * 8):
        assert int(crop["index"]) == number
        whole, window = dataset[dataset_index(7, number, len(dataset))], patch_window(7, number, WHOLE, PART)
        assert torch.equal(crop["image"], whole["image"][:, *window])
        assert torch.equal(crop["mask"], whole["mask"][window])
    for world_size, micro_batch in ((2, 1), (4, 2), (1, 8)):
        for found, wanted in zip(samples_of_a_step(dataset, world_size, micro_batch), expected, strict=True):
            assert torch.equal(found["image"], wanted["image"])
            assert torch.equal(found["mask"], wanted["mask"])


def test_patches_that_do_not_fit() -> None:
    levels = "model.channel_multipliers=[1,1,2]"
    with pytest.raises(ConfigError, match=r"data\.patch_size \[30, 64, 64\] is not divisible by 4 .*\[32, 64, 64\]"):
        load_config(None, [levels, "data.patch_size=[30,64,64]"])
    with pytest.raises(ConfigError, match=r"patch_size \[64, 64, 256\] must lie between 1 and size \[128, 128, 128\]"):
        load_config(None, ["data.patch_size=[64,64,256]"])
    with pytest.raises(ConfigError, match=r"chunk_size \[0, 64, 64\] must lie between 1 and size"):
        load_config(None, ["data.chunk_size=[0,64,64]"])
