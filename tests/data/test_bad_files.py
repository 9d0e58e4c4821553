"""One bad file costs one subject: no exception of a reader ends a pack, a check or a sampling."""

from __future__ import annotations

import gzip
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data import share
from hpc_ddpm.data.check import run as check_run
from hpc_ddpm.data.check.run import check
from hpc_ddpm.data.nifti import read_header, read_nifti
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.shards import open_packed
from hpc_ddpm.errors import DataFormatError

VOXELS = np.random.default_rng(0).integers(0, 99, (8, 10, 12)).astype(np.int16)


def nifti(affine: np.ndarray | None = None, units: str = "mm", kind: type = nib.Nifti1Image) -> bytes:
    image = kind(VOXELS, np.eye(4) if affine is None else affine)
    image.header.set_xyzt_units(units)
    return image.to_bytes()


def claiming(sides: tuple[int, int, int], content: bytes) -> bytes:
    """The header of a .nii file with other sides."""
    changed = bytearray(content)
    changed[42:48] = np.array(sides, "<i2").tobytes()
    return bytes(changed)


def mgz(**fields: object) -> bytes:
    image = nib.MGHImage(VOXELS.astype(np.float32), np.eye(4))
    for name, value in fields.items():
        image.header._structarr[name] = value
    return gzip.compress(image.header.binaryblock + VOXELS.astype(">f4").tobytes(order="F"))


BAD = {
    "empty.nii": b"",
    "empty.nii.gz": b"",
    "empty.mgz": b"",
    "zeros.mgh": bytes(3000),
    "zeros.mgz": gzip.compress(bytes(3000)),
    "type.mgz": mgz(type=99),
    "version.mgz": mgz(version=7),
    "sides.mgz": mgz(dims=(-1, 0, 5, 1)),
    "no_side.nii": claiming((8, 0, 12), nifti()),
    "claims.nii": claiming((1100, 1300, 1500), nifti())[:1500],
    "claims.nii.gz": gzip.compress(claiming((32000, 32000, 30000), nifti())),
    "bomb.nii.gz": gzip.compress(nifti() + bytes(2**27)),
    "bomb.mgz": gzip.compress(gzip.decompress(mgz()) + bytes(2**27)),
    "twice.nii.gz": gzip.compress(gzip.compress(nifti())),
    "cut.nii.gz": gzip.compress(nifti())[:-400],
    "cut.nii": nifti()[:-400],
    "other.nii.gz": gzip.compress(nifti()) + b"something else",
    "flat.nii.gz": gzip.compress(nifti(np.diag([1.0, 1, 1e-7, 1]))),
    "x" * 300 + ".nii": None,
}


@pytest.mark.parametrize("name", BAD)
def test_what_readers_refuse(tmp_path: Path, name: str) -> None:
    if BAD[name] is not None:
        (tmp_path / name).write_bytes(BAD[name])
    with pytest.raises(DataFormatError) as caught:
        read_nifti(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}: ")
    assert "\n" not in message
    assert caught.value.kind


