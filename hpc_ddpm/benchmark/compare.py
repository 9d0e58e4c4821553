"""Is B slower than A? Robust statistics of repeats, with an answer that noise cannot give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu, wilcoxon

from hpc_ddpm.benchmark.record import Report
from hpc_ddpm.config import config_from_dict, flatten_config
from hpc_ddpm.errors import DataFormatError

LEAST_REPEATS, LEAST_PAIRS = 5, 6
"""Below these no test can find anything at 5 %."""
SIGNIFICANCE = 0.05
RESAMPLES = 5000
CIRCUMSTANCES = ("device", "precision", "world_size")
UNPAIRED = (
    "Mann-Whitney U test of the repeats of one run each, interval by bootstrap of the medians; other load during one "
    "of the runs counts as a difference"
)
PAIRED = "Wilcoxon signed-rank test of the pairs' log ratios of medians, interval by bootstrap of the pairs"


@dataclass(frozen=True)
class Comparison:
    """Time of B over time of A: above 1, B is slower."""

    what: str
    ratio: float
    low: float
    high: float
    """95 % interval of the ratio."""
    p_value: float
    method: str
    enough: bool
    """Whether there are as many repeats as a test needs."""
    differing: dict[str, tuple[Any, Any]]
    """Settings and circumstances in which A and B differ."""

    @property
    def is_significant(self) -> bool:
        """The test finds a difference and the interval leaves 1 out."""
        return self.enough and self.p_value < SIGNIFICANCE and not self.low <= 1 <= self.high

    def is_slower_than(self, limit: float) -> bool:
        """B is significantly slower, and by more than `limit` (0.05: 5 %)."""
        return self.is_significant and self.ratio > 1 + limit

    def sentence(self) -> str:
        """The result of the comparison in one sentence, no stronger than the test allows."""
        change = f"B takes {self.ratio:.3f} times A's time (95 % interval {self.low:.3f} to {self.high:.3f}"
        head = f"{self.what}: {change}, p = {self.p_value:.3g})"
        if not self.enough:
            return f"{head}; too few repeats to tell: take more"
        if not self.is_significant:
            return f"{head}; no difference that could be told from noise"
        return f"{head}; B is {'slower' if self.ratio > 1 else 'faster'}"


def compare(pairs: Sequence[tuple[Report, Report]]) -> Comparison:
    """Compare runs of A with runs of B.

    One pair is compared by its repeats; what else happened on the machine in one of the two runs then counts as
    a difference. Several pairs, measured in turns (A B A B ...), are compared pair by pair, which it cannot fool.

    Raises:
        DataFormatError: not two runs of the same kind of loop.
    """
    rows = [(_row(a), _row(b)) for a, b in pairs]
    kinds = {row["what"] for pair in rows for row in pair}
    if len(kinds) != 1:
        raise DataFormatError(f"runs of {' and '.join(sorted(kinds))} found; compare runs of one kind")
    first, second = (_circumstances(report) for report in pairs[0])
    differing = {key: (first.get(key), second.get(key)) for key in first | second if first.get(key) != second.get(key)}
    samples = [(np.array(a["samples_s"]), np.array(b["samples_s"])) for a, b in rows]
    statistic = _unpaired(*samples[0]) if len(samples) == 1 else _paired(samples)
    return Comparison(kinds.pop(), *statistic, differing)


def _unpaired(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float, float, str, bool]:
    random = np.random.default_rng(0)
    medians = [np.median(random.choice(values, (RESAMPLES, len(values))), axis=1) for values in (a, b)]
    low, high = np.percentile(medians[1] / medians[0], (2.5, 97.5)).tolist()
    p_value = float(mannwhitneyu(a, b).pvalue)
    enough = min(len(a), len(b)) >= LEAST_REPEATS
    return float(np.median(b) / np.median(a)), low, high, p_value, UNPAIRED, enough


def _paired(samples: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float, float, float, str, bool]:
    ratios = np.log([np.median(b) / np.median(a) for a, b in samples])
    resampled = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.exp(np.percentile(np.median(resampled, axis=1), (2.5, 97.5))).tolist()
    p_value = float(wilcoxon(ratios).pvalue) if np.any(ratios) else 1.0
    return float(np.exp(np.median(ratios))), low, high, p_value, PAIRED, len(ratios) >= LEAST_PAIRS


def _circumstances(report: Report) -> dict[str, Any]:
    """Commit, device and every setting by its dotted name."""
    row, commit = _row(report), report["environment"]["git_commit"]
    settings = flatten_config(config_from_dict(report["settings"]["config"], "the report"))
    return {"commit": commit} | {key: row.get(key) for key in CIRCUMSTANCES} | settings


def _row(report: Report) -> dict[str, Any]:
    rows = [row for row in report["rows"] if row.get("samples_s")]
    if len(rows) != 1:
        raise DataFormatError(
            f"a report of `bench {report['benchmark']}`; give reports of `bench train` or `bench sample`"
        )
    return rows[0]
