"""One small file of every kind that the product writes and reads again, and what a reader makes of it."""

from __future__ import annotations

import io
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from hpc_ddpm.checkpoint import (
    Piece,
    checkpoint_dir,
    latest_checkpoint,
    publish,
    summarise_checkpoint,
    unfinished_dir,
    write_pieces,
)
from hpc_ddpm.config import load_config
from hpc_ddpm.data.export import Note, export
from hpc_ddpm.data.shards import open_packed, read_index
from hpc_ddpm.data.verify import verify
from hpc_ddpm.errors import HpcDdpmError
from hpc_ddpm.files import write_json
from hpc_ddpm.model.unet3d import build_unet
from hpc_ddpm.runlog import read_metrics
from hpc_ddpm.sampling.folder import Failure, SampleFolder
from hpc_ddpm.sampling.masks import find_packed_masks
from hpc_ddpm.sampling.plan import read_manifest
from hpc_ddpm.sampling.run import run_sampling
from hpc_ddpm.sampling.verify import verify_set
from hpc_ddpm.sealed import read_json
from hpc_ddpm.training.guards import _read as read_rollbacks
from hpc_ddpm.training.resume import stored_config
from hpc_ddpm.weights import Model, export_med_ddpm, import_med_ddpm, load_weights, save_weights
from launch.profiles import load_profile
from launch.records import Submission, add_event, read_events, read_submissions
from tests.conftest import TINY

SETTINGS = [*TINY, "sampling.num_steps=2", "sampling.output.formats=[nifti,packed]"]


class FoundError(Exception):
    """A reader has seen that something is wrong, and said so in another way than by an error."""


@dataclass(frozen=True)
class Product:
    """A kind of file."""

    name: str
    path: Path
    look: Callable[[], Any]
    """What a reader makes of it: equal for equal content; raises where it is damaged."""
    is_json: bool = False
    is_checked: bool = True
    """Not so what decides nothing."""


def build(folder: Path, packed: Path) -> list[Product]:
    """All of them, written by the product itself; `packed` is a packed dataset of 16^3."""
    shutil.copytree(packed, folder / "packed")
    config = load_config(None, [*SETTINGS, f"data.path={folder / 'packed'}"]).config
    torch.manual_seed(0)
    network = build_unet(config).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return [
        *_packed(folder / "packed", folder / "exported"),
        *_run(folder / "run", config, network),
        *_weights(folder / "weights", folder / "med_ddpm.pt", config, network),
        *_set(folder / "set", config, network),
        *_jobs(folder / "submitted"),
    ]


def _packed(packed: Path, exported: Path) -> Iterator[Product]:
    def read() -> Any:
        opened = open_packed(packed)
        parts = [(*opened.read(i), opened.affine(i), opened.intensity(i)) for i in range(len(opened))]
        return sha256(b"".join(array.tobytes() for part in parts for array in part)).hexdigest()

    def check() -> Any:
        if findings := verify(packed):
            raise FoundError(findings[0].kind)

    def look_at_index() -> Any:
        index = read_index(packed)
        return index.data, index.shards

    export(packed, exported)
    yield Product("index of packed data", packed / "index.json", look_at_index, is_json=True)
    yield Product("shard, as it is read", packed / "shard-00000.h5", read)
    yield Product("shard, by `verify`", packed / "shard-00000.h5", check)
    note = exported / "export.json"
    yield Product("note of an export", note, lambda: read_json(note, Note, "choose another"), is_json=True)


def _run(run: Path, config: Any, network: torch.nn.Module) -> Iterator[Product]:
    for step in (1, 2):
        final = checkpoint_dir(run / "checkpoints", step)
        unfinished_dir(final).mkdir(parents=True)
        values = {name: value for name, value in network.state_dict().items()}
        pieces = [Piece("ema", name, tuple(value.shape), 0, value.flatten()) for name, value in values.items()]
        name = "pieces-00000-of-00001.safetensors"
        files = {name: write_pieces(unfinished_dir(final) / name, pieces)}
        publish(final, {"optimizer_step": step, "ema_updates": step, "weights": ["ema"], "world_size": 1}, files)
    write_json(run / "config.json", config.dump(), indent=2)
    write_json(run / "rollbacks.json", {"rollbacks": [{"diverged_at": 6, "last_good_step": 4}]}, indent=2)
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in range(1, 4)))

    def look() -> Any:
        newest = latest_checkpoint(run / "checkpoints")
        if newest is None or newest.name != final.name:
            raise FoundError("passed over")
        return newest

    def look_at_all() -> Any:
        return summarise_checkpoint(final), look()

    yield Product("metrics of a run", run / "metrics.jsonl", lambda: read_metrics(run), True, False)
    yield Product("MANIFEST of a checkpoint", final / "MANIFEST.json", look_at_all, is_json=True)
    yield Product("pieces of a checkpoint", next(final.glob("pieces-*")), look)
    yield Product("configuration of a run", run / "config.json", lambda: stored_config(run), is_json=True)
    yield Product("roll-backs of a run", run / "rollbacks.json", lambda: read_rollbacks(run), is_json=True)


