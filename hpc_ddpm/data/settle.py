"""Which coding the masks of a cohort have: decided by what all of them hold, by their images, and by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from hpc_ddpm.config import DataConfig, LabelsConfig
from hpc_ddpm.data.coding import (
    CODINGS,
    become,
    brain_label,
    can_merge,
    coded_labels,
    describe,
    meaning_of,
    merged,
    resolve_labels,
    speaks_brats,
)
from hpc_ddpm.data.discover import Subject
from hpc_ddpm.data.foreground import above_background, is_body
from hpc_ddpm.data.labels import values_of
from hpc_ddpm.data.nifti import read_nifti
from hpc_ddpm.data.parallel import ordered_map
from hpc_ddpm.data.source_names import refuse_contradictions
from hpc_ddpm.errors import ConfigError, DataFormatError

NAMED_SO = {
    r"brats-?ped": ("brats_ped",),
    r"brats-?(gli|met|ssa|men|africa)": ("brats2023", "brats2024"),
    r"brats_?(17|18|19|20|2017|2018|2019|2020|2021)(?!\d)": ("brats2021",),
}
"""How cases are called -> codings that they may have."""
MAX_OPENED, MAX_NAMED, LARGE = 8, 3, 2**20
SAY_WHICH = "say which by data.labels.coding, or what each value becomes by data.labels.remap"

Held = Mapping[str, frozenset[int]]
"""Subject -> values in its mask, without background."""


@dataclass(frozen=True)
class Settled:
    """Settings with the coding of the cohort."""

    config: DataConfig
    """`data.labels.coding` is auto only where the coding is what auto stands for in this layout."""
    coding: str
    """Name of the coding; empty where nothing had to be decided."""

    @property
    def note(self) -> str:
        """What was decided, in one line; empty where there was nothing to decide."""
        if self.coding in ("", "as_named"):
            return self.coding and "masks are coded as data.labels.names says"
        labels = coded_labels(self.config.labels, self.coding)
        pairs = [(value, become(value, labels)) for value in CODINGS[self.coding]]
        parts = [f"{describe(value, self.coding)} is label {label}" for value, label in pairs if label in labels.names]
        derived = labels.foreground_label
        brain = "" if derived is None else f"; {derived} ({labels.names[derived]}) comes from the images"
        return f"masks are coded as {self.coding}: {', '.join(parts)}{brain}"


def settle(subjects: Sequence[Subject], config: DataConfig, num_workers: int = 1) -> Settled:
    """Decide the coding of a cohort where `data.labels.coding` is auto; reads all masks only where it matters.

    Args:
        subjects: their images may be missing; then the masks alone decide.
        config: with the layout of the source, not auto.
        num_workers: processes that read.

    Raises:
        DataFormatError: it cannot be told, two values that are there would become one label unsaid, or the source
            has other names for its labels.
        ConfigError: a label of the scheme stands for nothing in the coding.
    """
    settled = _settle(subjects, config, num_workers)
    resolved = resolve_labels(settled.config.labels, config.layout)
    refuse_contradictions((subject.mask for subject in subjects), config.labels, resolved)
    return settled


def _settle(subjects: Sequence[Subject], config: DataConfig, num_workers: int) -> Settled:
    labels = config.labels
    is_open = labels.coding == "auto" and not labels.remap and (config.layout == "brats_raw" or speaks_brats(labels))
    if not is_open and not can_merge(resolve_labels(labels, config.layout)):
        return Settled(config, "" if labels.coding == "auto" else labels.coding)
    found = ordered_map(_values, subjects, num_workers, preload=__name__)
    held = {subject.id: values for subject, values in zip(subjects, found, strict=True)}
    coding = _decide(_usable(held, labels), subjects, config) if is_open else ""
    chosen = config.model_copy(update={"labels": labels.model_copy(update={"coding": coding or labels.coding})})
    usual = resolve_labels(labels, config.layout)
    if _effect(_union(held), resolve_labels(chosen.labels, config.layout)) == _effect(_union(held), usual):
        chosen = config
    _refuse_merging(held, resolve_labels(chosen.labels, config.layout))
    return Settled(chosen, coding)


def _values(subject: Subject) -> frozenset[int]:
    """Values in a mask; none if it cannot be read, which packing reports later."""
    try:
        beside = next(iter(subject.images.values()), None)
        mask = read_nifti(subject.mask, dtype=None, beside=beside)
        return frozenset(values_of(mask.data, subject.mask)) - {0, -1}
    except DataFormatError:
        return frozenset()


def _usable(held: Held, labels: LabelsConfig) -> Held:
    """Without masks that have values of no coding: they are refused in any case, and decide nothing."""
    known = set(labels.names).union(*CODINGS.values())
    return {subject: values if values <= known else frozenset() for subject, values in held.items()}


def _union(held: Held) -> frozenset[int]:
    return frozenset().union(*held.values())


def _effect(values: Iterable[int], labels: LabelsConfig) -> tuple[object, ...]:
    """What a scheme makes of the values; equal for codings that do not differ on them."""
    return (*(become(value, labels) for value in sorted(values)), labels.foreground_label)


def _decide(held: Held, subjects: Sequence[Subject], config: DataConfig) -> str:
    labels, values = config.labels, _union(held)
    brain, named_so = brain_label(labels), _named_so(subjects)
    is_as_named = values <= set(labels.names)
    if brain is not None and brain in values:
        seen = _is_brain(held, subjects, brain, config)
        if seen:
            return "as_named"
        is_as_named &= seen is None
    elif brain is not None and labels.foreground_label is None:
        is_as_named = False  # the brain has to come from the images
    _refuse_mixture(held, named_so)
    codings = _possible(values, named_so, is_as_named)
    options = {coding: coded_labels(labels, coding) for coding in codings}
    known = {0, *labels.names}
    complete = {
        coding: scheme for coding, scheme in options.items() if {become(value, scheme) for value in values} <= known
    }
    options = complete or options
    if is_as_named and (not named_so or not codings or _effect(values, labels) in _effects(values, options)):
        options = {"as_named": labels, **options} if config.layout != "brats_raw" else {**options, "as_named": labels}
    if len(_effects(values, options)) > 1:
        raise DataFormatError(_cannot_tell(values, options, subjects), "coding-unclear")
    coding = next(iter(options), "as_named")
    if coding != "as_named":
        _refuse_lost(labels, options[coding], coding)
    return coding


def _effects(values: Iterable[int], options: Mapping[str, LabelsConfig]) -> set[tuple[object, ...]]:
    values = list(values)
    return {_effect(values, scheme) for scheme in options.values()}


def _possible(values: frozenset[int], named_so: set[str], is_as_named: bool) -> list[str]:
    """Codings that have all values: those that the names of the cases tell of, else the likely ones."""
    fitting = [coding for coding, meanings in CODINGS.items() if values <= set(meanings)]
    if named := [coding for coding in fitting if coding in named_so]:
        return named
    has_both = {3, 4} <= values
    unlikely = {"brats2024", "brats_ped"} if not has_both else {"brats_ped"} if is_as_named else set()
    return [coding for coding in fitting if coding not in unlikely]


def _named_so(subjects: Sequence[Subject]) -> set[str]:
    """Codings that fit to how all cases are called; empty where no case has such a name.

    Raises:
        DataFormatError: cases of different challenges.
    """
    groups: dict[tuple[str, ...], str] = {}
    for subject in subjects:
        for words, codings in NAMED_SO.items():
            if re.search(words, f"{subject.id} {subject.mask.name}".lower()):
                groups.setdefault(codings, subject.id)
                break
    if len(groups) > 1:
        shown = ", ".join(f"{subject} ({' or '.join(codings)})" for codings, subject in groups.items())
        raise DataFormatError(
            f"{shown}: cases of different codings in one cohort; pack them apart, each with its data.labels.coding",
            "coding-unclear",
        )
    return set(next(iter(groups), ()))


def _is_brain(held: Held, subjects: Sequence[Subject], brain: int, config: DataConfig) -> bool | None:
    """Whether the value `brain` in the masks is the brain, by some of those that hold it.

    Raises:
        DataFormatError: it is in some and is not in others.
    """
    holding = [subject for subject in subjects if brain in held[subject.id]]
    some = holding[:: max(1, len(holding) // MAX_OPENED)][:MAX_OPENED]
    seen = {subject.id: _looks_like_brain(subject, brain, config) for subject in some}
    yes, no = ([subject for subject, answer in seen.items() if answer is wanted] for wanted in (True, False))
    if yes and no:
        raise DataFormatError(
            f"value {brain} is the brain in {_some(yes)} and a part of the tumour in {_some(no)}: two codings in one "
            "cohort; pack them apart, or give data.labels.coding and leave the others out with --skip-bad",
            "coding-unclear",
        )
    return True if yes else False if no else None


def _looks_like_brain(subject: Subject, brain: int, config: DataConfig) -> bool | None:
    try:
        first = subject.images.get(config.modalities[0])
        mask = np.rint(read_nifti(subject.mask, config.orientation, None, beside=first).data)
        image = read_nifti(first, config.orientation).data if first else None
        step = 1 if mask.size < LARGE else 2
    except DataFormatError:
        return None
    if image is not None and (image.shape != mask.shape or not np.isfinite(image).all()):
        image = None
    some = mask[::step, ::step, ::step]
    inside = None if image is None else above_background(image[::step, ::step, ::step])
    return is_body(some == brain, some > 0, inside)


def _refuse_mixture(held: Held, named_so: set[str]) -> None:
    """3 in some masks, 4 in others and both in none: enhancing tumour in two years, or two parts of it."""
    has_3 = [subject for subject, values in held.items() if 3 in values and 4 not in values]
    has_4 = [subject for subject, values in held.items() if 4 in values and 3 not in values]
    has_both = any({3, 4} <= values for values in held.values())
    if has_3 and has_4 and not has_both and not named_so:
        raise DataFormatError(
            f"masks hold 3 ({_some(has_3)}) or 4 ({_some(has_4)}) and none holds both: is it one coding, or enhancing "
            f"tumour of two? {SAY_WHICH}",
            "coding-unclear",
        )


def _refuse_lost(labels: LabelsConfig, scheme: LabelsConfig, coding: str) -> None:
    reached = {*scheme.remap.values(), scheme.foreground_label}
    lost = [
        f"{label} ({name})" for label, name in labels.names.items() if label not in reached and not meaning_of(name)
    ]
    if lost:
        raise ConfigError(
            f"data.labels.names: the masks are coded as {coding}, which has no value for label {', '.join(lost)}; "
            "set data.labels.foreground_label to it if it is the rest of the brain, or name it as BraTS does"
        )


def _refuse_merging(held: Held, labels: LabelsConfig) -> None:
    values = _union(held)
    if pair := merged(values, labels):
        stays, changes = pair
        names = [_some([subject for subject, values in held.items() if value in values]) for value in pair]
        raise DataFormatError(
            f"values {stays} ({names[0]}) and {changes} ({names[1]}) would both become label {stays} "
            f"({labels.names[stays]}); if that is meant, say so: "
            f"data.labels.remap={{{stays}: {stays}, {changes}: {stays}}}",
            "labels-merged",
        )


def _cannot_tell(values: frozenset[int], options: Mapping[str, LabelsConfig], subjects: Sequence[Subject]) -> str:
    shown = []
    for coding, scheme in options.items():
        meanings = [
            f"{value} = {CODINGS[coding][value] if coding in CODINGS else scheme.names[value]}"
            for value in sorted(values)
        ]
        shown.append(f"{coding} ({', '.join(meanings)})")
    return (
        f"{subjects[0].mask.parent}: the masks hold the values {sorted(values)}, which may be "
        f"{' or '.join(shown)}; {SAY_WHICH}"
    )


def _some(subjects: Iterable[str]) -> str:
    subjects = list(subjects)
    more = f" and {len(subjects) - MAX_NAMED} more" if len(subjects) > MAX_NAMED else ""
    return ", ".join(islice(subjects, MAX_NAMED)) + more
