"""Readers against damaged input: `python tests/data/mutations.py READER COUNT [FIRST]` reads COUNT mutated files.

Whatever a reader does with them, it may say one line and nothing else: no other exception, no hang, no memory beyond
what so small a file can claim. The k-th input is a function of k; the last line printed says how far it came.
"""

from __future__ import annotations

import faulthandler
import gzip
import random
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.discover import Subject, discover
from hpc_ddpm.data.nifti import read_header
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.phantom import write_phantoms
from hpc_ddpm.data.preprocess import prepare
from hpc_ddpm.data.shards import open_packed
from hpc_ddpm.data.summary import list_subjects, summarise
from hpc_ddpm.data.table import read_columns, read_splits
from hpc_ddpm.errors import DataFormatError, HpcDdpmError

MEMORY, SECONDS = 2**31, 20
"""What reading one file of a few kB may take; SimpleITK's threads reserve most of it."""
SIDES = (8, 10, 12)
CONFIG = DataConfig(size=SIDES, normalization="percentile", voxel_size_mm=(1, 1, 1))
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7F800000, 0x7FC00000)

Read = Callable[[bytes], None]
Sample = tuple[bytes, int, Read]
"""A sound file, how many of its first bytes are the header, and what reads a damaged one in its place."""


def mutate(content: bytes, num_header: int, dice: random.Random) -> bytes:
    """One to four changes: bits, numbers, spans; half of them in the header."""
    changed = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 4))):
        size = len(changed)
        if not size:
            break
        place = dice.randrange(min(num_header, size) if dice.random() < 0.5 else size)
        way = dice.randrange(7)
        span = dice.choice((1, 2, 4, 8, 64, 1000))
        if way == 0:
            changed[place] ^= 1 << dice.randrange(8)
        elif way == 1:
            changed[place] = dice.randrange(256)
        elif way == 2:
            width = dice.choice((2, 4))
            number = dice.choice(EXTREMES) & (256**width - 1)
            changed[place : place + width] = number.to_bytes(width, dice.choice(("little", "big")))
        elif way == 3:
            del changed[place : place + span]
        elif way == 4:
            changed[place:place] = dice.randbytes(span)
        elif way == 5:
            changed[place : place + span] = bytes(span)
        else:
            del changed[place:]
    return bytes(changed)


# ------------------------------------------------------------------------------------------------ volumes


def _volume_bytes(suffix: str, is_mask: bool) -> bytes:
    rng = np.random.default_rng(0)
    data = rng.normal(100, 20, SIDES).astype(np.float32)
    if is_mask:
        data = np.ones(SIDES, np.uint8)
        data[3:5, 3:5, 3:5] = 2
    kinds = {".mgh": nib.MGHImage, ".mgz": nib.MGHImage, ".2.nii": nib.Nifti2Image}
    image = kinds.get(suffix, nib.Nifti1Image)(data, np.eye(4))
    content: bytes = image.to_bytes()
    return content


def volume(folder: Path, suffix: str) -> Sample:
    """As an image and as a mask, through all that packing does with it."""
    is_packed = suffix.endswith(("gz",))
    paths = {role: folder / role / f"a{suffix.removeprefix('.2')}" for role in ("mask", "t1")}
    sound = {role: _volume_bytes(suffix, role == "mask") for role in paths}
    for role, path in paths.items():
        path.parent.mkdir()
        path.write_bytes(gzip.compress(sound[role]) if is_packed else sound[role])
    subject = Subject("a", paths["mask"], {"t1": paths["t1"]})
    count = 0

    def read(content: bytes) -> None:
        nonlocal count
        count += 1
        path = paths["t1" if count % 3 else "mask"]
        whole = path.read_bytes()
        path.write_bytes(gzip.compress(content, 1) if is_packed and count % 2 else content)
        try:
            read_header(path)
            made = prepare(subject, CONFIG)
            assert np.isfinite(made.image).all()
            assert np.abs(made.image).max() <= 1
        finally:
            path.write_bytes(whole)

    return (sound["t1"], 352, read)


def nrrd(folder: Path) -> Sample:
    """As an image."""
    import SimpleITK

    mask = np.ones(SIDES, np.uint8)
    mask[3:5, 3:5, 3:5] = 2
    nib.save(nib.Nifti1Image(mask, np.diag([-1, -1, 1, 1])), folder / "mask.nii")
    image = SimpleITK.GetImageFromArray(np.random.default_rng(0).normal(100, 20, SIDES[::-1]).astype(np.float32))
    path = folder / "a.nrrd"
    SimpleITK.WriteImage(image, str(path))
    subject = Subject("a", folder / "mask.nii", {"t1": path})

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_header(path)
        prepare(subject, CONFIG)

    return path.read_bytes(), 400, read


