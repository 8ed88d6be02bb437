"""Does a clip get the same answer in any batch, and does another clip get another one?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ivdr_deploy.artifacts.manifest import OutputParity
from ivdr_deploy.results import softmax
from ivdr_deploy.runtimes.base import Runtime
from ivdr_deploy.runtimes.compare import compare_outputs
from ivdr_deploy.spec import MAX_BATCH

PROBE_CLIPS = 4
"""Clips that are put through all batch sizes and places."""

_SIZES = (2, 3, 5, 8, 20, 64)
"""Odd and even, at and beside powers of two; 20 and 64 are what a call holds on a CPU and on a GPU."""

_BATCH_BYTES = 64 << 20
"""Of one batch of pixels; a network needs some 50 times that for its first layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchInvariance:
    """What the company of other clips changes about a clip."""

    clips: int
    sizes: tuple[int, ...]
    """Of the batches; every clip was in each, in several places."""

    flips: int
    """Clips in batches that got another label than alone."""

    max_flip_margin: float
    """How much more probable the clip alone makes its label than the other, at most over the flips."""

    outputs: tuple[OutputParity, ...]
    """Largest differences from the clip alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """How far a real change of the input moves one output, beside how far the variant is from the reference."""

    output: str
    moved: float
    """Root of the mean square over the values; the larger of: another clip, and the frames in reverse order."""

    error: float
    """The same measure between variant and reference, on the same clips; at least the rounding of fp32."""

    @property
    def ratio(self) -> float:
        """How many times the error the output moves; 0 for one that does not move, or is not finite."""
        return self.moved / self.error if self.moved else 0.0


def measure_batches(runtime: Runtime, clips: np.ndarray) -> BatchInvariance:
    """Run clips alone and in batches of many sizes, and compare.

    Args:
        runtime: What to judge.
        clips: uint8 (P, T, H, W, 3), P >= 1.
    """
    alone = _joined([runtime.infer(clips[place : place + 1]) for place in range(len(clips))])
    most = min(MAX_BATCH, max(runtime.call_clips, _BATCH_BYTES // clips[0].nbytes))
    sizes = tuple(size for size in _SIZES if size <= most)
    flips, margin, worst = 0, 0.0, dict[str, OutputParity]()
    for order in _orders(len(clips), sizes):
        found = runtime.infer(np.ascontiguousarray(clips[order]))
        expected = {name: value[order] for name, value in alone.items()}
        worst = fold(worst, compare_outputs(expected, found, precision=runtime.precision))
        if "logits" in expected:
            probabilities = softmax(np.nan_to_num(expected["logits"]))
            rows = np.arange(len(order))
            old, new = probabilities.argmax(axis=1), np.nan_to_num(found["logits"]).argmax(axis=1)
            margins = (probabilities[rows, old] - probabilities[rows, new])[old != new]
            flips += len(margins)
            margin = max([margin, *margins.tolist()])
    return BatchInvariance(
        clips=len(clips),
        sizes=sizes,
        flips=flips,
        max_flip_margin=margin,
        outputs=tuple(worst.values()),
    )


def measure_sensitivity(
    runtime: Runtime, clips: np.ndarray, expected: Mapping[str, np.ndarray]
) -> tuple[Sensitivity, ...]:
    """Compare how far outputs move with how far they are off.

    Args:
        runtime: What to judge.
        clips: uint8 (P, T, H, W, 3), best of different videos.
        expected: What the reference gives for them.
    """
    found = runtime.infer(clips)
    turned = runtime.infer(np.ascontiguousarray(clips[:, ::-1]))
    measured = []
    for name, value in expected.items():
        values, other = found[name], turned[name]
        if not (np.isfinite(values).all() and np.isfinite(other).all() and np.isfinite(value).all()):
            measured.append(Sensitivity(output=name, moved=0.0, error=0.0))
            continue
        moved = max(_rms(values - np.roll(values, 1, axis=0)), _rms(values - other))
        rounding = float(np.finfo(np.float32).eps) * max(_rms(value), float(np.finfo(np.float32).tiny))
        measured.append(Sensitivity(output=name, moved=moved, error=max(_rms(values - value), rounding)))
    return tuple(measured)


def probe_clips(golden: np.ndarray | None, seen: Sequence[np.ndarray]) -> np.ndarray | None:
    """Choose the clips for the two measurements: those of videos first, then golden ones; None where there are none."""
    chosen = [*seen, *(golden if golden is not None else ())][:PROBE_CLIPS]
    return np.stack(chosen) if chosen else None


def fold(worst: Mapping[str, OutputParity], entries: Sequence[OutputParity]) -> dict[str, OutputParity]:
    """Join comparisons by output: the one that fits worst, with the smallest cosine of all."""
    joined = dict(worst)
    for entry in entries:
        held = joined.get(entry.output, entry)
        kept = max(held, entry, key=lambda one: one.max_abs_diff / one.tolerance)
        joined[entry.output] = replace(kept, min_cosine=min(held.min_cosine, entry.min_cosine))
    return joined


def _orders(clips: int, sizes: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the clips of each batch: in a small batch every clip takes every place, in a large one several."""
    for size in sizes:
        for shift in range(clips if size < clips else 1):
            yield (np.arange(size) + shift) % clips


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
