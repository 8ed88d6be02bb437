"""How much better or worse one model is than another on the same videos."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_TAIL = 0.05 / 4
"""Error of each of the four bounds that the interval is made of."""


@dataclass(frozen=True, slots=True)
class PairedChange:
    """The change of a share of right answers between two models that answered the same questions.

    The interval is exact, in the sense that it covers the true change in at least 95 % of all lists, however short:
    Clopper and Pearson's interval for the share of questions lost, the same for the share won, each at 97.5 %, and the
    difference of their ends. A bootstrap would give [0, 0] where no answer changed, on six videos as on six thousand.
    For R@1 the questions share a gallery, so that there it is an approximation.
    """

    lost: int
    """Right before, wrong now."""

    won: int
    """Wrong before, right now."""

    total: int

    @classmethod
    def between(cls, before: Sequence[bool], now: Sequence[bool]) -> PairedChange:
        """Count what changed, question by question."""
        pairs = list(zip(before, now, strict=True))
        lost = sum(old and not new for old, new in pairs)
        return cls(lost, sum(new and not old for old, new in pairs), len(pairs))

    @property
    def value(self) -> float:
        """The change of the share, e.g. -0.02 for two of a hundred lost; NaN when nothing was asked."""
        return (self.won - self.lost) / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """At least 95 %; see the class."""
        if not self.total:
            return (-1.0, 1.0)
        lost_low, lost_high = _exact_bounds(self.lost, self.total)
        won_low, won_high = _exact_bounds(self.won, self.total)
        return (won_low - lost_high, won_high - lost_low)

    def to_dict(self) -> dict[str, float | int | None]:
        """Return ``{value, lost, won, total, low, high}``, for reports; the value of nothing is None."""
        low, high = self.interval
        value = self.value if self.total else None
        return {
            "value": value,
            "lost": self.lost,
            "won": self.won,
            "total": self.total,
            "low": low,
            "high": high,
        }


def _exact_bounds(count: int, total: int) -> tuple[float, float]:
    """Return Clopper and Pearson's bounds of a share, each wrong with a probability of ``_TAIL``."""
    low = 0.0 if count == 0 else _solve(count - 1, total, 1 - _TAIL)
    high = 1.0 if count == total else _solve(count, total, _TAIL)
    return low, high


def _solve(count: int, total: int, wanted: float) -> float:
    """Find the share at which at most ``count`` of ``total`` come up with probability ``wanted``."""
    low, high = 0.0, 1.0
    places = np.arange(count + 1)
    # log of the binomial coefficients, by their ratios
    coefficients = np.concatenate([[0.0], np.log((total - places[1:] + 1) / places[1:])]).cumsum()
    for _ in range(60):
        share = (low + high) / 2
        logs = coefficients + places * math.log(share) + (total - places) * math.log1p(-share)
        if float(np.exp(logs).sum()) > wanted:  # it falls with the share
            low = share
        else:
            high = share
    return (low + high) / 2
