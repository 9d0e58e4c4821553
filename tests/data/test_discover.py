import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.discover import discover, find_layout, source_modalities
from hpc_ddpm.data.find_masks import find_masks
from hpc_ddpm.errors import DataFormatError

BRATS = ("t1", "t1ce", "t2", "flair")


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def found(source: Path, *modalities: str, layout: str = "auto") -> dict[str, list[str]]:
    """Names of the files of each subject: mask first."""
    config = DataConfig(modalities=modalities or ("t1",), layout=layout)
    return {
        subject.id: [subject.mask.name, *(path.name for path in subject.images.values())]
        for subject in discover(source, config).subjects
    }


def test_tree_pairs_by_id_and_names_the_rest(tmp_path: Path) -> None:
    touch(tmp_path, "mask/b.nii.gz", "mask/a.nii.gz", "mask/only mask.nii.gz")
    touch(tmp_path, "image/a.nii", "image/b.NII.GZ", "image/ü.nii", "image/.hidden.nii", "image/notes.txt")
    result = discover(tmp_path, DataConfig())
    assert [(s.id, s.mask.name, s.images["t1"].name) for s in result.subjects] == [
        ("a", "a.nii.gz", "a.nii"),
        ("b", "b.nii.gz", "b.NII.GZ"),
    ]
    assert result.layout == "tree"
    assert {(u.path.name, u.reason) for u in result.unmatched} == {
        ("only mask.nii.gz", "subject only mask has no t1"),
        ("ü.nii", "subject ü has no mask"),
    }


def test_brats_tree_drops_the_endings(tmp_path: Path) -> None:
    touch(tmp_path, "Seg/x_1_seg.nii.gz", *(f"{m.upper()}/x_1_{m}.nii.gz" for m in BRATS))
    assert found(tmp_path, *BRATS) == {"x_1": ["x_1_seg.nii.gz", *(f"x_1_{m}.nii.gz" for m in BRATS)]}


def test_symlinked_files_and_folders(tmp_path: Path) -> None:
    touch(tmp_path, "real/a.nii", "elsewhere/a.nii")
    source = tmp_path / "source"
    source.mkdir()
    (source / "mask").symlink_to(tmp_path / "real")
    (source / "t1").mkdir()
    (source / "t1" / "a.nii").symlink_to(tmp_path / "elsewhere" / "a.nii")
    assert list(found(source)) == ["a"]


def test_twice_the_same_subject_is_not_guessed(tmp_path: Path) -> None:
    touch(tmp_path, "mask/a.nii", "mask/a_seg.nii.gz", "t1/a.nii", "mask/b.nii", "t1/b.nii")
    result = discover(tmp_path, DataConfig())
    assert [subject.id for subject in result.subjects] == ["b"]
    assert {u.reason for u in result.unmatched} == {"subject a has more than one mask"}
    assert len(result.unmatched) == 3


@pytest.mark.parametrize(
    "endings",
    [("seg", "t1", "t1ce", "t2", "flair"), ("seg", "t1n", "t1c", "t2w", "t2f")],
    ids=["2021", "2023"],
)
def test_raw_brats(tmp_path: Path, endings: tuple[str, ...]) -> None:
    dash = "-" if endings[1] == "t1n" else "_"
    touch(tmp_path, *(f"HGG/case 1/case 1{dash}{e}.nii.gz" for e in endings))
    touch(tmp_path, *(f"case 2/case 2{dash}{e}.nii.gz" for e in endings[:-1]))
    result = discover(tmp_path, DataConfig(modalities=BRATS))
    assert result.layout == "brats_raw"
    assert [(s.id, list(s.images)) for s in result.subjects] == [("case 1", list(BRATS))]
    assert result.subjects[0].images["t2"].name.endswith(f"{endings[3]}.nii.gz")
    assert {u.reason for u in result.unmatched} == {"subject case 2 has no flair"}
    assert len(result.unmatched) == 4


