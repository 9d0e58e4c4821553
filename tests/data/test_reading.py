import errno
import json
import os
import pickle
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hpc_ddpm.config import DataConfig, LabelsConfig
from hpc_ddpm.data import chunks, shards
from hpc_ddpm.data.chunks import FLETCHER32_BYTES, OpenShard
from hpc_ddpm.data.dataset import Expand, VolumeDataset, to_unit_range
from hpc_ddpm.data.labels import one_hot
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.shards import Packed, open_packed, read_column, read_index
from hpc_ddpm.data.summary import list_subjects, summarise
from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.files import write_json


@pytest.fixture
def packed_path(heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]) -> Path:
    """Six subjects in three shards."""
    rows = 2 * 8 * 10 * 12 * 3 / 2**30
    pack(heads, tmp_path / "out", tiny(shard_size_gib=rows))
    assert len(list((tmp_path / "out").glob("shard-*.h5"))) == 3
    return tmp_path / "out"


def test_items(packed_path: Path) -> None:
    dataset = VolumeDataset(packed_path, "train")
    assert len(dataset) == len(dataset.packed.subjects("train"))
    item = dataset[1]
    assert (item["image"].shape, item["image"].dtype) == ((1, 12, 10, 8), torch.int16)
    assert (item["mask"].shape, item["mask"].dtype, item["index"]) == ((12, 10, 8), torch.uint8, 1)
    with pytest.raises(DataFormatError, match=r"no subject in split 'test', found train, val"):
        VolumeDataset(packed_path, "test")


def test_to_unit_range() -> None:
    stored = torch.tensor([-32767, 0, 32767], dtype=torch.int16)
    assert to_unit_range(stored).tolist() == [-1, 0, 1]
    floats = torch.tensor([-1.0, 0.5])
    assert to_unit_range(floats) is floats


def test_expand_uses_its_memory_again(packed_path: Path) -> None:
    dataset = VolumeDataset(packed_path)
    expand, memory = Expand(LabelsConfig()), set()
    for index in range(2):
        batch = dataset.new_batch([index])
        dataset.fill(batch, 0)
        volume, condition = expand(batch["image"], batch["mask"])
        assert torch.equal(volume, batch["image"].float() / 32767)
        assert torch.equal(condition, one_hot(batch["mask"], LabelsConfig()))
        memory.add((volume.data_ptr(), condition.data_ptr()))
    assert len(memory) == 1
    assert expand(volume, batch["mask"])[0] is volume
    assert expand(torch.zeros(2, 1, 12, 10, 8, dtype=torch.int16), torch.zeros(2, 12, 10, 8))[0].shape[0] == 2


def test_buffers_are_reused(packed_path: Path) -> None:
    packed = open_packed(packed_path)
    image, mask = np.empty((1, 12, 10, 8), np.int16), np.empty((12, 10, 8), np.uint8)
    for index in (0, 5, 3):
        assert packed.read(index, image, mask)[0] is image
        fresh = open_packed(packed_path).read(index)
        np.testing.assert_array_equal(image, fresh[0])
        np.testing.assert_array_equal(mask, fresh[1])
        np.testing.assert_array_equal(packed.read_mask(index), mask)


def voxels(packed: Packed) -> dict[int, bytes]:
    return {index: b"".join(array.tobytes() for array in packed.read(index)) for index in range(len(packed))}


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_other_peoples_worker_processes(packed_path: Path, start_method: str) -> None:
    dataset = VolumeDataset(packed_path)
    here = [dataset[i] for i in range(len(dataset))]  # opens shards in this process first
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=start_method)
    for item, expected in zip(loader, here, strict=True):
        assert torch.equal(item["image"], expected["image"])
        assert torch.equal(item["mask"], expected["mask"])


def test_many_threads_share_few_open_files(packed_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = voxels(open_packed(packed_path))
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 1)
    packed = open_packed(packed_path)
    order = np.random.default_rng(0).integers(len(packed), size=300).tolist()
    with ThreadPoolExecutor(8) as pool:
        for index, arrays in zip(order, pool.map(packed.read, order), strict=True):
            assert b"".join(array.tobytes() for array in arrays) == expected[index]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("changes", [{}, {"storage_dtype": "float32"}, {"compression": "none"}])
