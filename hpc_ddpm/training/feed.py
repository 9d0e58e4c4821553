"""What the network sees in every micro step of a rank: read, augmented, and with its timestep and noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from hpc_ddpm.config import Config
from hpc_ddpm.data.dataset import Batch, Expand, VolumeDataset
from hpc_ddpm.data.loader import build_loader, copy_ahead
from hpc_ddpm.data.patches import PatchDataset, SampleBatches
from hpc_ddpm.data.sampler import StepBatches, dataset_index
from hpc_ddpm.diffusion.gaussian import TrainingDraw, draw_training, drop_covariates
from hpc_ddpm.diffusion.noise import mix64
from hpc_ddpm.distributed import Ranks, StopFlag, all_or_none
from hpc_ddpm.errors import HpcDdpmError


class Feed:
    """The micro batches of this rank from step `start` on.

    What cannot be read sets `stop.failure`; blank batches follow, so that this rank stays in step with the others
    until all of them end together. Their loss is not a number, so no rank takes the step.
    """

    def __init__(
        self,
        config: Config,
        dataset: VolumeDataset,
        start: int,
        num_rollbacks: int,
        ranks: Ranks,
        device: torch.device,
        stop: StopFlag,
    ) -> None:
        training = config.training
        self.config, self.device, self.stop = config, device, stop
        self.seed = data_seed(config.seed, num_rollbacks)
        self.batches = StepBatches(
            len(dataset),
            self.seed,
            start,
            training.num_steps - start,
            training.global_batch,
            training.micro_batch,
            ranks.rank,
            ranks.world_size,
        )
        self.accumulation = self.batches.accumulation
        self._expand = Expand(config.data.labels, config.augment, self.seed)
        self._covariates = all_or_none(partial(dataset.covariates, config.data.covariates)).to(device)
        self._loader = self._until_failure(dataset)

    def read(self) -> Batch:
        """The next micro batch, as stored, on the device."""
        return next(self._loader)

    def prepare(
        self, batch: Batch, step: int, micro_step: int
    ) -> tuple[torch.Tensor, torch.Tensor, TrainingDraw, torch.Tensor | None]:
        """Clean volumes (B, C, D, H, W), condition (B, K, D, H, W), what chance decides for them, covariates (B, V)."""
        samples = self.batches.sample_indices(step, micro_step)
        x_start, condition = self._expand(batch["image"], batch["mask"], samples)
        draw = draw_training(self.seed, samples, x_start.shape[1:], self.config.diffusion, self.device)
        return x_start, condition, draw, self._covariates_of(samples)

    def _covariates_of(self, samples: Sequence[int]) -> torch.Tensor | None:
        """Covariates (B, V), some of them dropped; None if the network has none."""
        if not self.config.data.covariates:
            return None
        of_volumes = self._covariates[[dataset_index(self.seed, index, len(self._covariates)) for index in samples]]
        return drop_covariates(of_volumes, self.seed, samples, self.config.diffusion.covariate_dropout)

    def _until_failure(self, dataset: VolumeDataset) -> Iterator[Batch]:
        num_workers, shape = self.config.data.num_workers, self.config.data.training_shape
        if self.config.data.patch_size:
            patches = PatchDataset(dataset, self.seed, shape)
            read = build_loader(patches, SampleBatches(self.batches), num_workers)
        else:
            read = build_loader(dataset, self.batches, num_workers)
        try:
            yield from copy_ahead(read, self.device)
        except HpcDdpmError as error:
            self.stop.failure = error
        size = self.config.training.micro_batch
        image = torch.full((size, self.config.data.num_modalities, *shape), torch.nan, device=self.device)
        mask = torch.zeros((size, *shape), dtype=torch.uint8, device=self.device)
        while True:
            yield {"image": image, "mask": mask, "index": torch.zeros(size, dtype=torch.int64)}


def data_seed(seed: int, num_rollbacks: int) -> int:
    """Seed for data order, timesteps, noise, crops and augmentation: the run's, and a new one after every roll-back."""
    return mix64(seed, num_rollbacks) if num_rollbacks else seed