def _weights(folder: Path, exported: Path, config: Any, network: torch.nn.Module) -> Iterator[Product]:
    save_weights(folder, network.state_dict(), config, {"source": {"step": 5}})
    export_med_ddpm(folder, exported)

    def look() -> Any:
        weights = load_weights(folder)
        return weights.config, weights.provenance, _digest(weights.state_dict)

    def look_at_export() -> Any:
        weights = import_med_ddpm(exported, config)
        return weights.config, weights.provenance["source"]["step"], _digest(weights.state_dict)

    for name, is_json in (("weights.safetensors", False), ("config.json", True), ("provenance.json", True)):
        yield Product(f"{name} of weights", folder / name, look, is_json)
    yield Product("exported .pt", exported, look_at_export)


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    content = io.BytesIO()
    for name in sorted(tensors):
        content.write(name.encode() + tensors[name].numpy().tobytes())
    return sha256(content.getvalue()).hexdigest()


def _set(out: Path, config: Any, network: torch.nn.Module) -> Iterator[Product]:
    model = Model(network, config, {"source": "test"}).eval()
    made_by = {"path": "weights", "sha256": model.sha256, "provenance": model.provenance}
    masks = find_packed_masks(config.data.path)
    run_sampling(model, out, made_by, masks[:2])
    folder = SampleFolder(out)
    folder.write_failure(Failure("x_r000", "nan", "the volume has NaN", "1"), out)
    item = sorted(folder.done())[0]

    def check() -> Any:
        if problems := verify_set(out):
            raise FoundError(problems[0].kind)

    def failure() -> Any:
        found = folder.read_failure("x_r000")
        if found is None or found.kind == "unreadable":
            raise FoundError("unreadable")
        return found

    yield Product("manifest of a set", out / "manifest.jsonl", lambda: read_manifest(out), is_json=True)
    yield Product("sampling.json of a set", out / "sampling.json", folder.made_with, is_json=True)
    yield Product("sidecar", folder.sidecar(item), lambda: folder.record(item), is_json=True)
    yield Product("record of a failed volume", folder.failure("x_r000"), failure, is_json=True)
    yield Product("volume (NIfTI)", out / "t1" / f"{item}.nii.gz", check)
    yield Product("volume (shard)", next((out / "packed").glob("shard-*.h5")), lambda: _verified(out / "packed"))


def _verified(packed: Path) -> None:
    if findings := verify(packed):
        raise FoundError(findings[0].kind)


def _jobs(run: Path) -> Iterator[Product]:
    profile = load_profile("devcluster").model_dump(mode="json")
    Submission("7", "train", ["train"], str(run), str(run), profile, 0, 1, 2, 100.0, "host", None).write()
    add_event(run, "7", {"event": "start", "time": 110.0, "restarts": 0, "nodes": "n1"})
    add_event(run, "7", {"event": "end", "time": 120.0, "code": 75, "requeued": True, "mark": "3", "is_excused": False})
    yield Product("record of a job", run / "jobs" / "7.json", lambda: read_submissions(run), is_json=True)
    yield Product("events of a job", run / "jobs" / "7.events.jsonl", lambda: read_events(run, "7"), is_json=True)


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    """The file with other content; afterwards as it was."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def judge(product: Product, wanted: Any) -> str:
    """`found`, `harmless` (the same result) or `missed`; any other exception than an error of ours passes through."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            result = product.look()
        except (HpcDdpmError, FoundError):
            return "found"
    if result == wanted:
        return "harmless"
    return "found" if any("passed over" in str(one.message) for one in said) else "missed"
