"""Volumes sampled while training goes on: the same held-out masks and seeds every time.

RUN/previews/step_00001000.png                    a row per mask: what was generated, with the mask's outlines
RUN/previews/step_00001000/<subject>/<modality>.nii.gz, mask.nii.gz
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_ddpm.config import Config
from hpc_ddpm.data.check.pictures import Pixels, draw, encode_png, stack
from hpc_ddpm.data.fidelity import background_fidelity
from hpc_ddpm.data.labels import covers_foreground, one_hot
from hpc_ddpm.data.nifti import ras_voxel_size_mm, turn_to_ras, write_nifti
from hpc_ddpm.diffusion.gaussian import Model
from hpc_ddpm.diffusion.noise import NoiseSource, mix64
from hpc_ddpm.diffusion.samplers import sample
from hpc_ddpm.diffusion.schedules import build_schedule
from hpc_ddpm.distributed import Ranks, all_gather, all_or_none
from hpc_ddpm.files import atomic_path, writing_to
from hpc_ddpm.runlog import RunLog
from hpc_ddpm.training.engine import Engine
from hpc_ddpm.training.held_out import HeldOut, HeldOutVolume

FOLDER = "previews"
ROW_HEIGHT = 128
_SEED = 13  # what a key is used for


class Previews:
    """Samples the masks of a few held-out volumes with `config.sampling`.

    Raises:
        DataFormatError: the val split is empty.
    """

    def __init__(self, config: Config, packed: Path, run_dir: Path, ranks: Ranks, device: torch.device) -> None:
        self.config, self.folder, self.ranks, self.device = config, run_dir / FOLDER, ranks, device
        limit, covariates = config.training.preview_volumes, config.data.covariates
        self.volumes = HeldOut(packed, limit, covariates, ranks, device)
        self.schedule = build_schedule(config.diffusion)

    def make(self, engine: Engine, step: int, log: RunLog) -> dict[str, float]:
        """Write the previews of a step; `preview_fidelity`, where the labels cover the whole brain. A collective.

        Raises:
            ClusterError: the run directory cannot be written; on all ranks.
        """
        made: list[tuple[int, Pixels, float]] = []
        folder = self.folder / f"step_{step:08d}"
        with engine.averaged() as network:
            for volume in self.volumes.mine():
                generated = self._sample(network, volume)
                made += all_or_none(partial(self._keep, folder, volume, generated))
        everything = sorted((row for rows in all_gather(made) for row in rows), key=lambda row: row[0])
        png = encode_png(stack([pixels for _, pixels, _ in everything]), self.config.data.labels)
        all_or_none(partial(self._show, step, png, log))
        if not covers_foreground(self.config.data.labels):
            return {}
        return {"preview_fidelity": float(np.mean([score for _, _, score in everything]))}

    def _sample(self, network: Model, volume: HeldOutVolume) -> NDArray[np.float32]:
        """(C, D, H, W): a function of (weights, mask, covariates, seed, sampling settings)."""
        config = self.config
        condition = one_hot(volume.mask, config.data.labels)
        noise = NoiseSource([mix64(config.seed, volume.position, _SEED)], self.device)
        generated = sample(
            network,
            condition,
            noise((1, config.data.num_modalities, *volume.mask.shape[1:])),
            self.schedule,
            config.diffusion.prediction_type,
            config.sampling,
            noise=noise,
            off_value=config.data.labels.off_value,
            covariates=volume.covariates,
        )
        values: NDArray[np.float32] = generated[0].float().cpu().numpy()
        return values

    def _keep(
        self, folder: Path, volume: HeldOutVolume, generated: NDArray[np.float32]
    ) -> list[tuple[int, Pixels, float]]:
        """Write one volume; its number, picture and fidelity. Of a spare one nothing."""
        if volume.is_spare:
            return []
        dataset, mask = self.volumes.dataset, volume.mask[0].cpu().numpy()
        subject = dataset.subjects[volume.position]
        affine = dataset.packed.affine(subject.index)
        with writing_to(self.folder):
            for name, values in zip((*self.config.data.modalities, "mask"), (*generated, mask), strict=True):
                write_nifti(folder / subject.id / f"{name}.nii.gz", values, affine, compression_level=1)
        pixels = draw(
            [turn_to_ras(channel, affine) for channel in generated],
            turn_to_ras(mask, affine),
            ras_voxel_size_mm(affine),
            self.config.data.labels,
            ROW_HEIGHT,
        )
        return [(volume.number, pixels, background_fidelity(generated, mask))]

    def _show(self, step: int, png: bytes, log: RunLog) -> None:
        if self.ranks.is_main:
            with writing_to(self.folder), atomic_path(self.folder / f"step_{step:08d}.png") as temporary:
                temporary.write_bytes(png)
            log.image(step, "previews", png)
