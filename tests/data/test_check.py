"""Every kind of fault, planted in a clean cohort, is found by name; the clean cohort has none."""

from __future__ import annotations

import ast
import csv
import gzip
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from dicom_files import write_series

from hpc_ddpm.config import DataConfig, LabelsConfig, load_config
from hpc_ddpm.data.check.case import Case
from hpc_ddpm.data.check.findings import KINDS, SOURCE_KINDS, Finding, by_kind, exit_code
from hpc_ddpm.data.check.run import CheckReport, check
from hpc_ddpm.data.discover import Subject
from hpc_ddpm.data.nifti import write_nifti
from hpc_ddpm.data.phantom import write_phantoms
from hpc_ddpm.errors import DataFormatError

BAD = "head_0002"
SIDE = 16
REPOSITORY = Path(__file__).resolve().parents[2]


def config(**changes: Any) -> DataConfig:
    return DataConfig(**{"size": (SIDE,) * 3, "modalities": ("t1", "t2"), **changes})


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six phantoms with two modalities."""
    return write_phantoms(tmp_path_factory.mktemp("clean"), 6, (SIDE,) * 3, modalities=("t1", "t2"))


@pytest.fixture
def cohort(clean: Path, tmp_path: Path) -> Path:
    return shutil.copytree(clean, tmp_path / "cohort")


def path(root: Path, role: str, subject: str = BAD) -> Path:
    return root / role / f"{subject}.nii.gz"


def edit(file: Path, change: Callable[[np.ndarray], np.ndarray], affine: Any = None) -> None:
    """Rewrite a file with its (X, Y, Z) array changed."""
    image = nib.load(file)
    data = change(np.asarray(image.dataobj))
    nib.save(nib.Nifti1Image(data, image.affine if affine is None else affine), file)


def edit_all(root: Path, change: Callable[[np.ndarray], np.ndarray], affine: Any = None) -> None:
    """The files of one subject, all alike."""
    for role in ("mask", "t1", "t2"):
        edit(path(root, role), change, affine)


def put(value: float, where: Any = (0, 0, 0)) -> Callable[[np.ndarray], np.ndarray]:
    def change(data: np.ndarray) -> np.ndarray:
        data = data.astype(np.float32)
        data[where] = value
        return data

    return change


def same(data: np.ndarray) -> np.ndarray:
    return data


def plant_unmatched(root: Path) -> None:
    shutil.copy(path(root, "t1"), path(root, "t1", "alone"))


def plant_duplicate(root: Path) -> None:
    shutil.copy(path(root, "mask"), root / "mask" / f"{BAD}_seg.nii.gz")


def plant_truncated(root: Path) -> None:
    whole = path(root, "t2").read_bytes()
    path(root, "t2").write_bytes(whole[: len(whole) // 2])


def plant_short_nii(root: Path) -> None:
    whole = gzip.decompress(path(root, "t2").read_bytes())
    path(root, "t2").unlink()
    (root / "t2" / f"{BAD}.nii").write_bytes(whole[:-100])


def plant_garbage(root: Path) -> None:
    path(root, "t2").write_bytes(gzip.compress(b"not an image" * 100))


def plant_gap(root: Path) -> None:
    """A DICOM series that lacks a slice."""
    series = write_series(root / "t2" / BAD, np.asarray(nib.load(path(root, "t2")).dataobj).T)
    path(root, "t2").unlink()
    (series / "004.dcm").unlink()


def plant_bad_affine(root: Path) -> None:
    image = nib.load(path(root, "t1"))
    image.header.set_sform(np.diag([0.0, 0, 0, 1]), code=2)
    image.header.set_qform(None, code=0)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), path(root, "t1"))


def plant_two_places(root: Path) -> None:
    """A qform that lies 30 mm beside the sform."""
    image = nib.load(path(root, "t1"))
    beside = image.affine.copy()
    beside[0, 3] += 30
    image.set_qform(beside, code=1)
    nib.save(image, path(root, "t1"))


def plant_text(root: Path) -> None:
    image = nib.load(path(root, "t1"))
    image.header["descrip"] = b"Doe^Jane 1953-04-01"
    nib.save(image, path(root, "t1"))


def plant_no_affine(root: Path) -> None:
    for role in ("mask", "t1", "t2"):
        image = nib.load(path(root, role))
        copy = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
        copy.set_sform(None, code=0)
        copy.set_qform(None, code=0)
        nib.save(copy, path(root, role))


def plant_scaled(root: Path) -> None:
    image = nib.load(path(root, "t1"))
    copy = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    copy.header.set_slope_inter(0.5, 3)
    nib.save(copy, path(root, "t1"))


def plant_lps(root: Path) -> None:
    affine = nib.load(path(root, "t1")).affine
    edit_all(
        root, lambda data: data[::-1, ::-1], affine @ np.diag([-1, -1, 1, 1]) + np.outer([180, 180, 0, 0], [0, 0, 0, 1])
    )


def plant_window(root: Path) -> None:
    edit(path(root, "t1"), lambda data: data.astype(np.float32) / 1000)


def plant_specks(root: Path) -> None:
    def speck(data: np.ndarray) -> np.ndarray:
        data[::4, ::4, ::4] = 2
        return data

    edit(path(root, "mask"), speck)


def plant_one_voxel(root: Path) -> None:
    """A tumour that a grid twice as coarse, which takes the odd voxels, has not."""
    edit(path(root, "mask"), lambda data: put(2, (8, 8, 8))(np.minimum(data, 1)))


def plant_border_mask(root: Path) -> None:
    """A mask of the outermost slices alone."""
    edit(path(root, "mask"), lambda data: put(0, slice(4, None))(data))


def plant_copy(root: Path) -> None:
    for role in ("mask", "t1", "t2"):
        shutil.copy(path(root, role, "head_0001"), path(root, role))


def plant_shifted_mask(root: Path) -> None:
    def corner(data: np.ndarray) -> np.ndarray:
        moved = np.zeros_like(data)
        moved[:3, :3, :3] = 1
        moved[0, 0, 0] = 2
        return moved

    edit(path(root, "mask"), corner)


def plant_raw_brats(root: Path) -> None:
    """4 is a small label inside, as in raw BraTS, where the scheme has brain."""
    for file in (root / "mask").iterdir():
        edit(file, lambda data: np.where(data == 1, 2, np.where(data == 2, 4, 0)).astype(np.uint8))


def plant_third(root: Path) -> None:
    """A third label, beside the second."""
    edit(path(root, "mask"), lambda data: put(3, (slice(6, 9), 8, 8))(data))


def plant_names(root: Path) -> None:
    """What the source calls its labels."""
    (root / "dataset.json").write_text('{"labels": {"0": "background", "1": "tumour", "2": "head"}}')


def plant_four(root: Path) -> None:
    """Four parts of a tumour, each of a few voxels."""
    for file in (root / "mask").iterdir():
        edit(file, lambda data: np.where(data == 2, 1 + np.indices(data.shape)[0] % 4, 0).astype(np.uint8))


def plant_no_background(root: Path) -> None:
    """Images that the brain fills."""
    for role in ("t1", "t2"):
        edit(path(root, role), lambda data: np.random.default_rng(0).normal(500, 100, data.shape).astype(np.float32))


def plant_table(root: Path) -> None:
    with (root / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("subject", "mask", "t1", "t2"))
        for subject in ("head_0000", "head_0001"):
            table.writerow((subject, *(f"{role}/{subject}.nii.gz" for role in ("mask", "t1", "t2"))))
        table.writerow((BAD, f"mask/{BAD}.nii.gz", "t1/gone.nii.gz", f"t2/{BAD}.nii.gz"))


def plant_torn_patient(root: Path) -> None:
    """A table that gives two scans of one patient two splits."""
    plant_table(root)
    lines = (root / "table.csv").read_text().replace("gone", BAD).splitlines()
    about = ("patient,split", "P1,train", "P2,val", "P1,val")
    (root / "table.csv").write_text("\n".join(f"{line},{more}" for line, more in zip(lines, about, strict=True)))


def plant_other_mask(root: Path) -> None:
    """One folder per case, and in one of them a second file that a mask may be called."""
    for role, end in (("mask", "seg"), ("t1", "t1"), ("t2", "t2")):
        for file in (root / role).iterdir():
            case = root / file.name.removesuffix(".nii.gz")
            case.mkdir(exist_ok=True)
            file.rename(case / f"{case.name}_{end}.nii.gz")
        (root / role).rmdir()
    shutil.copy(root / BAD / f"{BAD}_seg.nii.gz", root / BAD / f"{BAD}_glistrboost.nii.gz")


BRATS_LABELS = LabelsConfig(names={1: "core", 2: "edema", 3: "enhancing", 4: "brain"})
HEAD_AND_TUMOUR = {"names": {1: "head", 2: "tumour"}}
BRATS_AS_NAMED = BRATS_LABELS.model_copy(update={"coding": "as_named"})
BRAIN_OF_IMAGES = LabelsConfig(names={1: "head", 2: "tumour", 3: "brain"}, foreground_label=3)
FAULTS: list[tuple[str, str, Callable[[Path], Any], dict[str, Any]]] = [
    ("an image alone", "unmatched-file", plant_unmatched, {}),
    ("two masks", "duplicate-subject", plant_duplicate, {}),
    ("a row without its file", "missing-file", plant_table, {}),
    ("one patient in two splits", "patient-in-two-splits", plant_torn_patient, {}),
    ("another mask", "set-aside", plant_other_mask, {"layout": "cases"}),
    ("half a gz", "truncated", plant_truncated, {}),
    ("half a nii", "truncated", plant_short_nii, {}),
    ("garbage", "unreadable", plant_garbage, {}),
    ("a slice missing", "dicom-series", plant_gap, {}),
    ("gzipped, and called .nii", "misnamed", lambda r: path(r, "t1").rename(r / "t1" / f"{BAD}.nii"), {}),
    ("a name in the header", "identifying-text", plant_text, {}),
    ("sform and qform apart", "sform-qform", plant_two_places, {}),
    ("a singular affine", "bad-affine", plant_bad_affine, {}),
    ("four dimensions", "series", lambda r: edit(path(r, "t1"), lambda d: np.stack([d, d], 3)), {}),
    ("slope and intercept", "scaled-integers", plant_scaled, {}),
    ("another shape", "grid-shape", lambda r: edit(path(r, "t2"), lambda d: d[1:]), {}),
    ("another place", "grid-affine", lambda r: edit(path(r, "t2"), same, np.diag([12.0, 12, 12, 1])), {}),
    ("no affine", "no-affine", plant_no_affine, {}),
    ("another orientation", "orientation-differs", plant_lps, {}),
    ("mixed orientations", "orientation-mixed", plant_lps, {"orientation": "native"}),
    ("flat voxels", "anisotropic", lambda r: edit_all(r, same, np.diag([1.0, 1, 5, 1])), {}),
    ("other voxels", "voxel-size-outlier", lambda r: edit_all(r, same, np.diag([10.0, 10, 10, 1])), {}),
    ("another size", "size-mixed", lambda r: edit_all(r, lambda d: d[1:]), {}),
    ("not the exact size", "size-mismatch", lambda r: edit_all(r, lambda d: d[1:]), {"fit": "exact"}),
    ("a small crop", "labels-cut", same, {"size": (10, 16, 16)}),
    ("a coarse grid", "label-vanishes", plant_one_voxel, {"size": (8, 8, 8), "fit": "resize"}),
    ("a mirrored image", "flipped", lambda r: edit(path(r, "t2"), lambda d: d[::-1]), {}),
    ("a mirrored mask", "flipped", lambda r: edit(path(r, "mask"), lambda d: d[::-1]), {}),
    ("a mask elsewhere", "mask-off-image", plant_shifted_mask, {}),
    ("an interpolated mask", "fractional-labels", lambda r: edit(path(r, "mask"), put(0.5)), {}),
    ("an unknown label", "unexpected-labels", lambda r: edit(path(r, "mask"), put(7)), {}),
    ("an empty mask", "empty-mask", lambda r: edit(path(r, "mask"), np.zeros_like), {}),
    ("no head", "missing-outer-label", lambda r: edit(path(r, "mask"), lambda d: np.where(d == 1, 0, d)), {}),
    ("no background", "brain-unclear", plant_no_background, {"labels": BRAIN_OF_IMAGES}),
    ("raw BraTS masks", "raw-brats-coding", plant_raw_brats, {"labels": BRATS_AS_NAMED}),
    ("two labels for one", "labels-merged", plant_third, {"labels": {**HEAD_AND_TUMOUR, "remap": {3: 2}}}),
    ("names in another order", "label-names-differ", plant_names, {}),
    ("4 is cavity or edema", "coding-unclear", plant_four, {"labels": BRATS_LABELS}),
    ("no tumour", "label-absent", lambda r: edit(path(r, "mask"), lambda d: np.minimum(d, 1)), {}),
    ("a label too many", "label-never-found", same, {"labels": {"names": {1: "head", 2: "tumour", 3: "ghost"}}}),
    ("tumours alone", "mostly-unlabelled", same, {"labels": {"names": {2: "tumour"}, "remap": {1: 0}}}),
    ("specks", "label-fragments", plant_specks, {}),
    ("a NaN", "not-finite", lambda r: edit(path(r, "t1"), put(np.nan)), {}),
    ("an infinity", "not-finite", lambda r: edit(path(r, "t2"), put(np.inf)), {}),
    ("a constant", "constant", lambda r: edit(path(r, "t2"), np.ones_like), {}),
    ("one bright voxel", "constant", lambda r: edit(path(r, "t2"), lambda d: put(5)(np.zeros_like(d))), {}),
    ("raw values", "out-of-range", same, {"normalization": "none"}),
    ("all above the window", "window-misses", same, {"normalization": "window", "low": -2000, "high": -1000}),
    ("all in a corner of it", "window-misses", plant_window, {"normalization": "window", "low": -160, "high": 900}),
    ("a hot voxel", "squeezed", lambda r: edit(path(r, "t1"), put(30000)), {"normalization": "med_ddpm_brats"}),
    ("Hounsfield units", "looks-like-ct", lambda r: edit(path(r, "t1"), lambda d: d - 1000), {}),
    ("one image twice", "identical-modalities", lambda r: shutil.copy(path(r, "t1"), path(r, "t2")), {}),
    ("one subject twice", "near-duplicate", plant_copy, {}),
    ("nothing left by the crop", "cannot-pack", plant_border_mask, {"size": (8, 16, 16)}),
]  # fmt: skip
OF_THE_WHOLE = {
    "unmatched-file",
    "duplicate-subject",
    "missing-file",
    "patient-in-two-splits",
    "set-aside",
    "size-mixed",
    "coding-unclear",
    "label-names-differ",
    "label-never-found",
    "mostly-unlabelled",
}


def show(report: CheckReport) -> list[tuple[str, tuple[str, ...], str]]:
    return [(finding.kind, finding.subjects, finding.found) for finding in report.findings]


def test_a_clean_cohort_has_no_findings(clean: Path) -> None:
    report = check(clean, config())
    assert show(report) == []
    assert [case.id for case in report.cases] == [f"head_{number:04d}" for number in range(6)]
    case = report.cases[0]
    assert (case.shape, case.voxel_size_mm, case.orientation) == ((16, 16, 16), (12.0, 12.0, 12.0), "RAS")
    assert case.label_voxels is not None and min(case.label_voxels) > 0


@pytest.mark.parametrize(
    ("kind", "plant", "changes"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS]
)
def test_a_planted_fault_is_found(
    cohort: Path, kind: str, plant: Callable[[Path], Any], changes: dict[str, Any]
) -> None:
    plant(cohort)
    source = cohort / "table.csv" if (cohort / "table.csv").exists() else cohort
    report = check(source, config(**changes))
    found = [finding for finding in report.findings if finding.kind == kind]
    assert found, show(report)
    if kind not in OF_THE_WHOLE:
        assert any(BAD in finding.subjects for finding in found), show(report)
    assert all(finding.advice and finding.found for finding in report.findings)
    expected_file = kind not in OF_THE_WHOLE | {
        "orientation-differs",
        "orientation-mixed",
        "voxel-size-outlier",
        "near-duplicate",
    }
    assert bool(found[0].file) == expected_file or kind in OF_THE_WHOLE


def test_there_is_a_fault_for_every_kind() -> None:
    assert {fault[1] for fault in FAULTS} == set(SOURCE_KINDS)
    assert len(FAULTS) >= 20


def test_refusals_carry_their_kind() -> None:
    """Every error of the modules that read a subject says which finding it is, and no error says what is none."""
    package, writing = REPOSITORY / "hpc_ddpm", {"write_nifti"}
    reading = {package / "data" / f"{name}.py" for name in ("nifti", "dicom", "preprocess", "labels", "intensity")}
    given, without = set(), []
    for file in sorted(package.rglob("*.py")):
        functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
        for function in functions:
            kinds = {node.value for node in ast.walk(function) if isinstance(node, ast.Constant)} & set(SOURCE_KINDS)
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            for call in (call for call in calls if getattr(call.func, "id", "") == "DataFormatError"):
                if len(call.args) == 2:
                    named = call.args[1]
                    given |= {named.value} if isinstance(named, ast.Constant) else kinds
                elif file in reading and function.name not in writing:
                    without.append(f"{file.name}: {function.name}")
    assert not without
    assert given <= set(SOURCE_KINDS)
    assert {"truncated", "bad-affine", "unexpected-labels", "constant", "size-mismatch"} <= given


def test_an_error_keeps_its_kind_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DataFormatError("a: b; c", "constant")))
    assert (str(error), error.kind) == ("a: b; c", "constant")


def test_a_refusal_without_a_kind_keeps_its_own_advice(clean: Path) -> None:
    subject = Subject("a", clean / "m.nii", {"t1": clean / "i.nii", "t2": clean / "j.nii"})
    finding = Case(subject, config()).refusal(DataFormatError(f"{clean / 'i.nii'}: odd; do this"))
    assert (finding.kind, finding.found, finding.file) == ("unreadable", "odd; do this", str(clean / "i.nii"))


def test_other_voxel_sizes_are_no_finding_where_all_are_resampled(cohort: Path) -> None:
    edit_all(cohort, same, np.diag([10.0, 10, 25, 1]))
    plain = {finding.kind for finding in check(cohort, config()).findings}
    resampled = {finding.kind for finding in check(cohort, config(voxel_size_mm=(20, 20, 20))).findings}
    assert plain == {"anisotropic", "voxel-size-outlier"}
    assert not resampled & {*plain, "labels-cut"}


def test_what_is_refused_by_pack_is_an_error_here(cohort: Path) -> None:
    """The subject alone is named; the others stay without a finding."""
    plant_truncated(cohort)
    report = check(cohort, config())
    assert [(finding.kind, finding.subjects) for finding in report.findings] == [("truncated", (BAD,))]
    assert exit_code(report.findings) == 2


def test_a_file_is_judged_once_for_each_thing(cohort: Path) -> None:
    edit(path(cohort, "t1"), put(np.nan))
    edit(path(cohort, "t2"), np.ones_like)
    edit(path(cohort, "mask"), put(7))
    kinds = {finding.kind for finding in check(cohort, config()).findings}
    assert {"not-finite", "constant", "unexpected-labels"} <= kinds
    assert "cannot-pack" not in kinds


def test_raw_brats_folders_get_their_brain_from_the_images(cohort: Path, tmp_path: Path) -> None:
    for number in range(3):
        subject = f"head_{number:04d}"
        for role, ending in (("mask", "seg"), ("t1", "t1"), ("t2", "t2")):
            target = tmp_path / "raw" / subject / f"{subject}_{ending}.nii.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path(cohort, role, subject), target)
        edit(tmp_path / "raw" / subject / f"{subject}_seg.nii.gz", lambda d: np.where(d == 2, 4, 0).astype(np.uint8))
    report = check(tmp_path / "raw", config(labels=BRATS_LABELS))
    assert report.layout == "brats_raw"
    assert {finding.kind for finding in report.findings} == {"label-absent", "label-never-found"}


def test_freesurfer_files_and_files_that_vanish(cohort: Path) -> None:
    image = nib.load(path(cohort, "t1"))
    nib.save(nib.MGHImage(np.asarray(image.dataobj, np.float32), image.affine), cohort / "t1" / f"{BAD}.mgz")
    path(cohort, "t1").unlink()
    assert show(check(cohort, config())) == []
    (cohort / "t1" / f"{BAD}.mgz").unlink()
    (cohort / "t1" / f"{BAD}.mgz").symlink_to("nowhere")
    assert [(finding.kind, finding.subjects) for finding in check(cohort, config()).findings] == [
        ("missing-file", (BAD,))
    ]


def test_processes_find_the_same(cohort: Path) -> None:
    plant_duplicate(cohort)
    edit(path(cohort, "t1", "head_0004"), put(np.nan))
    progress: list[tuple[int, int]] = []
    alone, many = (
        check(cohort, config(), num_workers=workers, progress=lambda done, total: progress.append((done, total)))
        for workers in (1, 2)
    )
    assert show(alone) == show(many)
    assert alone.to_json() == many.to_json()
    assert progress == [(done, 5) for done in range(1, 6)] * 2


def test_severity_decides_the_exit_code() -> None:
    note, warning, error = (Finding(kind, "x") for kind in ("size-mixed", "flipped", "constant"))
    assert [exit_code(findings) for findings in ([], [note], [note, warning], [warning, error])] == [0, 0, 0, 2]
    assert [exit_code(findings, strict=True) for findings in ([], [note], [note, warning])] == [0, 0, 2]
    assert list(by_kind([note, warning, error])) == ["constant", "flipped", "size-mixed"]


def test_every_finding_is_documented() -> None:
    text = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    missing = [kind for kind in KINDS if f"`{kind}`" not in text]
    assert not missing


# ------------------------------------------------------------------------------------------- real volumes


def test_real_whole_head(shared_data: Path) -> None:
    report = check(shared_data / "whole_head", load_config("whole_head_128").config.data)
    assert [(finding.kind, finding.found) for finding in report.findings] == [
        ("unmatched-file", "subject sample_1 has no t1")
    ]


@pytest.mark.slow
def test_real_brats(shared_data: Path, tmp_path: Path) -> None:
    data = load_config("brats_192").config.data
    report = check(shared_data / "brats2021", data)
    assert [finding.kind for finding in report.findings] == ["label-fragments"]
    cohort = shutil.copytree(shared_data / "brats2021", tmp_path / "cohort")
    for file in (cohort / "t2").iterdir():
        image = nib.load(file)
        write_nifti(file, np.asarray(image.dataobj, np.float32)[::-1].T, image.affine, compression_level=1)
    report = check(cohort, data)
    assert [f.found.partition(" (")[0] for f in report.findings if f.kind == "flipped"] == [
        "t2 fits t1 better mirrored left and right"
    ]
