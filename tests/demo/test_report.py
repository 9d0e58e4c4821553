"""The report: complete, self-contained, safe with hostile names, and showing what it says it shows."""

import base64
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hpc_ddpm.data.slices import lesion_centre
from hpc_ddpm.demo import figures
from hpc_ddpm.demo.figures import Canvas, draw_loss, one_line, report_png, strip_png
from hpc_ddpm.demo.report import Case, label_colours, write_report
from hpc_ddpm.errors import ConfigError

image = pytest.importorskip("matplotlib.image")

HOSTILE = "<script>alert('x')</script>\"& $\\frac{$ 脑\n_{}"
CURVE = [{"step": step, "loss": 1 / step, "learning_rate": 1e-3} for step in range(1, 30)]


def make_case(name="sub-001", modalities=("t1",), has_real=True, shape=(12, 14, 16), **fields):
    rng = np.random.default_rng(0)
    mask = np.zeros(shape, np.uint8)
    mask[2:-2, 2:-2, 2:-2] = 1
    mask[4:7, 5:8, 5:9] = 2
    real = (mask + 0.1 * rng.normal(size=(len(modalities), *shape))).astype(np.float32)
    return Case(name, mask, real if has_real else None, real + 0.1, (2.0, 2.0, 3.0), modalities, **fields)


class Page(HTMLParser):
    """Tags, and the text of the page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def sources(self):
        return [attributes["src"] for tag, attributes in self.tags if tag == "img"]


def decode(png):
    return image.imread(io.BytesIO(png))


def report(folder, cases, **changes):
    fields = {"curve": CURVE, "facts": {"Ranks": "2"}, "commands": ["hpc-ddpm train"]} | changes
    png, page = write_report(folder, cases, **fields)
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.png"]
    return decode(png.read_bytes()), Page(page.read_text(encoding="utf-8"))


def test_one_case_one_modality(tmp_path):
    picture, page = report(tmp_path, [make_case(similarity=0.987)], label_names={1: "brain", 2: "big_lesion"})
    assert picture.shape[1] == 1920 and picture[..., :3].std() > 0.05
    assert len(page.sources()) == 4  # mask, real, synthetic, loss
    for text in ("sub-001", "0.987", "big lesion", "Ranks", "hpc-ddpm train"):
        assert text in page.text


def test_four_modalities_show_a_row_each(tmp_path):
    names = ["t1", "t1ce", "t2", "flair"]
    _, page = report(tmp_path, [make_case(modalities=names)])
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert len(page.sources()) == 4 * 3 + 1
    assert all(f"{kind} {name} of sub-001" in alts for kind in ("real", "synthetic") for name in names)
    assert len({base64.b64decode(source.partition(",")[2]) for source in page.sources()}) == 4 * 2 + 2


def test_a_mask_without_a_real_volume(tmp_path):
    _, page = report(tmp_path, [make_case(has_real=False, similarity=float("nan"))])
    assert len(page.sources()) == 3
    assert "no real volume" in page.text and "nan" not in page.text


def test_page_loads_nothing_and_fits_a_phone(tmp_path):
    report(tmp_path, [make_case()])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources())
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe"}
    assert not re.search(r"https?:|url\(|@import", text)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in text


def test_hostile_names_are_text(tmp_path):
    case = make_case(HOSTILE, modalities=(HOSTILE,))
    _, page = report(
        tmp_path,
        [case],
        facts={HOSTILE: HOSTILE},
        commands=[HOSTILE],
        title=HOSTILE,
        label_names={1: HOSTILE, 2: r"_$\frac{$"},
    )
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert page.text.count("<script>alert('x')</script>") >= 7
    assert all(set(attributes) <= {"alt", "src"} for tag, attributes in page.tags if tag == "img")


def test_many_cases_and_no_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "MAX_ROWS", 2)
    picture, page = report(tmp_path / "many", [make_case(f"s{n}") for n in range(3)])
    assert len(page.sources()) == 3 * 3 + 1
    two, _ = report(tmp_path / "two", [make_case(f"s{n}") for n in range(2)])
    assert picture.shape == two.shape
    _, page = report(tmp_path / "none", [], curve=[])
    assert len(page.sources()) == 1


def test_an_empty_mask_and_odd_shapes(tmp_path):
    case = make_case(shape=(9, 20, 13))
    empty = Case("empty", np.zeros((9, 20, 13), np.uint8), None, case.synthetic, (1.0, 1.0, 1.0), ["t1"])
    report(tmp_path, [case, empty])


def test_loss_curve_leaves_out_what_cannot_be_drawn():
    axes = Canvas(4, 3).axes(0.5, 0.5, 3, 2)
    draw_loss(axes, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "val": 1.0}])
    assert [list(line.get_xdata()) for line in axes.lines] == [[1], [1]]


def test_mask_picture_has_the_colours_and_the_shape_in_mm():
    case = make_case()
    colours = dict(zip([1, 2], label_colours(2), strict=True))
    picture = decode(strip_png(case, "mask", 0, colours))[..., :3]
    for colour in (*colours.values(), (0, 0, 0)):
        assert (np.abs(picture - colour).max(axis=2) < 0.01).sum() > 200
    z, y, x = lesion_centre(case.mask)
    share = (np.abs(picture - colours[2]).max(axis=2) < 0.01).sum() / picture.shape[0] / picture.shape[1]
    planes = (case.mask[z], case.mask[:, y], case.mask[:, :, x])
    areas_mm2 = sum((plane == 2).sum() * area for plane, area in zip(planes, (4, 6, 6), strict=True))
    widest_mm, tallest_mm = 2 * (16 + 16 + 14), 3 * 12  # the margin of 8 mm reaches the edges
    assert share == pytest.approx(areas_mm2 / widest_mm / tallest_mm, rel=0.15)


def test_outline_is_drawn_on_the_synthetic_volume_alone():
    case = make_case()
    colours = dict(zip([1, 2], label_colours(2), strict=True))
    coloured = {
        kind: np.ptp(decode(strip_png(case, kind, 0, colours))[..., :3], axis=2) for kind in ("real", "synthetic")
    }
    assert coloured["real"].max() < 0.02
    assert (coloured["synthetic"] > 0.3).sum() > 100


def test_one_line_cuts_and_cleans():
    assert one_line("a\n\tb\x00c", 10) == "a b c"
    assert one_line("x" * 20, 10) == "x" * 9 + "…"


def test_missing_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'hpc_ddpm\[demo\]'"):
        write_report(tmp_path, [make_case()], CURVE, {}, [])
    assert not list(tmp_path.iterdir())


def test_real_brats_case_is_turned_and_drawn():
    data = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "brats2021"
    if not data.is_dir():
        pytest.skip("no shared/data beside the checkout")
    from hpc_ddpm.data.nifti import read_nifti

    (seg,), (t1,) = data.glob("seg/*.nii.gz"), data.glob("t1/*.nii.gz")
    cases = []
    for orientation in ("LPS", "RAS"):
        mask = np.rint(read_nifti(seg, orientation).data).astype(np.uint8)
        volume = read_nifti(t1, orientation).data[None]
        cases.append(Case("brats", mask, volume, volume, (1, 1, 1), ["t1"], orientation=orientation).to_ras())
    np.testing.assert_array_equal(cases[0].mask, cases[1].mask)
    colours = dict(zip([4, 2, 3, 1], label_colours(4), strict=True))
    assert decode(report_png("brats", cases[:1], colours, {}, [], {})).std() > 0.05
