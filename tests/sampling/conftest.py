"""A tiny network whose volumes differ, its weights on disk, and phantoms to condition on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import hpc_ddpm
from hpc_ddpm.config import Config, load_config
from hpc_ddpm.data.phantom import write_phantoms
from hpc_ddpm.model.unet3d import build_unet
from hpc_ddpm.sampling.masks import find_mask_files
from hpc_ddpm.sampling.run import SampleReport, run_sampling
from hpc_ddpm.weights import save_weights
from launch.cli import app
from tests.conftest import TINY

QUICK = [*TINY, "sampling.num_steps=2"]


def save_random_weights(folder: Path, config: Config, std: float = 0.1) -> Path:
    torch.manual_seed(0)
    network = build_unet(config)
    for parameter in network.parameters():  # zero-initialised layers would make every volume alike
        torch.nn.init.normal_(parameter, std=std)
    save_weights(folder, network.state_dict(), config, {"source": "test"})
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_weights(tmp_path_factory.mktemp("weights") / "weights", load_config(None, QUICK).config)


@pytest.fixture(scope="session")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masks of 16^3, head_0000 to head_0004."""
    return write_phantoms(tmp_path_factory.mktemp("heads"), 5, (16, 16, 16), seed=1) / "mask"


Generate = Callable[..., SampleReport]


@pytest.fixture
def generate_set(weights: Path, heads: Path) -> Generate:
    """Generate into a folder, in this process; settings are strings, options go to `run_sampling`."""

    def run(out: Path, *settings: str, masks: Path | None = heads, source: Path = weights, **options: Any) -> Any:
        model = hpc_ddpm.load_model(source, overrides=settings)
        record = {"path": str(source), "sha256": model.sha256, "provenance": model.provenance}
        found = find_mask_files(masks) if masks else []
        return run_sampling(model, out, record, found, **options)

    return run


Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """`hpc-ddpm sample ARGUMENTS` in this process; returns what it says on either stream."""
    monkeypatch.setenv("HPC_DDPM_DEVICE", "cpu")

    def invoke(*arguments: object, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["sample", *map(str, arguments)])
        if isinstance(done.exception, Exception):
            raise done.exception
        assert done.exit_code == code, done.output
        return done.output

    return invoke


def sidecars(out: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((out / "sidecar").iterdir())}


def voxels(out: Path) -> dict[str, str]:
    return {name: record["voxels_sha256"] for name, record in sidecars(out).items()}
