"""Is a variant as sure of its answers as the reference is, and as rightly so?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 10
"""Equal parts of 0..1 for the calibration error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossing:
    """A video that one of the two answers and the other abstains from."""

    uri: str
    expected: float
    """The reference's confidence, in 0..1."""

    found: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfidenceParity:
    """Confidences of a variant beside those of the reference: the probability of the label that each answers."""

    mean: float
    expected_mean: float
    ece: float | None
    """Expected calibration error; None without labels."""

    expected_ece: float | None
    abstain: float
    crossings: tuple[Crossing, ...]

    @property
    def shift(self) -> float:
        """Change of the mean confidence."""
        return self.mean - self.expected_mean


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error, in 0..1.

    Args:
        confidence: (V,) probability of each answer.
        right: (V,) bool, whether it is right.

    Returns:
        The mean over all answers of the distance between the confidence and the accuracy of the bin that the answer is
        in; see ``BINS``.
    """
    places = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(places, weights=confidence - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def compare_confidence(
    uris: Sequence[str],
    expected: Sequence[float],
    found: Sequence[float],
    *,
    expected_right: Sequence[bool],
    right: Sequence[bool],
    abstain: float,
    tie_margin: float,
) -> ConfidenceParity:
    """Compare confidences video by video.

    Args:
        uris: The videos, at least one.
        expected: Confidences of the reference.
        found: Confidences of the variant.
        expected_right: Whether the reference's answers are right; empty without labels.
        right: The same for the variant.
        abstain: An answer with a smaller confidence counts as none.
        tie_margin: A confidence that moved by no more than this crosses nothing.
    """
    before, now = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    crossed = ((before >= abstain) != (now >= abstain)) & (np.abs(before - now) > tie_margin)
    return ConfidenceParity(
        mean=float(now.mean()),
        expected_mean=float(before.mean()),
        ece=calibration_error(now, np.asarray(right, bool)) if right else None,
        expected_ece=calibration_error(before, np.asarray(expected_right, bool)) if expected_right else None,
        abstain=abstain,
        crossings=tuple(
            Crossing(uri=uris[place], expected=float(before[place]), found=float(now[place]))
            for place in np.flatnonzero(crossed).tolist()
        ),
    )
