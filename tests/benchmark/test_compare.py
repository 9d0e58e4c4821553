"""`hpc-ddpm bench compare|report`: noise alone is never a difference, and the page needs nothing else."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc_ddpm.benchmark.compare import compare
from hpc_ddpm.benchmark.figures import make_row
from hpc_ddpm.benchmark.gpu_check.run import rows_table
from hpc_ddpm.benchmark.page import _svg, to_page
from hpc_ddpm.benchmark.record import Report, environment, new_report, read_report, write_report
from hpc_ddpm.benchmark.timing import spread
from hpc_ddpm.config import load_config
from hpc_ddpm.errors import DataFormatError
from launch.cli import main
from tests.conftest import REPOSITORY, TINY

CEILINGS = {"matmul_flops": 1e12, "copy_bytes_per_s": 1e11}
WHERE = environment()


@cache
def figures(what: str, *overrides: str) -> dict[str, Any]:
    """A row of a report, and the configuration that it is of."""
    config = load_config(None, [*TINY, *overrides]).config
    facts = {"excluded": 1, "price": None, "joules_per_volume": None, "device": "GPU", "world_size": 1}
    facts |= {"data_wait_share": 0.1, "peak_memory_gib": 1.0, "memory_gib": {"weights": 0.4, "<saved>": 0.5}}
    return {"config": config.dump(), "row": make_row(what, config, "fp32", [1.0], CEILINGS, None, **facts)}


def run(
    seconds: float, *overrides: str, noise: float = 0.02, repeats: int = 20, seed: int = 0, what: str = "train"
) -> Report:
    """A report of repeats around a median."""
    samples = seconds * np.exp(noise * np.random.default_rng(seed).standard_normal(repeats))
    found = figures(what, *overrides)
    row = found["row"] | {"samples_s": samples.tolist(), "seconds_per_volume": spread(samples.tolist())}
    return new_report(what, WHERE, {"config": found["config"]}, [row])


def test_noise_is_no_difference() -> None:
    differences = [compare([(run(1.0, seed=seed), run(1.0, seed=seed + 100))]) for seed in range(20)]
    assert sum(found.is_significant for found in differences) <= 2
    assert not any(found.is_slower_than(0.05) for found in differences)
    assert (
        "no difference that could be told from noise" in compare([(run(1.0), run(1.01, noise=0.3, seed=1))]).sentence()
    )


def test_a_slower_run_is_told_with_what_differs() -> None:
    found = compare([(run(1.0, "training.zero_stage=1"), run(1.2, "training.zero_stage=2", seed=1))])
    assert found.ratio == pytest.approx(1.2, abs=0.03)
    assert found.low < 1.2 < found.high
    assert found.is_slower_than(0.05)
    assert not found.is_slower_than(0.30)
    assert found.sentence().endswith("B is slower")
    assert found.differing == {"training.zero_stage": (1, 2)}
    assert compare([(run(1.2), run(1.0, seed=1))]).sentence().endswith("B is faster")


def test_too_few_repeats_never_tell() -> None:
    found = compare([(run(1.0, repeats=4), run(2.0, repeats=4, seed=1))])
    assert not found.is_slower_than(0.05)
    assert "too few repeats" in found.sentence()


def test_pairs_are_not_fooled_by_a_machine_that_drifts() -> None:
    speeds = [1.0, 1.8, 1.2, 2.5, 0.9, 1.5, 3.0, 1.1]
    pairs = [(run(speed, seed=i), run(1.1 * speed, seed=50 + i)) for i, speed in enumerate(speeds)]
    found = compare(pairs)
    assert found.is_slower_than(0.05)
    assert found.ratio == pytest.approx(1.1, abs=0.02)
    assert found.method.startswith("Wilcoxon")
    assert not compare(pairs[:5]).enough


def test_other_reports_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="runs of sample and train found"):
        compare([(run(1.0), run(1.0, what="sample"))])
    with pytest.raises(DataFormatError, match="a report of `bench peers`"):
        compare([(run(1.0), new_report("peers", WHERE, {}, [{"ms": 1}]))])


@pytest.mark.parametrize(("share", "code"), [("5%", 2), ("0.3", 0)])
def test_the_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: str, code: int) -> None:
    for name, report in (("a", run(1.0)), ("b", run(1.2, seed=1))):
        write_report(tmp_path / f"{name}.json", report)
    assert command(monkeypatch, "compare", tmp_path / "a.json", tmp_path / "b.json", "--fail-if-slower", share) == code


def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_report(tmp_path / "a.json", run(1.0))
    assert command(monkeypatch, "compare", tmp_path / "a.json") == 2
    assert "1 reports found, pairs expected" in capsys.readouterr().err
    assert command(monkeypatch, "compare", *[tmp_path / "a.json"] * 2, "--fail-if-slower", "fast") == 2
    assert "a share such as 5% or 0.05 is expected" in capsys.readouterr().err


def test_the_page_needs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = [{"part": "conv3d", "status": "passed", "seconds": 3, "rows": [{"name": "forward", "is_ok": False}]}]
    reports = {
        "a<b>.json": run(1.0),
        "b.json": run(1.2, seed=1),
        "s.json": run(2.0, what="sample"),
        "check.json": new_report("gpu-check", WHERE, {}, check),
        "data.json": new_report("peers", WHERE, {}, [{"contestant": "ours", "volumes_per_s": 3.0}]),
    }
    for name, report in reports.items():
        write_report(tmp_path / name, report)
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "report", *reports, "--out", "page.html") == 0
    html, markdown = Path("page.html").read_text(), Path("page.md").read_text()
    assert html.count("<svg") == 4  # roofline, repeats, time, memory
    assert not re.search(r"(src|href)=\"(?!#)", html)  # only places within the page
    assert "a<b>" not in html
    assert "<b>no</b>" in html
    for text in (html, markdown):
        assert "B is slower" in text
        assert "Mann-Whitney" in text
        assert "contestant" in text
    assert to_page(reports)[1] == markdown


def test_every_run_is_drawn_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("hpc_ddpm.benchmark.page._svg", lambda figure: drawn.append(figure) or _svg(figure))
    names = ["_a", "a$_^$b", *map(str, range(10))]
    to_page({name: run(1.0) for name in names})
    for picture in drawn[:2]:  # roofline, repeats
        (axes,) = picture.axes
        shown = [text.get_text().partition(":")[0] for text in axes.get_legend().get_texts()]
        assert [name.strip().replace("\\", "") for name in shown] == names
        lines = [line for line in axes.lines if not line.get_label().startswith("_")]
        assert len({(line.get_marker(), line.get_color()) for line in lines}) == len(names)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Exit code of `hpc-ddpm bench ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["hpc-ddpm", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_the_page_shows_what_reading_takes() -> None:
    report = read_report(REPOSITORY / "docs" / "benchmarks" / "data.json")
    page, markdown = to_page({"data": report})
    ours = next(row for row in report["rows"] if row["workers"] is None and row["cache"] == "warm")
    assert f"{ours['ms']['median']:.2f} (" in page and f"{ours['ms']['median']:.2f} (" in markdown
    assert "<h2>Data</h2>" in page and "p10" not in page.split("<h2>Data</h2>")[1]
    assert rows_table([{"ms": {"median": 1.5}}]).endswith("| median 1.5 |")
