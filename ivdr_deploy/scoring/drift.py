"""How far the labels and features of one collection are from those of another."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

SAMPLE = 500
"""Rows of each table that features are compared on, evenly taken: the cost grows with the square."""

_SHUFFLES = 200
_LEAST_SHARE = 1e-4
"""A label that one of the tables does not have counts as this share: PSI has no value for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """How far a table is from a reference."""

    reference: str
    reference_state: str
    """Whether every input of its list has its row, in words."""

    labels_psi: float | None
    """Population stability index of the most probable labels: 0 for the same shares; above 0.2 is taken for a shift.
    None where one of the tables has none."""

    labelled: tuple[int, int]
    """Videos with a most probable label, here and in the reference."""

    vector: str | None
    """The output that ``mmd`` is of."""

    mmd: float | None
    """Squared maximum mean discrepancy of the vectors (unbiased, so that it may be below 0). None where one of the
    tables has fewer than two."""

    with_vector: tuple[int, int]
    """Videos with a vector, here and in the reference; of more than ``SAMPLE`` so many are looked at."""

    mmd_by_chance: float | None
    """What 95 of 100 random divisions of the rows of both stay below: a larger ``mmd`` is no chance."""


def label_psi(ours: Counter[str], theirs: Counter[str]) -> float:
    """Return the population stability index of two counts: sum of (p - q) ln(p / q) over the labels."""
    labels = sorted({*ours, *theirs})
    shares = []
    for counts in (ours, theirs):
        share = np.maximum([counts[label] / counts.total() for label in labels], _LEAST_SHARE)
        shares.append(share / share.sum())
    p, q = shares
    return float(((p - q) * np.log(p / q)).sum())


def mmd(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Return the squared maximum mean discrepancy of two sets of vectors, and its 95 % quantile by chance.

    Unbiased, with a Gaussian kernel whose width is the median distance (Gretton et al. 2012, lemma 6 and section 8). At
    most 500 rows of each are looked at. The same rows give the same figures.

    Args:
        ours: float, (N, D), N at least 2.
        theirs: float, (M, D), M at least 2.
    """
    ours, theirs = ours[sample(len(ours))], theirs[sample(len(theirs))]
    both, count = np.concatenate([ours, theirs]), len(ours)
    lengths = (both**2).sum(axis=1)
    distances = np.maximum(lengths[:, None] + lengths[None, :] - 2.0 * both @ both.T, 0.0)
    width = float(np.median(distances[np.triu_indices(len(both), 1)]))
    kernel = np.exp(-distances / max(width, 1e-12))
    chance = np.random.default_rng(0)
    shuffled = [_unbiased(kernel, chance.permutation(len(both)), count) for _ in range(_SHUFFLES)]
    return _unbiased(kernel, np.arange(len(both)), count), float(np.quantile(shuffled, 0.95))


def sample(count: int) -> np.ndarray:
    """Return which of so many rows ``mmd`` looks at: int64, all where they are few."""
    return np.linspace(0, count - 1, min(count, SAMPLE)).astype(np.int64)


def _unbiased(kernel: np.ndarray, order: np.ndarray, count: int) -> float:
    """Take the first ``count`` of ``order`` for one set and the rest for the other."""
    one, other = order[:count], order[count:]
    within = [
        (kernel[np.ix_(rows, rows)].sum() - len(rows)) / (len(rows) * (len(rows) - 1))
        for rows in (one, other)
    ]
    return float(sum(within) - 2.0 * kernel[np.ix_(one, other)].mean())
