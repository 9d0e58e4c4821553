"""The page of `data check --report`: pictures of every case, findings beside them, nothing loaded, all escaped."""

from __future__ import annotations

import base64
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image as images

from hpc_ddpm.config import DataConfig, LabelsConfig
from hpc_ddpm.data.check import report as module
from hpc_ddpm.data.check.pictures import GREYS, colours, picture
from hpc_ddpm.data.check.report import write_check_report
from hpc_ddpm.data.check.run import CheckReport, check
from hpc_ddpm.data.phantom import write_phantoms

HOSTILE = "x<script>alert('1')<b>\"&amp;"
SIZE = (16, 16, 16)


class Page(HTMLParser):
    """Tags with attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> CheckReport:
    """Three subjects: one sound, one with a hostile name, one whose image is cut off; and a file alone."""
    root = write_phantoms(tmp_path_factory.mktemp("cohort"), 3, SIZE)
    for role in ("mask", "t1"):
        (root / role / "head_0001.nii.gz").rename(root / role / f"{HOSTILE}.nii.gz")
    shutil.copy(root / "t1" / "head_0000.nii.gz", root / "t1" / f"alone {HOSTILE}.nii.gz")
    cut = root / "t1" / "head_0002.nii.gz"
    cut.write_bytes(cut.read_bytes()[:200])
    return check(root, DataConfig(size=SIZE), pictures=True)


def decode(png: bytes) -> np.ndarray:
    return images.imread(io.BytesIO(png))[..., :3]


def test_every_case_is_there_with_its_findings(result: CheckReport, tmp_path: Path) -> None:
    page = Page(write_check_report(tmp_path / "page.html", result).read_text(encoding="utf-8"))
    cards = page.of("article")
    assert [card["data-id"] for card in cards] == ["head_0000", "head_0002", HOSTILE.lower()]
    assert [card["data-kinds"] for card in cards] == ["", "truncated", ""]
    assert {option["value"] for option in page.of("option")} == {"", "truncated", "unmatched-file"}
    assert "→ copy the file again" in page.text
    assert f"subject alone {HOSTILE} has no mask" in page.text


def test_the_page_loads_nothing_and_escapes_names(result: CheckReport, tmp_path: Path) -> None:
    text = write_check_report(tmp_path / "page.html", result).read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?:|url\(|@import", text)
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.of("img"))
    assert all(set(image) == {"loading", "alt", "src"} for image in page.of("img"))
    assert len(page.of("script")) == 1 and not page.of("script")[0]
    assert HOSTILE in page.text
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]


def test_pictures_are_grey_planes_with_coloured_outlines(result: CheckReport) -> None:
    sound = next(case for case in result.cases if case.id == "head_0000")
    assert sound.picture is not None
    pixels = decode(sound.picture)
    assert pixels.shape[0] == 96
    assert pixels.shape[1] == pytest.approx(3 * 96, abs=10)
    for colour in colours(LabelsConfig()).values():
        assert (np.abs(pixels - colour).max(axis=2) < 0.01).sum() > 10
    grey = np.ptp(pixels, axis=2) < 0.01
    assert grey.mean() > 0.8
    assert next(case for case in result.cases if case.id == "head_0002").picture is None


def test_many_cases_have_files_beside_the_page(
    result: CheckReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_EMBEDDED", 2)
    page = Page(write_check_report(tmp_path / "my page.html", result).read_text(encoding="utf-8"))
    assert [image["src"] for image in page.of("img")] == ["my%20page_files/000000.png", "my%20page_files/000002.png"]
    for image in page.of("img"):
        png = (tmp_path / str(image["src"]).replace("%20", " ")).read_bytes()
        assert decode(png).shape[0] == 96


def test_hundreds_of_lone_files_do_not_fill_the_page(
    result: CheckReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_GENERAL", 0)
    text = write_check_report(tmp_path / "page.html", result).read_text(encoding="utf-8")
    assert "<ul><li>and 1 more</li></ul>" in text


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 40, 7), (20, 5, 200)])
def test_pictures_of_odd_shapes(shape: tuple[int, int, int]) -> None:
    volume = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    volume[0, 0, 0] = np.nan
    mask = np.ones(shape, np.uint8)
    rows = decode(picture([volume, volume], mask, (0.5, 1, 4), LabelsConfig(), 30))
    assert rows.shape[0] == 60
    assert rows.shape[1] <= 4 * 30 + 10


def test_more_labels_than_a_palette_holds() -> None:
    labels = LabelsConfig(names={value: str(value) for value in range(1, 201)})
    mask = np.arange(216, dtype=np.uint8).reshape(6, 6, 6) % 201
    assert decode(picture([mask.astype(np.float32)], mask, (1, 1, 1), labels, 20)).shape[0] == 20
    assert len(colours(labels)) > 256 - GREYS


def test_embedded_pictures_are_small(result: CheckReport, tmp_path: Path) -> None:
    page = Page(write_check_report(tmp_path / "page.html", result).read_text(encoding="utf-8"))
    sizes = [len(base64.b64decode(str(image["src"]).partition(",")[2])) for image in page.of("img")]
    assert max(sizes) < 30_000
