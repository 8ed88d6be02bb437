"""The interval of a share whose questions come in groups that are alike: clips of a video, videos of a person."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ivdr_deploy.evaluation.metrics import wilson

_DRAWS = 4000
_BLOCK = 1 << 22
"""Counts that are drawn at once."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float
    units: int
    """Groups that the interval comes from."""

    def __str__(self) -> str:
        return f"{self.value:.1%}, 95 % interval {self.low:.1%} to {self.high:.1%}"

    def to_dict(self) -> dict[str, float | int | None]:
        """Return ``{value, low, high, units}``, for reports; None for what is not finite: JSON has no word for it."""
        ends = {"value": self.value, "low": self.low, "high": self.high}
        known = {name: value if math.isfinite(value) else None for name, value in ends.items()}
        return {**known, "units": self.units}


def share_estimate(right: Sequence[int], asked: Sequence[int], units: Sequence[str]) -> Estimate:
    """Estimate the share of right answers over all videos.

    The interval is the percentile interval of a bootstrap that draws whole units, widened to Wilson's interval for as
    many answers as there are videos: a bootstrap knows no width where all units agree, and too little on a few of them.

    Args:
        right: Right answers of every video: 0 or 1, or how many of its clips.
        asked: Questions of every video, at least 1 each.
        units: What every video belongs to: itself, or the person or recording that it shares with others.
    """
    if not right:
        return Estimate(math.nan, 0.0, 1.0, 0)
    good, total = _sums(np.stack([right, asked], axis=1).astype(np.float64), units).T
    value = float(good.sum() / total.sum())
    low, high = wilson(value, len(right))
    if len(good) > 1:
        drawn = np.concatenate([(rows @ good) / (rows @ total) for rows in _draws(len(good))])
        ends = np.quantile(drawn, [0.025, 0.975])
        low, high = min(low, float(ends[0])), max(high, float(ends[1]))
    return Estimate(value, low, high, len(good))


def mean_estimate(values: Sequence[float], units: Sequence[str]) -> Estimate:
    """Estimate the mean of a number over videos, for example of a paired difference, by drawing whole units.

    With one unit there is no interval: its ends are infinite.
    """
    if not values:
        return Estimate(math.nan, -math.inf, math.inf, 0)
    sums, counts = _sums(np.stack([values, np.ones(len(values))], axis=1), units).T
    value = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return Estimate(value, -math.inf, math.inf, len(sums))
    drawn = np.concatenate([(rows @ sums) / (rows @ counts) for rows in _draws(len(sums))])
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value, float(low), float(high), len(sums))


def _sums(rows: np.ndarray, units: Sequence[str]) -> np.ndarray:
    """Add up rows (N, 2) by unit: (U, 2), in the order in which the units occur first."""
    place = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    out = np.zeros((len(place), 2))
    np.add.at(out, [place[unit] for unit in units], rows)
    return out


def _draws(units: int) -> Iterator[np.ndarray]:
    """Draw how often each unit is in each of ``_DRAWS`` samples; blocks of rows (draws, units), always the same."""
    rng = np.random.default_rng(20)
    size = max(1, _BLOCK // units)
    even = np.full(units, 1.0 / units)
    for start in range(0, _DRAWS, size):
        yield rng.multinomial(units, even, size=min(size, _DRAWS - start))
