"""Verification finds every flipped bit, missing or cut shard and wrong entry, and says whom it hits. C D H W."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.check.findings import PACKED_KINDS, Finding
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.phantom import write_phantoms
from hpc_ddpm.data.shards import INDEX, open_packed
from hpc_ddpm.data.verify import verify
from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.files import write_json

SIZE = (8, 10, 12)
SECOND = ("head_0002", "head_0003")
"""Subjects of shard-00001.h5."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six subjects in three shards."""
    folder = tmp_path_factory.mktemp("sound")
    write_phantoms(folder / "heads", 6, SIZE)
    pack(folder / "heads", folder / "packed", DataConfig(size=SIZE, shard_size_gib=2 * 8 * 10 * 12 * 3 / 2**30))
    assert len(list((folder / "packed").glob("shard-*.h5"))) == 3
    return folder / "packed"


@pytest.fixture
def packed(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "packed")


@pytest.fixture
def shard(packed: Path) -> Path:
    return packed / "shard-00001.h5"


def kinds(findings: list[Finding]) -> list[str]:
    return [finding.kind for finding in findings]


def hit(findings: list[Finding]) -> set[str]:
    return {subject for finding in findings for subject in finding.subjects}


def edit_index(packed: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((packed / INDEX).read_text())
    change(content)
    write_json(packed / INDEX, content)


def edit_shard(shard: Path, change: Callable[[h5py.File], Any]) -> None:
    """Change a shard and its checksum in the index: as if it had been packed so."""
    from hashlib import sha256

    with h5py.File(shard, "r+") as file:
        change(file)
    entry = {"size_bytes": shard.stat().st_size, "sha256": sha256(shard.read_bytes()).hexdigest()}
    edit_index(shard.parent, lambda content: content["shards"][1].update(entry))


@pytest.mark.parametrize("deep", [False, True])
def test_a_sound_dataset_has_no_findings(sound: Path, deep: bool) -> None:
    progress: list[tuple[int, int]] = []
    assert verify(sound, deep=deep, progress=lambda done, total: progress.append((done, total))) == []
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert verify(sound, deep=deep, num_workers=2) == []


@pytest.mark.parametrize("part", range(4))
def test_a_hundred_flipped_bits_are_all_found(packed: Path, part: int) -> None:
    """Anywhere in the shards; a bit in voxels names exactly its subject."""
    rng = np.random.default_rng(part)
    voxels = {shard.name: voxel_bytes(shard) for shard in packed.glob("shard-*.h5")}
    for _ in range(25):
        shard = packed / f"shard-{rng.integers(3):05d}.h5"
        place, bit = int(rng.integers(shard.stat().st_size)), int(rng.integers(8))
        flip(shard, place, bit)
        findings = verify(packed)
        assert kinds(findings)[0] == "wrong-checksum", place
        assert {finding.file for finding in findings} == {str(shard)}
        subject = next((name for begin, end, name in voxels[shard.name] if begin <= place < end), None)
        if subject:
            assert hit(findings) == {subject}
            assert "damaged-voxels" in kinds(findings)
        else:
            assert hit(findings)
        flip(shard, place, bit)
    assert verify(packed) == []


def flip(file: Path, place: int, bit: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(place)
        (byte,) = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte ^ (1 << bit)]))


def voxel_bytes(shard: Path) -> list[tuple[int, int, str]]:
    """Begin, end and subject of every chunk with voxels."""
    with h5py.File(shard) as file:
        ids = file["id"].asstr()[:]
        chunks = [file[name].id.get_chunk_info(i) for name in ("image", "mask") for i in range(len(ids))]
        return [(c.byte_offset, c.byte_offset + c.size, ids[c.chunk_offset[0]]) for c in chunks]


def test_flipped_bits_in_the_index_are_found(packed: Path) -> None:
    whole = (packed / INDEX).read_bytes()
    harmless = [span for name in (b'"num_workers": ', b'"path": ') for span in [span_of(whole, name)]]
    rng = np.random.default_rng(0)
    for _ in range(300):
        place = int(rng.integers(len(whole)))
        if any(begin <= place < end for begin, end in harmless):
            continue
        bit = int(rng.integers(8))
        flip(packed / INDEX, place, bit)
        assert verify(packed), whole[place - 40 : place + 40]
        flip(packed / INDEX, place, bit)


def span_of(text: bytes, name: bytes) -> tuple[int, int]:
    begin = text.index(name)
    return begin, text.index(b",", begin)


def test_a_missing_and_a_cut_shard(packed: Path, shard: Path) -> None:
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    findings = verify(packed)
    assert kinds(findings)[0] == "wrong-size"
    assert f"{len(whole) // 2} bytes, {len(whole)} expected" in findings[0].found
    assert hit(findings) == set(SECOND)
    shard.unlink()
    (finding,) = verify(packed)
    assert (finding.kind, finding.subjects, finding.file) == ("missing-shard", SECOND, str(shard))


def test_a_shard_that_is_no_hdf5(packed: Path, shard: Path) -> None:
    shard.write_bytes(bytes(shard.stat().st_size))
    findings = verify(packed)
    assert kinds(findings) == ["wrong-checksum", "unreadable-shard"]
    assert hit(findings) == set(SECOND)


def test_shards_in_each_others_place(packed: Path) -> None:
    one, two = packed / "shard-00000.h5", packed / "shard-00001.h5"
    one.rename(packed / "x")
    two.rename(one)
    (packed / "x").rename(two)
    findings = verify(packed)
    assert {"index-mismatch", "damaged-voxels"} <= set(kinds(findings))
    assert hit(findings) == {"head_0000", "head_0001", *SECOND}