def test_raw_brats_ignores_modalities_not_asked_for_but_names_unknown_files(tmp_path: Path) -> None:
    touch(tmp_path, "c/c_seg.nii.gz", "c/c_t1.nii.gz", "c/c_flair.nii.gz", "c/c_adc.nii.gz")
    result = discover(tmp_path, DataConfig(modalities=("t1",)))
    assert [u.path.name for u in result.unmatched] == ["c_adc.nii.gz"]
    assert "its name ends in none of" in result.unmatched[0].reason


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "json-wrapped"])
def test_tables(tmp_path: Path, kind: str) -> None:
    absolute = touch(tmp_path, "abs/m.nii") / "abs" / "m.nii"
    touch(tmp_path, "data/m 1.nii", "data/i1.nii", "data/i2.nii")
    rows = [
        {"Subject": "s1", "mask": "data/m 1.nii", "t1": "./data/x/../i1.nii", "split": "test"},
        {"Subject": "s2", "mask": str(absolute), "t1": "data/i2.nii", "split": ""},
        {"Subject": "s3", "mask": "data/m 1.nii", "t1": "data/gone.nii", "split": "train"},
    ]
    path = tmp_path / f"table.{kind.split('-')[0]}"
    if "json" in kind:
        path.write_text(json.dumps({"subjects": rows} if "wrapped" in kind else rows))
    else:
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        path.write_text("\ufeff" + "\n".join(("," if kind == "csv" else "\t").join(line) for line in lines))
    result = discover(path, DataConfig())
    assert [(s.id, s.split) for s in result.subjects] == [("s1", "test"), ("s2", None)]
    reasons = {u.reason for u in result.unmatched}
    assert reasons == {f"{path}, row 3: no such file", "subject s3 has no t1"}
    assert find_masks(path)[1] == ("s2", absolute)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows found"),
        ("subject,mask\na,m.nii\n", "column t1 not found among mask, subject"),
        ("subject,mask,t1\na,../m.nii,i.nii\n", r"row 1: \.\./m\.nii leaves the table's folder"),
        ("subject,mask,t1\na,x/../../m.nii,i.nii\n", "leaves the table's folder"),
        ("subject,mask,t1\na,,i.nii\n", "column mask is empty"),
        ("subject,mask,t1\na/b,m.nii,i.nii\n", "subject 'a/b' found"),
        ("subject,mask,t1\n..,m.nii,i.nii\n", r"subject '\.\.' found"),
        ("subject,mask,t1,split\na,m.nii,i.nii,dev\n", "split 'dev' found, expected train, val, test"),
        ("subject,mask,t1\na,m.nii,i.nii,\nb,m,1.nii,i.nii\n", "row 2: 4 cells found, 3 columns expected; put a"),
        ("subject,mask,t1\na,.,i.nii\n", "no complete subject found"),
    ],
)
def test_table_mistakes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataFormatError, match=message):
        discover(tmp_path / "t.csv", DataConfig())


def test_commas_at_the_end_of_lines_mean_nothing(tmp_path: Path) -> None:
    touch(tmp_path, "m.nii", "i.nii")
    (tmp_path / "t.csv").write_text("subject,mask,t1,\na,m.nii,i.nii,,\n")
    assert list(found(tmp_path / "t.csv")) == ["a"]
    assert source_modalities(tmp_path / "t.csv") == ("t1",)


def test_broken_json_tables(tmp_path: Path) -> None:
    for text, message in {
        "{": "not a readable table",
        "[1]": "expected a list of objects",
        "{}": "expected",
    }.items():
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(DataFormatError, match=message):
            discover(tmp_path / "t.json", DataConfig())
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataFormatError, match="not a readable table"):
        discover(tmp_path / "t.csv", DataConfig())


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="no such folder or table"):
        discover(tmp_path / "gone", DataConfig())
    with pytest.raises(DataFormatError, match="no such folder"):
        discover(tmp_path / "gone", DataConfig(layout="tree"))
    with pytest.raises(DataFormatError, match="not a folder or a table"):
        find_layout(touch(tmp_path, "x.txt") / "x.txt")
    with pytest.raises(DataFormatError, match=r"found x\.txt; expected a folder called mask, masks, seg, labels"):
        discover(tmp_path, DataConfig())
    (tmp_path / "t1").mkdir()
    with pytest.raises(DataFormatError, match="found t1 where one folder of masks is expected, called mask or"):
        discover(tmp_path, DataConfig(layout="tree"))
    touch(tmp_path, "mask/a.nii")
    with pytest.raises(DataFormatError, match="one folder of modality flair is expected"):
        discover(tmp_path, DataConfig(modalities=("flair",)))
    with pytest.raises(DataFormatError, match=r"no complete subject found as layout 'tree'.*subject a has no t1"):
        discover(tmp_path, DataConfig())
    touch(tmp_path, "Masks/a.nii")
    with pytest.raises(DataFormatError, match="found Masks, mask where one folder of masks"):
        discover(tmp_path, DataConfig())


