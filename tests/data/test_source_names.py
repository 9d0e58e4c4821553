"""The names in dataset.json, of either kind, are held against the scheme's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpc_ddpm.config import LabelsConfig, load_config
from hpc_ddpm.data.source_names import refuse_contradictions
from hpc_ddpm.errors import DataFormatError

LIVER = {1: "liver", 2: "tumour"}
GLIOMA = load_config("brats_192").config.data.labels.names
DECATHLON_GLIOMA = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}


def look(folder: Path, content: Any, names: dict[int, str], **labels: Any) -> None:
    (folder / "labelsTr").mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(content if isinstance(content, str) else json.dumps(content))
    scheme = LabelsConfig(names=names, **labels)
    refuse_contradictions([folder / "labelsTr" / "a.nii.gz", folder / "labelsTr" / "b.nii.gz"], scheme, scheme)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({"0": "background", "1": "liver", "2": "cancer"}, LIVER),
        ({"background": 0, "liver": 1, "tumor": 2}, LIVER),
        ({"background": 0, "whole": [1, 2], "liver tumour": 2}, LIVER),
        ({"0": "background", "1": "left atrium"}, {1: "left_atrium"}),
        ({"1": "NETC", "2": "SNFH", "3": "ET"}, GLIOMA),
        ({"7": "not packed"}, LIVER),
        ({"liver": True, "2": 5, "x": "y"}, LIVER),
    ],
)
def test_names_that_agree(tmp_path: Path, labels: Any, names: dict[int, str]) -> None:
    look(tmp_path, {"labels": labels}, names)


@pytest.mark.parametrize(
    ("labels", "names", "value", "theirs", "ours"),
    [
        ({"0": "background", "1": "cancer", "2": "liver"}, LIVER, 1, "cancer", "liver"),
        ({"background": 0, "tumour": 1, "liver": 2}, LIVER, 1, "tumour", "liver"),
        ({"spleen": 1}, LIVER, 1, "spleen", "liver"),
        ({"1": "liver", "2": "liver tumour"}, {1: "liver tumour", 2: "liver"}, 1, "liver", "liver tumour"),
        (DECATHLON_GLIOMA, GLIOMA, 1, "edema", "necrotic_core"),
    ],
)
def test_names_that_contradict(
    tmp_path: Path, labels: Any, names: dict[int, str], value: int, theirs: str, ours: str
) -> None:
    message = rf"dataset.json: value {value} is called '{theirs}', data.labels.names calls what it becomes '{ours}'"
    with pytest.raises(DataFormatError, match=message) as refused:
        look(tmp_path, {"labels": labels}, names)
    assert refused.value.kind == "label-names-differ"


def test_a_remap_is_the_users_word(tmp_path: Path) -> None:
    look(tmp_path, {"labels": DECATHLON_GLIOMA}, GLIOMA, remap={1: 2, 2: 1})
    with pytest.raises(DataFormatError, match=r"value 3 is called 'enhancing tumour'.* 'edema'"):
        look(tmp_path, {"labels": DECATHLON_GLIOMA}, {1: "a", 2: "b", 3: "edema"}, remap={1: 1, 2: 2})


@pytest.mark.parametrize("content", ["", "[1]", '{"labels": ["liver"]}', '{"name": "x"}'])
def test_other_files_of_this_name_say_nothing(tmp_path: Path, content: str) -> None:
    look(tmp_path, content, LIVER)


def test_the_table_of_a_bids_tree(tmp_path: Path) -> None:
    mask, scheme = tmp_path / "sub-1" / "ses-1" / "anat" / "sub-1_ses-1_dseg.nii.gz", LabelsConfig(names=LIVER)
    (tmp_path / "dseg.tsv").write_text("index\tname\n0\tbackground\n1\tLiver\n2\ttumor\n")
    refuse_contradictions([mask], scheme, scheme)
    (tmp_path / "dseg.tsv").write_text("index\tname\n1\ttumor\n2\tliver\n")
    with pytest.raises(DataFormatError, match=r"dseg.tsv: value 1 is called 'tumor'"):
        refuse_contradictions([mask], scheme, scheme)
    (tmp_path / "dseg.tsv").write_text("index;name\n1;tumor\n")
    refuse_contradictions([mask], scheme, scheme)