def dicom(folder: Path) -> Sample:
    """One slice of a series."""
    from dicom_files import true_affine, write_series

    series = write_series(folder / "t1" / "a", np.random.default_rng(0).integers(0, 500, (3, 10, 8)))
    mask = np.ones((8, 10, 3), np.uint8)
    mask[3:5, 3:5, 1:] = 2
    nib.save(nib.Nifti1Image(mask, true_affine()), folder / "mask.nii")
    subject, path = Subject("a", folder / "mask.nii", {"t1": series}), series / "001.dcm"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_header(series)
        prepare(subject, CONFIG)

    return path.read_bytes(), 900, read


# --------------------------------------------------------------------------------- tables and packed data


def table(folder: Path, suffix: str) -> Sample:
    """A table of subjects, of splits and of covariates."""
    path = folder / f"t{suffix}"
    between = "\t" if suffix == ".tsv" else ","
    lines = ["subject,mask,t1,split,age", *(f"s{i},mask/s{i}.nii,t1/s{i}.nii,train,{i}" for i in range(9))]
    text = "\n".join(lines).replace(",", between)
    if suffix == ".json":
        rows = ", ".join(f'{{"subject": "s{i}", "mask": "m/{i}.nii", "t1": null, "split": "val"}}' for i in range(9))
        text = f'{{"subjects": [{rows}]}}'

    def read(content: bytes) -> None:
        path.write_bytes(content)
        with suppress(DataFormatError):  # the files are not there
            discover(path, CONFIG)
        read_columns(path, ["age"])
        read_splits(path)

    return text.encode(), 60, read


def packed(folder: Path, name: str) -> Sample:
    """A file of a packed dataset."""
    names = CONFIG.labels
    write_phantoms(folder / "heads", 3, SIDES, labels=names)
    pack(folder / "heads", folder / "packed", CONFIG)
    path = folder / "packed" / name

    def read(content: bytes) -> None:
        path.write_bytes(content)
        summarise(folder / "packed")
        list_subjects(folder / "packed")
        data = open_packed(folder / "packed")
        for subject in data.subjects():
            data.read(subject.index)
            data.geometry(subject.index)

    return path.read_bytes(), 4000, read


def shard(folder: Path) -> Sample:
    """Volumes and columns of a shard. HDF5's own metadata is left alone: damaged, it can keep HDF5 busy for ever."""
    path = folder / "packed" / "shard-00000.h5"
    whole, _, read_whole = packed(folder, path.name)
    spans = []
    with h5py.File(path) as file:
        for item in file.values():
            chunks = [item.id.get_chunk_info(i) for i in range(item.id.get_num_chunks())] if item.chunks else []
            spans += [(chunk.byte_offset, chunk.size) for chunk in chunks]
            spans += [(item.id.get_offset(), item.nbytes)] if not item.chunks and item.id.get_offset() else []

    def read(content: bytes) -> None:
        changed, taken = bytearray(whole), 0
        for place, size in spans:
            part = content[taken : taken + size]
            changed[place : place + len(part)] = part
            taken += size
        read_whole(bytes(changed))

    return b"".join(whole[place : place + size] for place, size in spans), 4000, read


READERS: dict[str, Callable[[Path], Sample]] = {
    "nifti1": lambda folder: volume(folder, ".nii"),
    "nifti2": lambda folder: volume(folder, ".2.nii"),
    "gz": lambda folder: volume(folder, ".nii.gz"),
    "mgh": lambda folder: volume(folder, ".mgh"),
    "mgz": lambda folder: volume(folder, ".mgz"),
    "dicom": dicom,
    "nrrd": nrrd,
    "csv": lambda folder: table(folder, ".csv"),
    "tsv": lambda folder: table(folder, ".tsv"),
    "json": lambda folder: table(folder, ".json"),
    "index": lambda folder: packed(folder, "index.json"),
    "shard": shard,
}


def run(name: str, count: int, first: int = 0) -> Counter[str]:
    """How many inputs ended in which way; raises what is no refusal."""
    said: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        sound, num_header, read = READERS[name](Path(folder))
        read(sound)  # or nothing was looked at but the first bytes
        _bound_memory()
        for number in range(first, first + count):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor: it ends the process
            print(f"input {number} of {name}", end="\r", file=sys.stderr, flush=True)
            try:
                read(mutate(sound, num_header, random.Random(f"{name} {number}")))
                said["read"] += 1
            except HpcDdpmError as error:
                message = str(error)
                assert "\n" not in message.replace("\n  ", " "), message
                assert "memory is too small" not in message, f"input {number}: {message}"
                said["refused"] += 1
    signal.setitimer(signal.ITIMER_PROF, 0)
    return said


def _bound_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    faulthandler.enable()
    warnings.simplefilter("error")
    sys.path.insert(0, str(Path(__file__).parent))
    print(dict(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)))