def test_a_case_folder_source_without_cases(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match=r"layout 'brats_raw'.*no volumes"):
        discover(tmp_path, DataConfig(layout="brats_raw"))
    with pytest.raises(DataFormatError, match="no such folder"):
        discover(tmp_path / "gone", DataConfig(layout="brats_raw"))


def test_find_masks(tmp_path: Path) -> None:
    touch(tmp_path, "flat/b_seg.nii", "flat/a.nii.gz", "tree/mask/c.nii", "tree/t1/c.nii", "raw/d/d-seg.nii")
    assert [name for name, _ in find_masks(tmp_path / "flat")] == ["a", "b"]
    assert find_masks(tmp_path / "flat" / "b_seg.nii") == [("b", tmp_path / "flat" / "b_seg.nii")]
    assert [name for name, _ in find_masks(tmp_path / "tree")] == ["c"]
    assert find_masks(tmp_path / "raw") == [("d", tmp_path / "raw" / "d" / "d-seg.nii")]
    touch(tmp_path, "flat/a_mask.nii")
    assert find_masks(tmp_path / "flat")[0] == ("a", tmp_path / "flat" / "a_mask.nii"), "beside it a.nii.gz is an image"
    touch(tmp_path, "flat/a_seg.nii")
    with pytest.raises(DataFormatError, match="more than one mask for a"):
        find_masks(tmp_path / "flat")
    touch(tmp_path, "empty/mask/readme.txt")
    with pytest.raises(DataFormatError, match="no masks found"):
        find_masks(tmp_path / "empty")


def test_names_that_will_not_do_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "mask/a.nii", "t1/a.nii", "mask/_mask.nii", "t1/_t1.nii", "mask/b\\c.nii", "t1/b\\c.nii")
    for role in ("mask", "t1"):
        (tmp_path / role / "M\udcfcller.nii").write_bytes(b"")
    result = discover(tmp_path, DataConfig())
    assert [subject.id for subject in result.subjects] == ["a"]
    reasons = {str(entry).encode().decode().rpartition("/")[2] for entry in result.unmatched}
    assert {reason.partition(";")[0] for reason in reasons} == {
        "_mask.nii: the subject would be called ''",
        "_t1.nii: the subject would be called ''",
        "b\\c.nii: the subject would be called 'b\\\\c'",
        "M\\udcfcller.nii: its name is not UTF-8",
    }
    (tmp_path / "mask" / "_mask.nii").unlink()
    (tmp_path / "mask" / "b\\c.nii").unlink()
    with pytest.raises(DataFormatError, match=r"M\\udcfcller\.nii: its name is not UTF-8; rename it"):
        find_masks(tmp_path / "mask")


def test_folders_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "mask/a.nii", "t1/a.nii")
    real = Path.iterdir

    def iterdir(folder: Path) -> Iterator[Path]:
        if folder.name == "t1":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    for look in (lambda: discover(tmp_path, DataConfig()), lambda: source_modalities(tmp_path)):
        with pytest.raises(DataFormatError, match=r"t1: cannot be read \(Permission denied\); mend its permissions"):
            look()


def test_a_stray_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "mask/a.nii", "t1/a.nii", "t1/private/notes")
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no")))
    result = discover(tmp_path, DataConfig())
    assert [subject.id for subject in result.subjects] == ["a"]
    assert [entry.reason for entry in result.unmatched] == ["subject private has no mask"]