def test_a_shard_that_the_index_does_not_name(packed: Path, shard: Path) -> None:
    shutil.copy(shard, packed / "shard-00009.h5")
    (finding,) = verify(packed)
    assert (finding.kind, finding.severity) == ("extra-shard", "warning")


@pytest.mark.parametrize(
    ("change", "kind", "subjects"),
    [
        (lambda c: c["shards"][1]["id"].reverse(), "index-mismatch", set(SECOND)),
        (lambda c: c["shards"][1]["id"].append("ghost"), "index-mismatch", {*SECOND, "ghost"}),
        (lambda c: c["shards"][1]["id"].__setitem__(0, "head_0000"), "index-mismatch", {"head_0000"}),
        (lambda c: c["shards"][1].update(crc32_mask="0" * 16), "index-mismatch", set(SECOND)),
        (lambda c: c["shards"][1].update(crc32_image="12"), "index-mismatch", set(SECOND)),
        (lambda c: c["shards"][1].update(val=[0], test=[0]), "index-mismatch", {"head_0002"}),
        (lambda c: c["shards"][1].update(sha256="0" * 64), "wrong-checksum", set(SECOND)),
        (lambda c: c["data"].update(fit="resize"), "index-mismatch", {f"head_{n:04d}" for n in range(6)}),
        (lambda c: c["data"].update(size=[0, 1, 2]), "index-damaged", set()),
        (lambda c: c["shards"].append(c["shards"][0]), "index-mismatch", {"head_0000", "head_0001"}),
        (lambda c: c.pop("shards"), "index-damaged", set()),
        (lambda c: c["shards"][1].pop("crc32_mask"), "index-damaged", set()),
        (lambda c: c["shards"][1].update(digest="0"), "index-mismatch", set(SECOND)),
    ],
)
def test_an_index_that_is_wrong(
    packed: Path, change: Callable[[dict[str, Any]], Any], kind: str, subjects: set[str]
) -> None:
    edit_index(packed, change)
    findings = verify(packed)
    assert kind in kinds(findings)
    assert subjects <= hit(findings)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda f: f["label_voxels"].__setitem__((1, 0), 5), "label_voxels of head_0003 is not what its mask holds"),
        (lambda f: f["affine"].__setitem__((1, 0, 0), np.nan), "affine of head_0003 is not finite"),
    ],
)
def test_deep_finds_what_was_packed_wrongly(
    packed: Path, shard: Path, change: Callable[[h5py.File], Any], found: str
) -> None:
    edit_shard(shard, change)
    assert verify(packed) == []
    (finding,) = verify(packed, deep=True)
    assert (finding.kind, finding.found, finding.subjects) == ("wrong-content", found, ("head_0003",))


def test_deep_finds_voxels_that_differ_from_their_checksum(packed: Path, shard: Path) -> None:
    def change(file: h5py.File) -> None:
        file["image"][0, 0, 0, 0, 0] = -32768
        file["mask"][1, 0, 0, 0] = 9

    edit_shard(shard, change)
    findings = verify(packed, deep=True)
    assert [finding.found for finding in findings] == [
        "the image of head_0002 differs from its checksum",
        "the image of head_0002 has values outside [-1, 1]",
        "the mask of head_0003 differs from its checksum",
        "the mask of head_0003 has labels [9]",
    ]


def test_a_volume_of_another_type(packed: Path, shard: Path) -> None:
    def change(file: h5py.File) -> None:
        del file["mask"]
        file["mask"] = np.zeros((2, 3, 3, 3), np.uint8)

    edit_shard(shard, change)
    findings = verify(packed, deep=True)
    assert kinds(findings) == ["unreadable-shard"]
    assert "mask is uint8 (2, 3, 3, 3), uint8 (2, 12, 10, 8) expected" in findings[0].found


def test_a_missing_column(packed: Path, shard: Path) -> None:
    edit_shard(shard, lambda file: file.__delitem__("done"))
    assert kinds(verify(packed)) == ["unreadable-shard"]


def test_what_is_no_packed_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="no such packed dataset"):
        verify(tmp_path / "gone")
    with pytest.raises(DataFormatError, match=r"no index\.json"):
        verify(tmp_path)
    (tmp_path / INDEX).write_text("{")
    (finding,) = verify(tmp_path)
    assert finding.kind == "index-damaged"
    assert finding.found.startswith("not a readable index")


def test_every_kind_has_something_to_do() -> None:
    assert all(kind.advice for kind in PACKED_KINDS.values())


def test_training_meets_the_same_damage(packed: Path, shard: Path) -> None:
    begin, _, subject = voxel_bytes(shard)[0]
    damaged = bytearray(shard.read_bytes())
    damaged[begin + 17] ^= 1  # among the first voxels, which LZ4 keeps as they are
    shard.write_bytes(damaged)
    assert hit(verify(packed)) == {subject}
    dataset = open_packed(packed)
    index = next(entry.index for entry in dataset.subjects() if entry.id == subject)
    with pytest.raises(DataFormatError, match=rf"shard-00001\.h5: damaged at subject {subject}"):
        dataset.read(index)


def test_a_shard_that_may_not_be_read_is_a_finding(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr("hpc_ddpm.data.verify._sha256", lambda path: (_ for _ in ()).throw(refused))
    findings = verify(packed)
    assert kinds(findings) == ["unreadable-shard"] * 3
    assert findings[1].found == "shard-00001.h5 cannot be read: Permission denied"
