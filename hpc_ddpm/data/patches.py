"""Random crops for training. Where a crop lies is a function of (seed, number of the sample in the run). C D H W."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from hpc_ddpm.data.dataset import Batch, VolumeDataset, new_batch
from hpc_ddpm.data.sampler import StepBatches, dataset_index, sample_rng
from hpc_ddpm.data.shards import Window

_PATCH = 2  # purpose of the random numbers


class PatchDataset:
    """Crops from `volumes`; its items are the samples of a training run, without end."""

    def __init__(self, volumes: VolumeDataset, seed: int, shape: tuple[int, int, int]) -> None:
        self.volumes, self.seed, self.shape = volumes, seed, shape

    def new_batch(self, samples: Sequence[int], pin_memory: bool = False) -> Batch:
        """A batch with room for these crops, to be read by `fill`."""
        return new_batch(self.volumes.packed.data, self.shape, samples, pin_memory)

    def fill(self, batch: Batch, position: int) -> None:
        """As `VolumeDataset.fill`; `batch["index"]` holds samples of the run."""
        sample, whole = int(batch["index"][position]), self.volumes.packed.data.spatial_shape
        window = patch_window(self.seed, sample, whole, self.shape)
        self.volumes.fill_crop(batch, position, dataset_index(self.seed, sample, len(self.volumes)), window)


def patch_window(seed: int, sample: int, whole: tuple[int, int, int], part: tuple[int, int, int]) -> Window:
    """The crop of a sample; every position inside the volume is equally likely."""
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
