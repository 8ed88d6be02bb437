"""Does a model look at the order of time? Its answers to clips that run backwards, or whose segments are shuffled."""

from __future__ import annotations

import numpy as np


def reversed_clips(clips: np.ndarray) -> np.ndarray:
    """Return clips (N, T, H, W, 3) that run backwards."""
    return np.ascontiguousarray(clips[:, ::-1])


def shuffled_clips(clips: np.ndarray, segments: int, *, rng: np.random.Generator) -> np.ndarray:
    """Return clips (N, T, H, W, 3) whose segments are in another order than the true one, frames inside in theirs.

    Args:
        clips: The clips.
        segments: At least 2; divides T.
        rng: Draws an order for each clip; never the true one.
    """
    count, frames = clips.shape[:2]
    parts = clips.reshape(count, segments, frames // segments, *clips.shape[2:])
    out = np.empty_like(parts)
    true = np.arange(segments)
    for row in range(count):
        order = true
        while np.array_equal(order, true):
            order = rng.permutation(segments)
        out[row] = parts[row, order]
    return out.reshape(clips.shape)


def feature_change(true: np.ndarray, other: np.ndarray) -> float:
    """Return 1 - cosine between the mean features of a video's clips, (clips, F) each: 0 where order says nothing."""
    one, two = true.mean(axis=0, dtype=np.float64), other.mean(axis=0, dtype=np.float64)
    norms = float(np.linalg.norm(one) * np.linalg.norm(two))
    return 1.0 - float(one @ two) / norms if norms else 0.0