def test_a_lie_about_the_size_costs_no_memory(tmp_path: Path) -> None:
    """In a process that may have little more than it starts with."""
    lies = [name for name in BAD if name.startswith(("claims", "bomb"))]
    for name in lies:
        (tmp_path / name).write_bytes(BAD[name] or b"")
    code = (
        "import resource, sys; from hpc_ddpm.data.nifti import read_nifti\n"
        "from hpc_ddpm.errors import DataFormatError\n"
        "pages = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages + 2**26, resource.RLIM_INFINITY))\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_nifti(path)\n"
        "    except DataFormatError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in lies)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == len(lies)
    assert not [line for line in said if "memory" in line]
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize(("units", "sides"), [("micron", 2000.0), ("meter", 0.002), ("mm", 2.0), ("unknown", 2.0)])
def test_units_are_read(tmp_path: Path, units: str, sides: float) -> None:
    affine = np.diag([sides, sides, sides, 1])
    affine[:3, 3] = 10 * sides
    (tmp_path / "a.nii").write_bytes(nifti(affine, units))
    np.testing.assert_allclose(
        read_nifti(tmp_path / "a.nii").affine, [[2, 0, 0, 20], [0, 2, 0, 20], [0, 0, 2, 20], [0, 0, 0, 1]], atol=1e-5
    )


def test_a_voxel_size_that_would_make_a_giant_is_refused(tmp_path: Path, tiny: Callable[..., DataConfig]) -> None:
    for role in ("mask", "t1"):
        (tmp_path / role).mkdir()
        (tmp_path / role / "a.nii").write_bytes(nifti(np.diag([900.0, 900, 900, 1])))
    names = {value: str(value) for value in range(1, 100)}
    config = tiny(voxel_size_mm=(1, 1, 1), labels={"names": names})
    with pytest.raises(
        DataFormatError, match=r"which data\.voxel_size_mm would make 7200x9000x10800; correct the units"
    ):
        pack(tmp_path, tmp_path / "out", config)


def test_content_decides_what_is_gzipped(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(gzip.compress(nifti()))
    (tmp_path / "b.nii.gz").write_bytes(nifti(kind=nib.Nifti2Image))
    (tmp_path / "c.nii.gz").write_bytes(gzip.compress(nifti()[:1000]) + gzip.compress(nifti()[1000:]) + bytes(512))
    for name, is_misnamed in {"a.nii": True, "b.nii.gz": True, "c.nii.gz": False}.items():
        np.testing.assert_array_equal(read_nifti(tmp_path / name, dtype=None).data, VOXELS.T)
        assert read_header(tmp_path / name).is_misnamed == is_misnamed


def test_a_folder_that_is_called_like_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "X_flair.nii"
    folder.mkdir()
    with pytest.raises(DataFormatError, match=r"X_flair\.nii: a folder with 0 volumes found, one file expected"):
        read_nifti(folder)
    (folder / "00000057_final_flair.nii").write_bytes(nifti())
    (folder / "._00000057_final_flair.nii").write_bytes(b"what a Mac leaves")
    np.testing.assert_array_equal(read_nifti(folder, dtype=None).data, VOXELS.T)
    assert read_header(folder).shape == VOXELS.shape


def spoil(heads: Path) -> dict[str, str]:
    """Bad files in place of the images of three of six subjects, and what is said of each."""
    files = sorted((heads / "t1").iterdir())
    files[0].write_bytes(b"")
    files[1].unlink()
    files[1].symlink_to(heads / ("x" * 300))
    files[2].write_bytes(BAD["bomb.nii.gz"] or b"")
    said = ("0 bytes", "cannot be read|no such file", "unpacks to more than the 2272 bytes that its header promises")
    return {file.name.removesuffix(".nii.gz"): words for file, words in zip(files, said, strict=False)}


def test_pack_and_check_go_on(heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]) -> None:
    bad = spoil(heads)
    with pytest.raises(DataFormatError, match="3 of 6 subjects cannot be packed"):
        pack(heads, tmp_path / "refused", tiny())
    report = pack(heads, tmp_path / "out", tiny(), skip_bad=True)
    assert (report.num_subjects, len(report.failures)) == (3, 3)
    found = check(heads, tiny()).findings
    assert {finding.subjects[0] for finding in found if finding.severity == "error"} == set(bad)


def test_a_bug_in_the_work_on_a_subject_costs_that_subject(
    heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = share.prepare

    def prepare(subject: share.Row, config: DataConfig) -> object:
        if subject.id == "head_0002":
            raise IndexError("of ours")
        return real(subject, config)

    monkeypatch.setattr(share, "prepare", prepare)
    report = pack(heads, tmp_path / "out", tiny(), skip_bad=True)
    assert len(open_packed(tmp_path / "out")) == 5
    (said,) = report.failures
    assert said.startswith("subject head_0002: IndexError: of ours (in prepare, line ")
    monkeypatch.setattr(check_run, "open_case", prepare)
    findings = check(heads, tiny()).findings
    assert ("cannot-pack", ("head_0002",)) in {(finding.kind, finding.subjects) for finding in findings}


def test_voxels_near_the_end_of_single_precision_are_refused(
    heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig], write: Callable[..., Path]
) -> None:
    volume = np.full((12, 10, 8), 3e38, np.float32)
    volume[:6] = -3e38
    file = sorted((heads / "t1").iterdir())[0]
    write(file, volume, affine=nib.load(file).affine)
    (said,) = pack(heads, tmp_path / "out", tiny(voxel_size_mm=(2, 2, 2)), skip_bad=True).failures
    assert "960 voxels are NaN or infinite, or beyond 1e+30" in said


def test_a_path_of_a_table_that_no_file_can_have(
    heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig], write: Callable[..., Path]
) -> None:
    rows = [f"{file.stem},{file},{heads / 't1' / file.name}" for file in sorted((heads / "mask").iterdir())]
    rows[0] = f"long,{heads}/{'x' * 300}.nii,{heads}/t1.nii"
    (tmp_path / "t.csv").write_text("\n".join(["subject,mask,t1", *rows]))
    report = pack(tmp_path / "t.csv", tmp_path / "out", tiny())
    assert report.num_subjects == 5
    assert "no such file" in str(report.unmatched[0])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]) -> None:
    sorted((heads / "t1").iterdir())[0].chmod(0)
    (said,) = pack(heads, tmp_path / "out", tiny(), skip_bad=True).failures
    assert "cannot be read (Permission denied); mend its name, its permissions" in said
