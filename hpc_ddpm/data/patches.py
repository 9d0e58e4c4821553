"""Random crops for training. Where a crop lies is a function of (seed, number of the sample in the run). C D H W."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Dataset, Sampler

from hpc_ddpm.data.dataset import Item, VolumeDataset
from hpc_ddpm.data.sampler import StepBatches, dataset_index, sample_rng
from hpc_ddpm.data.shards import Window

_PATCH = 2  # purpose of the random numbers


class PatchDataset(Dataset[Item]):
    """Crops of the volumes of `volumes`; its items are the samples of a training run, of which there is no end."""

    def __init__(self, volumes: VolumeDataset, seed: int, shape: tuple[int, int, int]) -> None:
        self.volumes, self.seed, self.shape = volumes, seed, shape

    def __getitem__(self, sample: int) -> Item:
        index = dataset_index(self.seed, sample, len(self.volumes))
        whole = self.volumes.packed.data.spatial_shape
        return self.volumes.crop(index, patch_window(self.seed, sample, whole, self.shape))


def patch_window(seed: int, sample: int, whole: tuple[int, int, int], part: tuple[int, int, int]) -> Window:
    """The crop of a sample: every place that lies inside is as likely."""
    first = sample_rng(seed, sample, _PATCH).integers([size - side + 1 for size, side in zip(whole, part, strict=True)])
    d, h, w = (slice(begin, begin + side) for begin, side in zip(first.tolist(), part, strict=True))
    return d, h, w


class SampleBatches(Sampler[list[int]]):
    """The micro batches of `batches` as sample numbers, for PatchDataset."""

    def __init__(self, batches: StepBatches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.batches
        for step in range(batches.start_step, batches.start_step + batches.num_steps):
            for micro_step in range(batches.accumulation):
                yield list(batches.sample_indices(step, micro_step))

    def __len__(self) -> int:
        return len(self.batches)
