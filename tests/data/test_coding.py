"""Masks of every year of BraTS get the labels that they mean, whatever the layout; what cannot be told is refused."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc_ddpm.config import DataConfig, LabelsConfig, load_config
from hpc_ddpm.data.check.run import check
from hpc_ddpm.data.coding import CODINGS, coded_labels, meaning_of, resolve_labels
from hpc_ddpm.data.discover import discover
from hpc_ddpm.data.labels import remap_labels
from hpc_ddpm.data.nifti import write_nifti
from hpc_ddpm.data.pack import PackReport, pack
from hpc_ddpm.data.settle import settle
from hpc_ddpm.data.shards import config_digest, open_packed
from hpc_ddpm.errors import ConfigError, DataFormatError

SIDE = 16
PRESET = dict(load_config("brats_192").config.data.labels.names)
WITH_CAVITY = {1: "netc", 2: "snfh", 3: "et", 4: "resection_cavity"}
CHILDREN = {1: "ET", 2: "NET", 3: "CC", 4: "ED", 5: "brain"}
CORE, EDEMA, ENHANCING, FOURTH, BRAIN = 1, 2, 3, 4, 9
LAYOUTS = ("tree", "brats_raw", "table")


def config(names: Mapping[int, str] = PRESET, **labels: Any) -> DataConfig:
    return DataConfig(size=(SIDE,) * 3, labels={"names": names, **labels})


def anatomy(large_core: bool = False) -> np.ndarray:
    """(D, H, W): a brain (9) with edema (2), enhancing tumour (3) and a core (1), and a fourth part (4)."""
    parts = np.zeros((SIDE,) * 3, np.uint8)
    parts[2:14, 2:14, 2:14] = BRAIN
    parts[5:10, 5:10, 5:10] = ENHANCING if large_core else EDEMA
    parts[6:9, 6:9, 6:9] = ENHANCING
    parts[7, 7, 7] = CORE
    parts[5, 5, 5:8] = EDEMA
    parts[11:13, 11:13, 11:13] = FOURTH
    return parts


def coded(values: Mapping[int, int], **how: bool) -> np.ndarray:
    """The anatomy with these values on disk; what is not among them is 0."""
    parts = anatomy(**how)
    return np.select([parts == part for part in values], list(values.values()), 0).astype(np.uint8)


BRATS2021 = {CORE: 1, EDEMA: 2, ENHANCING: 4}
BRATS2023 = {CORE: 1, EDEMA: 2, ENHANCING: 3}
BRATS2024 = {**BRATS2023, FOURTH: 4}
PACKED = {**BRATS2023, BRAIN: 4, FOURTH: 4}
PED = {ENHANCING: 1, CORE: 2, FOURTH: 3, EDEMA: 4}


def write_source(root: Path, masks: Mapping[str, np.ndarray], layout: str = "tree") -> Path:
    """Masks with one image each; a path to give to `discover`."""
    rows = [("subject", "mask", "t1")]
    for seed, (subject, mask) in enumerate(masks.items()):
        image = np.where(anatomy() > 0, np.random.default_rng(seed).normal(500, 50, mask.shape), 0)
        names = (f"mask/{subject}.nii", f"t1/{subject}.nii")
        if layout == "brats_raw":
            names = (f"{subject}/{subject}_seg.nii", f"{subject}/{subject}_t1.nii")
        write_nifti(root / names[0], mask, np.eye(4))
        write_nifti(root / names[1], image.astype(np.float32), np.eye(4))
        rows.append((subject, *names))
    if layout != "table":
        return root
    with (root / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root / "table.csv"


def packed(source: Path, data: DataConfig, **how: Any) -> tuple[dict[str, np.ndarray], PackReport]:
    out = source.parent / "packed"
    shutil.rmtree(out, ignore_errors=True)
    report = pack(source, out, data, **how)
    dataset = open_packed(out)
    return {subject.id: dataset.read_mask(subject.index) for subject in dataset.subjects()}, report


def settled(source: Path, data: DataConfig) -> tuple[str, DataConfig]:
    found = discover(source, data)
    result = settle(found.subjects, data.model_copy(update={"layout": found.layout}))
    return result.coding, result.config


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("large_core", [False, True], ids=["edema", "mostly enhancing"])
def test_raw_2021_masks_in_every_layout(tmp_path: Path, layout: str, large_core: bool) -> None:
    """Also where enhancing tumour is more than half of it."""
    mask = coded(BRATS2021, large_core=large_core)
    source = write_source(tmp_path / "in", {"a": mask, "b": mask}, layout)
    masks, report = packed(source, config())
    wanted = coded({**PACKED}, large_core=large_core)
    np.testing.assert_array_equal(masks["a"], wanted)
    assert report.coding == (
        "masks are coded as brats2021: 1 (necrotic core) is label 1, 2 (edema) is label 2, 4 (enhancing tumour) is "
        "label 3; 4 (brain) comes from the images"
    )
    result = check(source, config())
    assert result.coding == report.coding
    assert not [finding for finding in result.findings if finding.severity == "error"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_of_2023_and_packed_ones(tmp_path: Path, layout: str) -> None:
    source = write_source(tmp_path / "raw", {"a": coded(BRATS2023)}, layout)
    np.testing.assert_array_equal(packed(source, config())[0]["a"], coded(PACKED))
    if layout != "brats_raw":
        source = write_source(tmp_path / "in", {"a": coded(PACKED), "b": coded(BRATS2023 | {BRAIN: 4})}, layout)
        masks, report = packed(source, config())
        assert (report.coding, settled(source, config())[0]) == (
            "masks are coded as data.labels.names says",
            "as_named",
        )
        np.testing.assert_array_equal(masks["a"], coded(PACKED))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cavity_is_never_enhancing_tumour_nor_the_brain(tmp_path: Path, layout: str) -> None:
    source = write_source(tmp_path / "in", {"a": coded(BRATS2024)}, layout)
    np.testing.assert_array_equal(packed(source, config(WITH_CAVITY))[0]["a"], coded(BRATS2024))
    with pytest.raises(DataFormatError, match=r"brats2024 \(.*4 = resection cavity.* or brats_ped .*4 = edema"):
        pack(source, tmp_path / "out", config())
    assert "coding-unclear" in {finding.kind for finding in check(source, config()).findings}
    with pytest.raises(DataFormatError, match=r"unexpected labels \[4 \(resection cavity\)\] found"):
        pack(source, tmp_path / "out", config(coding="brats2024"))
    stated = packed(source, config(coding="brats2024", remap={4: 1}))[0]["a"]
    np.testing.assert_array_equal(stated, coded({**PACKED, FOURTH: 1}))
    named = packed(source, config({**WITH_CAVITY, 5: "brain"}, coding="brats2024"))[0]["a"]
    np.testing.assert_array_equal(named, coded({**BRATS2024, BRAIN: 5}))


def test_names_of_cases_tell_children_from_adults(tmp_path: Path) -> None:
    children = write_source(tmp_path / "ped", {"BraTS-PED-00001-000": coded(PED)})
    masks, report = packed(children, config(CHILDREN))
    np.testing.assert_array_equal(masks["BraTS-PED-00001-000"], coded({**PED, BRAIN: 5}))
    assert report.coding.startswith("masks are coded as brats_ped: 1 (enhancing tumour) is label 1")
    with pytest.raises(DataFormatError, match=r"unexpected labels \[2 \(non-enhancing tumour\), 3 \(cystic comp"):
        pack(children, tmp_path / "out", config())
    adults = write_source(tmp_path / "gli", {"BraTS-GLI-02062-100": coded(BRATS2024)})
    assert settled(adults, config({**WITH_CAVITY, 5: "brain"}))[0] == "brats2024"
    both = {"BraTS-PED-00001-000": coded(PED), "BraTS-GLI-00002-000": coded(BRATS2023)}
    with pytest.raises(DataFormatError, match="cases of different codings in one cohort; pack them apart"):
        pack(write_source(tmp_path / "both", both), tmp_path / "out", config())


def test_a_mixed_cohort_is_refused_and_skip_bad_leaves_out_the_wrong_ones(tmp_path: Path) -> None:
    raw = {"a": coded(BRATS2021), "c": coded(BRATS2021, large_core=True)}
    source = write_source(tmp_path / "in", {**raw, "b": coded(PACKED), "d": coded(PACKED)})
    with pytest.raises(DataFormatError, match=r"value 4 is the brain in b, d and a part of the tumour in a, c"):
        pack(source, tmp_path / "out", config())
    masks, report = packed(source, config(coding="as_named"), skip_bad=True)
    assert (set(masks), len(report.failures)) == ({"b", "d"}, 2)
    assert all("covers little of the brain" in failure for failure in report.failures)
    masks, report = packed(source, config(coding="brats2021"), skip_bad=True)
    assert set(masks) == {"a", "c"}
    years = write_source(tmp_path / "years", {"a": coded(BRATS2021), "b": coded(BRATS2023)}, "brats_raw")
    with pytest.raises(DataFormatError, match=r"masks hold 3 \(b\) or 4 \(a\) and none holds both"):
        pack(years, tmp_path / "out", config())


@pytest.mark.parametrize("layout", ["tree", "brats_raw"])
def test_the_brain_is_never_taken_for_a_tumour(tmp_path: Path, layout: str) -> None:
    """One mask without enhancing tumour, in which 4 is the brain, among raw ones that nobody looked at."""
    odd = coded({**PACKED, ENHANCING: 2})
    source = write_source(tmp_path / "in", {"a": coded(BRATS2021), "b": odd}, layout)
    masks, report = packed(source, config(coding="brats2021"), skip_bad=True)
    assert set(masks) == {"a"}
    assert "label 3 (enhancing_tumour) would fill 9" in report.failures[0]
    alone = write_source(tmp_path / "alone", {"b": odd}, layout)
    np.testing.assert_array_equal(packed(alone, config())[0]["b"], odd)


def test_one_odd_mask_decides_nothing(tmp_path: Path) -> None:
    odd = coded({**BRATS2021, FOURTH: 7})
    source = write_source(tmp_path / "in", {"a": coded(BRATS2021), "b": odd, "c": coded(BRATS2021)})
    masks, report = packed(source, config(), skip_bad=True)
    np.testing.assert_array_equal(masks["c"], coded(PACKED))
    assert "unexpected labels [7] found" in report.failures[0]


def test_cases_of_2021_with_values_of_2023(tmp_path: Path) -> None:
    """As many convert them."""
    source = write_source(tmp_path / "in", {"BraTS2021_00001": coded(BRATS2023)})
    assert settled(source, config())[0] == "brats2023"


def test_two_values_become_one_label_only_where_that_is_said(tmp_path: Path) -> None:
    names = {1: "node", 2: "gland"}
    two = {"a": coded({CORE: 1, EDEMA: 2, ENHANCING: 7})}
    apart = {"a": coded({CORE: 1, EDEMA: 7}), "b": coded({CORE: 1, EDEMA: 2})}
    for number, masks in enumerate((two, apart)):
        source = write_source(tmp_path / str(number), masks)
        with pytest.raises(DataFormatError, match=r"values 2 \(.*\) and 7 \(a\) would both become label 2 \(gland\)"):
            pack(source, tmp_path / "out", config(names, remap={7: 2}))
        assert set(packed(source, config(names, remap={7: 2, 2: 2}))[0]) == set(masks)
    with pytest.raises(DataFormatError, match="labels 2 and 7 would both become 2") as refused:
        remap_labels(two["a"], LabelsConfig(names=names, remap={7: 2}), Path("m.nii"))
    assert refused.value.kind == "labels-merged"


def test_a_star_is_all_other_values() -> None:
    names = {17: "hippocampus", 1: "cortex"}
    mask = np.array([0, 1, 17, 1001, 2035, -1], np.int16)
    labels = LabelsConfig.model_validate({"names": names, "remap": {"1001": 1, 1: 1, "*": 0}})
    assert labels.remap == {1001: 1, 1: 1, "*": 0}
    assert remap_labels(mask, labels, Path("m.nii")).tolist() == [0, 1, 17, 1, 0, 0]
    assert LabelsConfig.model_validate_json(labels.model_dump_json()) == labels


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("necrotic_core", "necrotic core"),
        ("NCR/NET", "necrotic core"),
        ("NETC", "necrotic core"),
        ("non-enhancing tumor core", "necrotic core"),
        ("net", "non-enhancing tumour"),
        ("GD-enhancing tumor", "enhancing tumour"),
        ("enhancing_tumour", "enhancing tumour"),
        ("ET", "enhancing tumour"),
        ("peritumoral edema", "edema"),
        ("oedema", "edema"),
        ("SNFH", "edema"),
        ("resection cavity", "resection cavity"),
        ("cystic", "cystic component"),
        ("rest of the brain", "brain"),
        ("brain tumour", None),
        ("brain stem", None),
        ("liver", None),
    ],
)
def test_what_names_mean(name: str, meaning: str | None) -> None:
    assert meaning_of(name) == meaning


@pytest.mark.parametrize("coding", CODINGS)
def test_labels_are_found_by_name(coding: str) -> None:
    """In any order and with any numbers."""
    meanings = set(CODINGS[coding].values())
    names = dict(enumerate(sorted(meanings), start=11))
    scheme = coded_labels(LabelsConfig(names=names), coding)
    mask = np.array(list(CODINGS[coding]), np.uint8)
    assert [names[label] for label in remap_labels(mask, scheme, Path("m")).tolist()] == list(CODINGS[coding].values())


def test_a_label_that_no_value_becomes_is_asked_about(tmp_path: Path) -> None:
    names = {1: "necrosis", 2: "edema", 3: "enhancing", 4: "rest"}
    source = write_source(tmp_path / "in", {"a": coded(BRATS2023)}, "brats_raw")
    with pytest.raises(ConfigError, match=r"no value for label 4 \(rest\); set data.labels.foreground_label"):
        pack(source, tmp_path / "out", config(names))
    np.testing.assert_array_equal(packed(source, config(names, foreground_label=4))[0]["a"], coded(PACKED))


def test_settings_and_digests_of_before_stay(tmp_path: Path) -> None:
    assert config_digest(DataConfig()) == "44136fa355b3"
    assert config_digest(load_config("brats_192").config.data) == "bc518c0873e8"
    for number, coding in enumerate((BRATS2021, BRATS2023)):
        source = write_source(tmp_path / str(number), {"a": coded(coding)}, "brats_raw")
        given = config().model_copy(update={"layout": "brats_raw"})
        assert settled(source, config())[1] == given
    assert resolve_labels(LabelsConfig(), "tree") == LabelsConfig()


def test_a_packed_dataset_is_added_to_and_trained_on_with_its_coding(tmp_path: Path) -> None:
    from hpc_ddpm.data.agreement import agree_with_packed

    source, out = tmp_path / "in", tmp_path / "out"
    write_source(source, {"a": coded(BRATS2021)})
    pack(source, out, config())
    write_source(source, {"b": coded(BRATS2021, large_core=True)})
    assert [pack(source, out, config()).num_written for _ in range(2)] == [1, 0]
    assert open_packed(out).data.labels.coding == "brats2021"
    agreed = agree_with_packed(config().model_copy(update={"path": str(out)}))
    assert agreed.labels == config().labels
