"""Does a clip get the same answer in any batch, and does another clip get another one?"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import numpy as np

from ivdr_deploy._text import quoted
from ivdr_deploy.artifacts.golden import Golden
from ivdr_deploy.artifacts.manifest import OutputParity
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.records import require_range
from ivdr_deploy.results import softmax
from ivdr_deploy.runtimes.base import Runtime
from ivdr_deploy.runtimes.compare import compare_outputs
from ivdr_deploy.spec import MAX_BATCH

PROBE_CLIPS = 3
"""Clips that are looked at closely. With these 3 a variant runs 11 clips at least: each alone, in a batch of 2 and in
one of 3, and with its frames reversed."""

TRIAL_SECONDS = 10.0
"""For all further batches of one variant; what would take longer is left out, and the record says so."""

_SIZES = (2, 3, 5, 8, 20, 64)
"""Odd and even, at and beside powers of two; 20 and 64 are what a call holds on a CPU and on a GPU."""

_ALWAYS = 3
"""Up to this size a batch is tried whatever it costs."""

_TURNED = 8
"""Up to this size every clip takes every place, where time allows."""

_BATCH_BYTES = 64 << 20
"""Of one batch of pixels; a network needs some 50 times that for its first layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Company:
    """Where a clip stood in a call over the videos."""

    size: int
    place: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A clip that is looked at closely."""

    clip: np.ndarray
    """uint8 (T, H, W, 3)."""

    expected: Mapping[str, np.ndarray]
    """What the reference gives for it, one row per output."""

    company: Company | None = None
    """Where it came by; None for a golden clip."""

    found: tuple[Mapping[str, np.ndarray], ...] = ()
    """What each runtime gave for it there, one row per output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchInvariance:
    """What the company of other clips changes about a clip."""

    clips: int
    sizes: tuple[int, ...]
    """Of the batches that were made for this; every place of each was held by one of the clips."""

    turned: tuple[int, ...] = ()
    """Those of them in which every clip was in every place."""

    calls: tuple[Company, ...] = ()
    """Of calls over the videos, in which some of the clips came by."""

    left_out: tuple[int, ...] = ()
    """Sizes that would have taken too long."""

    flips: int
    """Clips in batches that got another label than alone."""

    max_flip_margin: float
    """How much more probable the clip alone makes its label than the other, at most over the flips."""

    outputs: tuple[OutputParity, ...]
    """Largest differences from the clip alone."""

    def __post_init__(self) -> None:
        require_range("margin of a flip over batches", self.max_flip_margin, most=1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """How far a real change of the input moves one output, beside how far the variant is from the reference."""

    output: str
    moved: float
    """Root of the mean square over the values; the larger of: another clip, and the frames in reverse order."""

    error: float
    """The same measure between variant and reference, on the same clips; at least the rounding of fp32."""

    def __post_init__(self) -> None:
        require_range("movement of an output", self.moved, most=sys.float_info.max)
        require_range("error of an output that moves", self.error, most=sys.float_info.max)
        if self.moved and not self.error:
            raise ConfigError(
                f"the output {quoted(self.output)} moves by {self.moved:g} and has no error at all"
            )

    @property
    def ratio(self) -> float:
        """How many times the error the output moves; 0 for one that does not move, or is not finite."""
        return self.moved / self.error if self.moved else 0.0


@dataclass(slots=True)
class _Comparison:
    """Folds what clips gave in company, beside what they gave alone."""

    alone: Mapping[str, np.ndarray]
    runtime: Runtime
    flips: int = 0
    margin: float = 0.0
    worst: dict[str, OutputParity] = field(default_factory=dict)

    def add(self, order: Sequence[int], found: Mapping[str, np.ndarray]) -> None:
        """Take the outputs of one batch, which held the clips ``order``."""
        rows = np.asarray(order)
        expected = {name: value[rows] for name, value in self.alone.items()}
        self.worst = fold(self.worst, compare_outputs(expected, found, precision=self.runtime.precision))
        if "logits" not in expected:
            return
        probabilities, places = softmax(np.nan_to_num(expected["logits"])), np.arange(len(rows))
        old, new = probabilities.argmax(axis=1), np.nan_to_num(found["logits"]).argmax(axis=1)
        margins = (probabilities[places, old] - probabilities[places, new])[old != new]
        self.flips += len(margins)
        self.margin = max([self.margin, *margins.tolist()])


def measure_batches(
    runtime: Runtime, probes: Sequence[Probe], *, place: int = 0, batches: bool = True
) -> tuple[BatchInvariance, dict[str, np.ndarray]]:
    """Run clips alone and in batches of many sizes, and compare.

    The sizes go up to what a call may hold. Small ones are always tried, others while ``TRIAL_SECONDS`` last: first
    every size once, then small ones again until every clip was in every place.

    Args:
        runtime: What to judge.
        probes: The clips, at least one.
        place: Of the runtime, among those in ``Probe.found``.
        batches: Whether to make batches; False compares with the calls over the videos only.

    Returns:
        What was found, and the outputs of the clips alone, first axis clips.
    """
    clips = np.stack([probe.clip for probe in probes])
    started = perf_counter()
    alone = _joined([runtime.infer(clips[index : index + 1]) for index in range(len(clips))])
    seconds = (perf_counter() - started) / len(clips)
    comparison = _Comparison(alone, runtime)
    calls = []
    for index, probe in enumerate(probes):
        if probe.company is not None:
            calls.append(probe.company)
            comparison.add([index], {name: row[None] for name, row in probe.found[place].items()})
    most = min(MAX_BATCH, max(runtime.call_clips, _BATCH_BYTES // clips[0].nbytes))
    places: dict[int, int] = {}
    left_out, budget = [], perf_counter() + TRIAL_SECONDS
    for size, shift in _orders(len(clips), [size for size in _SIZES if size <= most] if batches else ()):
        if size > _ALWAYS or shift:
            before = perf_counter()
            if before + size * seconds > budget:
                left_out += [size] if not shift else []
                continue
        order = (np.arange(size) + shift) % len(clips)
        comparison.add(order.tolist(), runtime.infer(np.ascontiguousarray(clips[order])))
        places[size] = places.get(size, 0) + 1
    return BatchInvariance(
        clips=len(clips),
        sizes=tuple(sorted(places)),
        turned=tuple(sorted(size for size, shifts in places.items() if shifts == len(clips))),
        calls=tuple(calls),
        left_out=tuple(left_out),
        flips=comparison.flips,
        max_flip_margin=comparison.margin,
        outputs=tuple(comparison.worst.values()),
    ), alone


def measure_sensitivity(
    runtime: Runtime, probes: Sequence[Probe], found: Mapping[str, np.ndarray]
) -> tuple[Sensitivity, ...]:
    """Compare how far outputs move with how far they are off.

    Args:
        runtime: What to judge.
        probes: Clips, best of different videos.
        found: What the runtime gives for them, first axis clips.
    """
    turned = runtime.infer(np.ascontiguousarray(np.stack([probe.clip[::-1] for probe in probes])))
    measured = []
    for name in probes[0].expected:
        value = np.stack([probe.expected[name] for probe in probes])
        values, other = found[name], turned[name]
        if not (np.isfinite(values).all() and np.isfinite(other).all() and np.isfinite(value).all()):
            measured.append(Sensitivity(output=name, moved=0.0, error=0.0))
            continue
        moved = max(_rms(values - np.roll(values, 1, axis=0)), _rms(values - other))
        rounding = float(np.finfo(np.float32).eps) * max(_rms(value), float(np.finfo(np.float32).tiny))
        measured.append(Sensitivity(output=name, moved=moved, error=max(_rms(values - value), rounding)))
    return tuple(measured)


def choose_probes(golden: Golden, seen: Sequence[Probe]) -> list[Probe]:
    """Choose the clips to look at: those of videos first, then golden ones; none where there are none."""
    chosen = list(seen[:PROBE_CLIPS])
    if golden.video is not None:
        for index in range(min(len(golden.video), PROBE_CLIPS - len(chosen))):
            expected = {name: value[index] for name, value in golden.expected.items()}
            chosen.append(Probe(clip=golden.video[index], expected=expected))
    return chosen


def fold(worst: Mapping[str, OutputParity], entries: Sequence[OutputParity]) -> dict[str, OutputParity]:
    """Join comparisons by output: the one that fits worst, with the smallest cosine of all."""
    joined = dict(worst)
    for entry in entries:
        held = joined.get(entry.output, entry)
        kept = max(held, entry, key=lambda one: one.max_abs_diff / one.tolerance)
        joined[entry.output] = replace(kept, min_cosine=min(held.min_cosine, entry.min_cosine))
    return joined


def _orders(clips: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield size and first clip of each batch: every size once, then small ones until every clip was everywhere."""
    yield from ((size, 0) for size in sizes)
    yield from ((size, shift) for size in sizes if size <= _TURNED for shift in range(1, clips))


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