def test_ways_to_store_and_to_read(
    heads: Path,
    tmp_path: Path,
    tiny: Callable[..., DataConfig],
    changes: Any,
    cached: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunks, "_is_cached", lambda *where: cached)
    monkeypatch.setattr(chunks, "MAPPED_BYTES", 1000)
    pack(heads, tmp_path / "out", tiny(**changes))
    packed = open_packed(tmp_path / "out")
    with shards.open_reader(tmp_path / "out" / "shard-00000.h5") as file:
        for subject in packed.subjects():
            image, mask = packed.read(subject.index)
            row = file["id"].asstr()[:].tolist().index(subject.id)
            np.testing.assert_array_equal(image, file["image"][row])
            np.testing.assert_array_equal(mask, file["mask"][row])
            assert image.dtype == file["image"].dtype


def test_only_what_is_whole_and_at_hand_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).integers(256, size=20_000).astype(np.uint8)
    with h5py.File(tmp_path / "shard.h5", "w") as file:
        for name in chunks.VOLUMES:
            file.create_dataset(name, data=data.reshape(1, 1, 100, 200), chunks=(1, 1, 100, 200))
    monkeypatch.setattr(chunks, "_is_cached", lambda *where: True)
    with h5py.File(tmp_path / "shard.h5") as file:
        shard, offset = OpenShard(file), file["image"].id.get_chunk_info(0).byte_offset
        mapped = shard._map(offset, data.size)
        assert mapped == data.data
        monkeypatch.setattr(chunks, "MADV_POPULATE_READ", 12345)  # a kernel that has no such advice
        assert shard._map(offset, data.size) is None
    monkeypatch.undo()
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open() as empty:
        assert not chunks._is_cached(empty.fileno(), 0)
    with (tmp_path / "shard.h5").open() as file:
        monkeypatch.delattr(os, "RWF_NOWAIT")  # not of this system
        assert not chunks._is_cached(file.fileno(), 0)


def test_a_volume_that_does_not_compress(tmp_path: Path, tiny: Callable[..., DataConfig]) -> None:
    """LZ4 keeps such a block as it is."""
    noise = np.random.default_rng(0).integers(-32767, 32767, (1, 12, 10, 8)).astype(np.int16)
    with h5py.File(tmp_path / "shard.h5", "w") as file:
        file.create_dataset(
            "image", data=noise[None], chunks=(1, *noise.shape), fletcher32=True, compression=hdf5plugin.LZ4(nbytes=512)
        )
        file.create_dataset("mask", data=np.zeros((1, 12, 10, 8), np.uint8), chunks=(1, 12, 10, 8))
    with h5py.File(tmp_path / "shard.h5") as file:
        image = np.empty_like(noise)
        assert OpenShard(file).read("image", 0, image) == [zlib.crc32(noise.tobytes())]
        np.testing.assert_array_equal(image, noise)
        with pytest.raises(ValueError, match="int16 wanted"):
            OpenShard(file).read("mask", 0, image[0])


