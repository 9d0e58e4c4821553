"""Ways to store and read the sample. Each writes its files once and reads the whole subject again and again.

Where a library can read into memory that is there, it does. All but Med-DDPM give the same voxels, which is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import torch
from numpy.typing import NDArray

from hpc_ddpm.benchmark.data.med_ddpm import open_med_ddpm
from hpc_ddpm.benchmark.data.sample import Sample
from hpc_ddpm.data.dataset import Expand, VolumeDataset
from hpc_ddpm.data.discover import MASK
from hpc_ddpm.data.loader import build_loader

Volumes = tuple[Any, Any]
"""Image and mask, or image and condition: arrays or tensors."""
Read = Callable[[], Volumes]
OURS = "hpc_ddpm"
STORED, NETWORK = "stored", "network"
PACKAGES = {"Zarr": "zarr", "WebDataset": "webdataset", "MONAI PersistentDataset": "monai"}
"""Distributions that contestants need and this project does not."""


@dataclass(frozen=True)
class Contestant:
    """One way to get the subject."""

    name: str
    note: str
    stage: str
    """What `open` gives: `stored`, integers ready to be sent to a GPU; or `network`, float32 and one channel per
    label, on the CPU."""
    files: list[Path]
    """What it reads, to be dropped from the cache."""
    open: Callable[[], Read]
    """Open the files; the result reads. Called in each process that reads."""
    batches: Callable[[int, int], Iterator[Any]] | None = None
    """(volumes, workers): with readers of its own. None is torch's DataLoader with worker processes."""


def ours(name: str, packed: Path, note: str) -> Contestant:
    """What training does until the copy to the GPU."""

    def open_() -> Read:
        dataset = VolumeDataset(packed)
        batch = dataset.new_batch([0])
        dataset.fill(batch, 0)  # opens the shard

        def read() -> Volumes:
            dataset.fill(batch, 0)
            return batch["image"][0], batch["mask"][0]

        return read

    def batches(count: int, num_workers: int) -> Iterator[Any]:
        return build_loader(VolumeDataset(packed), [[0]] * count, num_workers)

    return Contestant(name, note, STORED, sorted(packed.glob("*.h5")), open_, batches)


def ours_expanded(sample: Sample) -> Contestant:
    """The same, and expanded on the CPU as training on a CPU does."""
    stored = ours(OURS, sample.packed, "")

    def open_() -> Read:
        read, expand = stored.open(), Expand(sample.config.labels)

        def read_and_expand() -> Volumes:
            image, mask = read()
            return expand(image[None], mask[None])

        return read_and_expand

    def batches(count: int, num_workers: int) -> Iterator[Any]:
        expand = Expand(sample.config.labels)
        loader = build_loader(VolumeDataset(sample.packed), [[0]] * count, num_workers)
        return (expand(batch["image"], batch["mask"]) for batch in loader)

    return Contestant(OURS, "LZ4, CRC-32 checked, float32 and one-hot", NETWORK, stored.files, open_, batches)


def memory_map(sample: Sample, folder: Path, *, keep: bool = False) -> Contestant:
    """The raw bytes, copied into memory that is there; mapped anew for each read, as every new subject is, or once."""
    files = {"image": (sample.image, folder / "image.bin"), "mask": (sample.mask, folder / "mask.bin")}
    for array, path in files.values():
        array.tofile(path)

    def open_() -> Read:
        outs = [np.empty_like(array) for array, _ in files.values()]

        def map_all() -> list[NDArray[Any]]:
            return [np.memmap(path, array.dtype, "r", shape=array.shape) for array, path in files.values()]

        kept = map_all() if keep else None

        def read() -> Volumes:
            for out, mapped in zip(outs, kept or map_all(), strict=True):
                np.copyto(out, mapped)
            return outs[0], outs[1]

        return read

    name, note = ("memory map, kept", "the same, mapped once") if keep else ("memory map", "raw bytes, no check")
    return Contestant(name, note, STORED, [path for _, path in files.values()], open_)


def plain_hdf5(sample: Sample, folder: Path) -> Contestant:
    """h5py into memory that is there."""
    path = folder / "plain.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=sample.image, chunks=(1, *sample.image.shape[1:]))
        file.create_dataset("mask", data=sample.mask, chunks=sample.mask.shape)

    def open_() -> Read:
        file = h5py.File(path, "r")
        image, mask = np.empty_like(sample.image), np.empty_like(sample.mask)

        def read() -> Volumes:
            file["image"].read_direct(image)
            file["mask"].read_direct(mask)
            return image, mask

        return read

    return Contestant("HDF5 with h5py", "uncompressed, no check", STORED, [path], open_)


def compressed_nifti(sample: Sample, folder: Path) -> Contestant:
    """One .nii.gz per modality, as integers."""
    paths = [folder / f"{role}.nii.gz" for role in (*sample.config.modalities, MASK)]
    for path, volume in zip(paths, (*sample.image, sample.mask), strict=True):
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)

    def read() -> Volumes:
        *images, mask = [np.asarray(nibabel.Nifti1Image.from_filename(path).dataobj) for path in paths]
        return np.stack(images), mask

    return Contestant("nii.gz with nibabel", "gzip, CRC-32 checked", STORED, paths, lambda: read)


