"""How well a volume follows its mask: a Dice score that costs little beside making the volume. C D H W.

`background` needs no training, see `data/fidelity.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_ddpm.config import Config
from hpc_ddpm.data.fidelity import background_fidelity, dice
from hpc_ddpm.data.labels import covers_foreground
from hpc_ddpm.errors import ConfigError

BUNDLE_MODEL = Path("models/model.ts")

Fidelity = Callable[[NDArray[np.float32], NDArray[np.uint8]], float]
"""Volume (C, D, H, W) in about [-1, 1], mask (D, H, W) -> Dice in [0, 1]."""


def build_fidelity(config: Config, device: torch.device) -> tuple[str, Fidelity] | None:
    """Name and function of the score that `sampling.fidelity` asks for; None for no score.

    Raises:
        ConfigError: volumes are to be rejected, but nothing can score them; or the segmenter cannot be loaded.
    """
    wanted = config.sampling.fidelity
    method = wanted.method
    if method == "auto":
        has_oracle = covers_foreground(config.data.labels)
        method = "segmenter" if wanted.segmenter else "background" if has_oracle else "none"
    if method == "background":
        return method, background_fidelity
    if method == "segmenter":
        return method, load_segmenter(config, device)
    if wanted.reject_below:
        raise ConfigError(
            f"sampling.fidelity.reject_below={wanted.reject_below}: the labels {dict(config.data.labels.names)} do not "
            "cover the whole brain, so the background tells nothing; give sampling.fidelity.segmenter"
        )
    return None


def load_segmenter(config: Config, device: torch.device) -> Fidelity:
    """Mean Dice over the labels of the mask, by a TorchScript segmenter or the one inside a MONAI bundle.

    It gets (1, C, spatial) float32 in [-1, 1] and answers (1, 1 + K, spatial) scores, background first and then
    the labels in the order of the scheme, or (1, 1, spatial) labels.

    Raises:
        ConfigError: no such file, or not TorchScript.
    """
    path = Path(config.sampling.fidelity.segmenter)
    file = path / BUNDLE_MODEL if path.is_dir() else path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            network = torch.jit.load(str(file), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"sampling.fidelity.segmenter={path}: no TorchScript network at {file} ({reason})") from None
    is_xyz = config.sampling.fidelity.segmenter_axes == "xyz"
    values = np.array([0, *config.data.labels.names], np.uint8)

    def fidelity(volume: NDArray[np.float32], mask: NDArray[np.uint8]) -> float:
        found = _segment(network, volume.transpose(0, 3, 2, 1) if is_xyz else volume, values, device)
        found = found.T if is_xyz else found
        if found.shape != mask.shape:
            raise ConfigError(f"{file}: answers {found.shape} for a volume of {mask.shape}; give one for this size")
        present = [label for label in values[1:] if (mask == label).any()]
        return float(np.mean([dice(found == label, mask == label) for label in present])) if present else 1.0

    return fidelity


def _segment(network: Any, volume: NDArray[np.float32], values: NDArray[np.uint8], device: torch.device) -> Any:
    """Labels, in the axes of `volume`."""
    with torch.inference_mode():
        answer = network(torch.from_numpy(np.ascontiguousarray(volume))[None].to(device))[0]
    if len(answer) == 1:
        return answer[0].round().to(torch.uint8).cpu().numpy()
    if len(answer) != len(values):
        raise ConfigError(
            f"the segmenter answers {len(answer)} channels, expected 1 or {len(values)} (background, labels)"
        )
    return values[answer.argmax(0).cpu().numpy()]