def test_few_files_stay_open(packed_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 2)
    packed = open_packed(packed_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for index in (0, 2, 4, 0, 2, 4):
        packed.read(index)
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 2
    assert voxels(pickle.loads(pickle.dumps(packed))) == voxels(packed)


def subject_of(message: str) -> str:
    return message.split("damaged at subject ")[1].split(":")[0]


def test_every_flipped_bit_in_a_volume_is_found(packed_path: Path) -> None:
    """A flip in what HDF5 adds at the end, or that decodes to the same voxels, is left to `data verify`."""
    shard = packed_path / "shard-00001.h5"
    whole, right = shard.read_bytes(), voxels(open_packed(packed_path))
    offsets = volume_bytes(shard)
    rng = np.random.default_rng(0)
    num_found = 0
    for _ in range(200):
        place, length, subject = offsets[rng.integers(len(offsets))]
        damaged = bytearray(whole)
        damaged[place + int(rng.integers(length - FLETCHER32_BYTES))] ^= 1 << int(rng.integers(8))
        shard.write_bytes(damaged)
        try:
            assert voxels(open_packed(packed_path)) == right
        except DataFormatError as error:
            assert "shard-00001.h5: damaged at subject" in str(error)
            assert subject_of(str(error)) == subject
            num_found += 1
    assert num_found > 190


def volume_bytes(shard: Path) -> list[tuple[int, int, str]]:
    """Offset, length and subject of every chunk with voxels."""
    with shards.open_reader(shard) as file:
        ids = file["id"].asstr()[:]
        chunks = [file[name].id.get_chunk_info(i) for name in ("image", "mask") for i in range(len(ids))]
        return [(chunk.byte_offset, chunk.size, ids[chunk.chunk_offset[0]]) for chunk in chunks]


@pytest.mark.parametrize(("key", "what"), [("crc32_image", "image"), ("crc32_mask", "mask")])
def test_voxels_that_differ_from_the_index_are_found(packed_path: Path, key: str, what: str) -> None:
    index = json.loads((packed_path / "index.json").read_text())
    index["shards"][1][key] = index["shards"][1][key][:8] * 2
    write_json(packed_path / "index.json", index)
    packed = open_packed(packed_path)
    packed.read(2)
    with pytest.raises(DataFormatError, match=rf"shard-00001\.h5: damaged at subject head_0003: the {what} differs"):
        packed.read(3)


def test_unreadable_datasets(packed_path: Path) -> None:
    with pytest.raises(DataFormatError, match=r"no such packed dataset; run `hpc-ddpm pack` or set data\.path"):
        open_packed(packed_path / "gone")
    (packed_path / "empty").mkdir()
    with pytest.raises(DataFormatError, match=r"no index\.json, so packing has not finished here"):
        open_packed(packed_path / "empty")
    index = packed_path / "index.json"
    sealed = index.read_text()
    good = json.dumps({name: part for name, part in json.loads(sealed).items() if name != "checksum"})
    for text, message in {
        "{": "not a readable index",
        "[]": "not a readable index",
        sealed.replace('"version": 2', '"version": 9'): "not a readable index .its content does not fit its checksum",
        good.replace('"version": 2', '"version": 9'): "version 9 found, .* version 2 expected; pack again",
        good.replace('"val":', '"vol":'): "not a readable index",
        good.replace('"format": "hpc_ddpm packed dataset"', '"format": "zarr"'): "format 'zarr'",
    }.items():
        index.write_text(text)
        with pytest.raises(DataFormatError, match=message):
            open_packed(packed_path)
    index.write_text(sealed)
    shard = packed_path / "shard-00001.h5"
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    with pytest.raises(DataFormatError, match=rf"shard-00001\.h5: {len(data) - 10} bytes found, {len(data)} expected"):
        open_packed(packed_path)
    shard.unlink()
    with pytest.raises(DataFormatError, match=r"shard-00001\.h5: this shard is missing"):
        open_packed(packed_path)


def test_shards_that_go_bad_while_open(packed_path: Path) -> None:
    shard = packed_path / "shard-00001.h5"
    size, packed = shard.stat().st_size, open_packed(packed_path)
    shard.write_bytes(b"\0" * size)
    with pytest.raises(DataFormatError, match=r"shard-00001\.h5: damaged shard"):
        packed.read(2)
    shard.unlink()
    with pytest.raises(DataFormatError, match=r"shard-00001\.h5: this shard is missing"):
        packed.geometry(3)


def test_a_shard_of_another_version(packed_path: Path) -> None:
    with h5py.File(packed_path / "shard-00001.h5", "r+") as file:
        file.attrs["version"] = 3
    with pytest.raises(DataFormatError, match=r"version 3 found, .* version 2 expected"):
        shards.open_reader(packed_path / "shard-00001.h5")


def test_label_order_survives(heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]) -> None:
    labels = LabelsConfig(names={2: "tumour", 1: "head"})
    pack(heads, tmp_path / "out", tiny(labels=labels))
    assert list(open_packed(tmp_path / "out").data.labels.names) == [2, 1]
    with pytest.raises(DataFormatError, match=r"holds a dataset with other settings \(data\.labels\)"):
        pack(heads, tmp_path / "out", tiny(labels=LabelsConfig()))


