from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from hpc_ddpm.config import LabelsConfig, load_config
from hpc_ddpm.data.coding import brats_raw_labels
from hpc_ddpm.data.labels import (
    check_present,
    count_labels,
    one_hot,
    remap_labels,
    to_brats_raw,
    written_names,
)
from hpc_ddpm.data.nifti import read_nifti
from hpc_ddpm.errors import ConfigError, DataFormatError

BRATS = load_config("brats_192").config.data.labels
FILE = Path("m.nii")


def test_remap_is_simultaneous_and_minus_one_is_background() -> None:
    labels = LabelsConfig(names={1: "a", 2: "b"}, remap={1: 2, 2: 1, 9: 0})
    mask = np.array([-1, 0, 1, 2, 9], np.float64)
    remapped = remap_labels(mask, labels, FILE)
    assert remapped.dtype == np.uint8
    assert remapped.tolist() == [0, 0, 2, 1, 0]


@pytest.mark.parametrize("dtype", [np.int16, np.uint8])
def test_labels_stored_with_scale_factors(tmp_path: Path, dtype: type) -> None:
    mask = np.arange(60, dtype=np.float64).reshape(3, 4, 5) % 5
    image = nib.Nifti1Image(mask.T, np.eye(4))
    image.set_data_dtype(dtype)
    nib.save(image, tmp_path / "m.nii")
    stored = read_nifti(tmp_path / "m.nii", dtype=None).data
    assert not np.array_equal(stored, mask)
    labels = LabelsConfig(names={1: "a", 2: "b", 3: "c", 4: "d"})
    np.testing.assert_array_equal(remap_labels(stored, labels, FILE), mask)


def test_raw_brats_scheme() -> None:
    raw = brats_raw_labels(BRATS)
    assert (raw.remap, raw.foreground_label) == ({4: 3}, 4)
    assert remap_labels(np.array([0, 1, 2, 4]), raw, FILE).tolist() == [0, 1, 2, 3]
    own = BRATS.model_copy(update={"remap": {5: 1}})
    assert brats_raw_labels(own) is own
    three = LabelsConfig(names={1: "a", 2: "b", 3: "c"})
    assert brats_raw_labels(three).foreground_label is None


def test_back_to_raw_brats() -> None:
    labels, mask = load_config("brats_192").config.data.labels, np.array([0, 1, 2, 3, 4], np.uint8)
    raw = to_brats_raw(mask, labels)
    assert raw.tolist() == [0, 1, 2, 4, 0]
    assert remap_labels(raw, brats_raw_labels(labels), Path("x")).tolist() == [0, 1, 2, 3, 0]
    assert written_names(labels, "brats_raw") == {1: "necrotic_core", 2: "edema", 4: "enhancing_tumour"}
    assert written_names(labels, "packed") == labels.names
    with pytest.raises(ConfigError, match="needs labels 1, 2, 3 and 4"):
        to_brats_raw(mask, LabelsConfig())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 1.5], "fractional label 1.5 found"),
        ([0, 1.02], "fractional label 1.02 found"),
        ([0, np.nan], "NaN or infinite labels found, whole numbers expected"),
        ([0, np.inf], "NaN or infinite labels found"),
        ([0, 1, 7, 9], r"unexpected labels \[7, 9\] found, expected 0 and 1 \(head\), 2 \(tumour\)"),
        ([-2, 1], r"unexpected labels \[-2\] found"),
        (list(range(3, 30)), r"unexpected labels \[3, 4, .*\] and 17 more found"),
    ],
)
def test_wrong_labels(values: list[float], message: str) -> None:
    with pytest.raises(DataFormatError, match=f"m.nii: {message}"):
        remap_labels(np.array(values), LabelsConfig(), FILE)


def test_missing_labels() -> None:
    with pytest.raises(DataFormatError, match=r"the mask is empty, expected some of 1 \(head\)"):
        check_present(np.zeros((2, 2, 2), np.uint8), LabelsConfig(), FILE)
    with pytest.raises(DataFormatError, match=r"label 1 \(head\) is missing, found \[2\]"):
        check_present(np.full((2, 2, 2), 2, np.uint8), LabelsConfig(), FILE)
    check_present(np.full((2, 2, 2), 1, np.uint8), LabelsConfig(), FILE)
    check_present(np.full((2, 2, 2), 2, np.uint8), LabelsConfig(names={1: "csf", 2: "grey"}), FILE)


def test_raw_brats_values_in_a_scheme_with_brain() -> None:
    raw = np.zeros((6, 6, 6), np.uint8)
    raw[1:5, 1:5, 1:5] = 2
    raw[2:4, 2:4, 2:4] = 4
    with pytest.raises(DataFormatError, match=r"label 4 \(brain\) is smaller than .* raw BraTS coding"):
        check_present(raw, BRATS, FILE)
    raw[raw == 0] = 4
    check_present(raw, BRATS, FILE)


def test_count_labels() -> None:
    assert count_labels(
        np.array([[[0, 2, 2, 1]]], np.uint8), LabelsConfig(names={2: "b", 1: "a", 3: "c"})
    ).tolist() == [
        2,
        1,
        0,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("off", "on"), [(0.0, 1.0), (-1.0, 1.0), (0.25, -0.5)])
def test_one_hot(dtype: torch.dtype, off: float, on: float) -> None:
    labels = LabelsConfig(names={4: "b", 1: "a"}, off_value=off, on_value=on)
    mask = torch.randint(0, 5, (2, 3, 4, 5), dtype=torch.uint8)
    channels = one_hot(mask, labels, dtype)
    assert (channels.shape, channels.dtype) == ((2, 2, 3, 4, 5), dtype)
    for channel, label in enumerate((4, 1)):
        expected = torch.where(mask == label, torch.tensor(on), torch.tensor(off))
        assert torch.equal(channels[:, channel].float(), expected)