def zarr_arrays(sample: Sample, folder: Path) -> Contestant:
    """Zarr 3, one volume per chunk as in our shards."""
    import zarr
    from zarr.codecs import BloscCodec

    arrays = {"image": sample.image, "mask": sample.mask}
    for name, array in arrays.items():
        store = zarr.create_array(
            store=str(folder / name),
            shape=array.shape,
            chunks=(*[1] * (array.ndim - 3), *array.shape[-3:]),
            dtype=array.dtype,
            compressors=BloscCodec(cname="lz4", shuffle="noshuffle"),
        )
        store[:] = array

    def open_() -> Read:
        image, mask = (zarr.open_array(str(folder / name), mode="r") for name in arrays)
        return lambda: (image[:], mask[:])

    return Contestant("Zarr", "Zarr 3, Blosc with LZ4, no check", STORED, _files(folder), open_)


def web_dataset(sample: Sample, folder: Path) -> Contestant:
    """One tar, read from its beginning to its end, over and over."""
    import webdataset

    path = folder / "sample.tar"
    with webdataset.TarWriter(str(path)) as tar:
        tar.write({"__key__": "subject", "image.npy": sample.image, "mask.npy": sample.mask})

    def open_() -> Read:
        stages = webdataset.WebDataset([str(path)], shardshuffle=False, nodesplitter=None, workersplitter=None)
        samples = iter(stages.decode().to_tuple("image.npy", "mask.npy").repeat())
        return lambda: next(samples)

    return Contestant("WebDataset", "npy in tar, uncompressed, no check", STORED, [path], open_)


def persistent_dataset(sample: Sample, folder: Path) -> Contestant:
    """Tensors that MONAI has cached on disk."""
    from monai.data import PersistentDataset
    from monai.transforms import Transform

    class Give(Transform):
        """MONAI caches what its own kind of transforms give, and calls others every time."""

        def __call__(self, data: object) -> dict[str, torch.Tensor]:
            return {"image": torch.from_numpy(sample.image), "mask": torch.from_numpy(sample.mask)}

    def open_() -> Read:
        dataset = PersistentDataset([{"subject": 0}], transform=[Give()], cache_dir=folder)

        def read() -> Volumes:
            item = dataset[0]
            return item["image"], item["mask"]

        return read

    open_()()  # fills the cache
    return Contestant("MONAI PersistentDataset", "tensors with torch.save, no check", STORED, _files(folder), open_)


def naive_loader(sample: Sample) -> Contestant:
    """What one writes first: every file to float64, label channels, to float32."""
    paths = sample.nifti

    def read() -> Volumes:
        images = [nibabel.Nifti1Image.from_filename(paths[name]).get_fdata() for name in sample.config.modalities]
        mask = nibabel.Nifti1Image.from_filename(paths[MASK]).get_fdata()
        condition = np.stack([mask == label for label in sample.config.labels.names]).astype(np.float64)
        return torch.tensor(np.stack(images)).float(), torch.tensor(condition).float()

    note = "our stand-in for Med-DDPM's: nibabel get_fdata, transforms per case"
    return Contestant("naive loader", note, NETWORK, _real(paths), lambda: read)


def med_ddpm(sample: Sample, clone: Path) -> Contestant:
    """Med-DDPM's own dataset and batches."""
    open_ = open_med_ddpm(clone, sample.tree, sample.config)
    return Contestant("Med-DDPM", "its own dataset and collate", NETWORK, _real(sample.nifti), open_)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _real(paths: dict[str, Path]) -> list[Path]:
    return [path.resolve() for path in paths.values()]


def build_contestants(sample: Sample, folder: Path, clone: Path | None) -> tuple[list[Contestant], dict[str, str]]:
    """All that can run here, ours first in each stage, and the names of the others with the package they need.

    Args:
        sample: to be read.
        folder: for their files.
        clone: of Med-DDPM; None measures the naive loader instead.

    Raises:
        ConfigError: the clone is none, or its loader cannot read such a sample.
    """
    writers: dict[str, Callable[[Sample, Path], Contestant]] = {
        "memory map": memory_map,
        "memory map, kept": partial(memory_map, keep=True),
        "HDF5": plain_hdf5,
        "nii.gz": compressed_nifti,
        "Zarr": zarr_arrays,
        "WebDataset": web_dataset,
        "MONAI PersistentDataset": persistent_dataset,
    }
    found = [
        ours(OURS, sample.packed, "LZ4, CRC-32 checked"),
        ours(f"{OURS}, uncompressed", sample.uncompressed, "data.compression=none, CRC-32 checked"),
    ]
    missing = {}
    for number, (name, write) in enumerate(writers.items()):
        own = folder / f"contestant_{number}"
        own.mkdir()
        try:
            found.append(write(sample, own))
        except ModuleNotFoundError:
            missing[name] = PACKAGES[name]
    for contestant in found:
        image, mask = contestant.open()()
        if not (_same(image, sample.image) and _same(mask, sample.mask)):
            raise AssertionError(f"{contestant.name} reads other voxels than it was given")
    found += [ours_expanded(sample), med_ddpm(sample, clone) if clone else naive_loader(sample)]
    return found, missing


def _same(found: Any, expected: NDArray[Any]) -> bool:
    found = np.asarray(found)
    return found.dtype == expected.dtype and np.array_equal(found, expected)