@pytest.mark.parametrize(
    ("key", "name"),
    [("id", "../../evil"), ("id", ""), ("id", ".x"), ("id", "a\\b"), ("file", "../x.h5")],
)
def test_names_of_an_index_stay_in_its_folder(packed_path: Path, key: str, name: str) -> None:
    content = json.loads((packed_path / "index.json").read_text())
    content["shards"][0][key] = [name, "b"] if key == "id" else name
    write_json(packed_path / "index.json", content)
    with pytest.raises(DataFormatError, match=r"index\.json: .*found, a name without slashes or leading dot expected"):
        open_packed(packed_path)


def test_names_that_are_no_text(packed_path: Path) -> None:
    content = json.loads((packed_path / "index.json").read_text())
    content["shards"][0]["id"] = ["\udcfc", "b"]
    (packed_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataFormatError, match=r"index\.json: not a readable index \("):
        open_packed(packed_path)


def test_settings_of_a_newer_version_are_named(packed_path: Path, heads: Path, tiny: Callable[..., DataConfig]) -> None:
    content = json.loads((packed_path / "index.json").read_text())
    content["data"]["warp"] = "spline"
    write_json(packed_path / "index.json", content)
    message = r"index\.json: not a readable index \(data\.warp: .*: packed by a newer version\?"
    for look in (summarise, list_subjects, open_packed, lambda path: pack(heads, path, tiny())):
        with pytest.raises(DataFormatError, match=message) as caught:
            look(packed_path)
        assert "\n" not in str(caught.value)


def test_what_may_not_be_read_is_named(packed_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, refused = read_index(packed_path), PermissionError(errno.EACCES, "Permission denied")
    for module, name, look, file in (
        (h5py, "File", lambda: read_column(packed_path, index, "affine"), "shard-00000.h5"),
        (Path, "read_bytes", lambda: list_subjects(packed_path), "index.json"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **__: (_ for _ in ()).throw(refused))
        with pytest.raises(
            DataFormatError, match=rf"{file}: cannot be read \(Permission denied\); mend its permissions"
        ):
            look()


def test_damaged_columns_are_named(packed_path: Path) -> None:
    with h5py.File(packed_path / "shard-00001.h5", "r+") as file:
        del file["affine"]
        file["label_voxels_"] = file["label_voxels"][:1]
        del file["label_voxels"]
        file.move("label_voxels_", "label_voxels")
    for look, message in ((summarise, "affine cannot be read"), (list_subjects, "1 rows of label_voxels found, 2")):
        with pytest.raises(DataFormatError, match=rf"shard-00001\.h5: .*{message}"):
            look(edited_size(packed_path))


def edited_size(packed_path: Path) -> Path:
    content = json.loads((packed_path / "index.json").read_text())
    content["shards"][1]["size_bytes"] = (packed_path / "shard-00001.h5").stat().st_size
    write_json(packed_path / "index.json", content)
    return packed_path


def test_a_short_read_is_continued(packed_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, real = voxels(open_packed(packed_path)), os.preadv
    monkeypatch.setattr(chunks, "_is_cached", lambda *where: False)
    monkeypatch.setattr(os, "preadv", lambda file, parts, *where: real(file, [parts[0][:100]], *where))
    assert voxels(open_packed(packed_path)) == expected


def test_a_chunk_that_is_not_there(packed_path: Path) -> None:
    with h5py.File(packed_path / "shard-00000.h5", "r+") as file:
        empty = file.create_dataset("empty", file["mask"].shape, "uint8", chunks=file["mask"].chunks)
        assert empty.id.get_num_chunks() == 0
        del file["mask"]
        file.move("empty", "mask")
    with h5py.File(packed_path / "shard-00000.h5") as file, pytest.raises(ValueError, match="nothing stored"):
        OpenShard(file).read("mask", 0, np.empty((12, 10, 8), np.uint8))
