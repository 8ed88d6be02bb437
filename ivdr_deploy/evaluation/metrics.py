"""How good answers are: accuracy of clips and of videos with an interval, per class, and retrieval."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""

_BLOCK = 1 << 22
"""Similarities that are computed at once; more would need more memory and be no faster."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A share of right answers. Few videos say little: the interval says how little."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        """The share; NaN when nothing was counted."""
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, which stays inside [0, 1] and is sound for small counts."""
        return wilson(self.value, self.total) if self.total else (0.0, 1.0)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} ({self.correct}/{self.total}, 95 % interval {low:.1%} to {high:.1%})"

    def with_wrong(self, count: int) -> Accuracy:
        """Return the accuracy with some more that are wrong."""
        return Accuracy(self.correct, self.total + count)

    def to_dict(self) -> dict[str, float | int | None]:
        """Return ``{value, correct, total, low, high}``, for reports; the value of nothing is None: JSON has no NaN."""
        low, high = self.interval
        value = self.value if self.total else None
        return {"value": value, "correct": self.correct, "total": self.total, "low": low, "high": high}


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of ``count`` answers, at least 1."""
    n, p, z2 = count, share, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (max(0.0, centre - half), min(1.0, centre + half))


def video_accuracy(probabilities: Sequence[np.ndarray], targets: Sequence[int], *, k: int = 1) -> Accuracy:
    """Count the videos whose class is among the ``k`` most probable.

    Args:
        probabilities: One (K,) array per video, the mean over its clips. Equal values rank by lower index.
        targets: The true class of every video.
        k: How many answers a video may give.
    """
    hits = (
        target in np.argsort(-row, kind="stable")[:k]
        for row, target in zip(probabilities, targets, strict=True)
    )
    return Accuracy(sum(hits), len(targets))


def clip_accuracy(clip_logits: Sequence[np.ndarray], targets: Sequence[int]) -> Accuracy:
    """Count single clips that are right on their own.

    Args:
        clip_logits: One (num_clips, K) array per video.
        targets: The true class of every video.
    """
    pairs = list(zip(clip_logits, targets, strict=True))
    correct = sum(int((rows.argmax(axis=-1) == target).sum()) for rows, target in pairs)
    return Accuracy(correct, sum(len(rows) for rows, _ in pairs))


def per_class_accuracy(
    predicted: Sequence[int], targets: Sequence[int], *, num_classes: int
) -> list[Accuracy]:
    """Return the video accuracy of every class, in class order."""
    truth, answers = np.asarray(targets, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    return [
        Accuracy(int(((truth == index) & (answers == index)).sum()), int((truth == index).sum()))
        for index in range(num_classes)
    ]


def retrieval_recall(
    gallery: np.ndarray,
    queries: np.ndarray,
    *,
    gallery_labels: Sequence[int],
    query_labels: Sequence[int],
    ks: Sequence[int],
) -> dict[int, Accuracy]:
    """Compute R@k: the share of queries with a gallery video of their class among the ``k`` nearest.

    Gallery and queries are centred with their own means, then compared by cosine.

    Args:
        gallery: (G, F) features.
        queries: (Q, F) features.
        gallery_labels: Class of every gallery row.
        query_labels: Class of every query row.
        ks: The values of k, each at least 1.
    """
    ranks = retrieval_ranks(gallery, queries, gallery_labels=gallery_labels, query_labels=query_labels)
    return {k: Accuracy(int((ranks < min(k, len(gallery))).sum()), len(queries)) for k in ks}


def retrieval_ranks(
    gallery: np.ndarray,
    queries: np.ndarray,
    *,
    gallery_labels: Sequence[int],
    query_labels: Sequence[int],
) -> np.ndarray:
    """Return at which place, from 0, each query finds its class; see ``retrieval_recall``.

    Returns:
        int64 (Q,); the size of the gallery where it holds none of the class.
    """
    gallery_unit, query_unit = _centred_unit(gallery), _centred_unit(queries)
    classes, wanted = np.asarray(gallery_labels), np.asarray(query_labels)
    ranks = np.empty(len(queries), np.int64)
    for rows in _blocks(len(queries), len(gallery)):
        similarity = query_unit[rows] @ gallery_unit.T
        right = np.where(classes == wanted[rows, None], similarity, -np.inf)
        best = right.argmax(axis=1)  # the first of equals
        nearest = np.take_along_axis(right, best[:, None], axis=1)
        before = np.arange(len(gallery)) < best[:, None]
        rank = ((similarity > nearest) | ((similarity == nearest) & before)).sum(axis=1)
        ranks[rows] = np.where(np.isneginf(nearest[:, 0]), len(gallery), rank)  # none of its class
    return ranks


def leave_one_out_hits(features: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """Say for every video of a set whether the nearest other one is of its class: the questions of R@1.

    Compared as in ``retrieval_recall``, in blocks of rows: the whole table is never in memory.

    Args:
        features: (N, F), N >= 2.
        labels: Class of every row.

    Returns:
        (N,) bool.
    """
    unit, classes = _centred_unit(features), np.asarray(labels)
    hits = np.empty(len(unit), bool)
    for rows in _blocks(len(unit), len(unit)):
        similarity = unit[rows] @ unit.T
        similarity[np.arange(len(similarity)), np.arange(len(unit))[rows]] = -np.inf
        hits[rows] = classes[similarity.argmax(axis=1)] == classes[rows]
    return hits


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    """Cut the rows of a table that is too large to hold into parts of ``_BLOCK`` values or one row."""
    size = max(1, _BLOCK // columns)
    for start in range(0, rows, size):
        yield slice(start, start + size)


def _centred_unit(features: np.ndarray) -> np.ndarray:
    centred = features - features.mean(axis=0, keepdims=True)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    unit: np.ndarray = centred / np.maximum(norms, 1e-12)
    return unit
