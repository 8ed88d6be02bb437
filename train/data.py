"""What one step of training sees: the rows of a batch, and random clips of their videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ivdr_deploy.datasets.lists import VideoItem
from ivdr_deploy.spec import ClipSpec, ViewPlan
from train.augment import Changes, draw_changes
from train.cache import CachedVideos
from train.config import RunConfig

DrawClip = Callable[[int, ClipSpec, np.random.Generator], np.ndarray]
"""Draws the frame indices of a random clip: ``random_centre_clip`` or ``random_start_clip``."""


def epoch_batches(count: int, *, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the rows of each step of an epoch, in random order; rows that do not fill a batch are left out.

    A list shorter than a batch is one batch.
    """
    order = rng.permutation(count)
    size = min(batch_size, count)
    for start in range(0, count - size + 1, size):
        yield order[start : start + size]


def steps_per_epoch(count: int, *, batch_size: int) -> int:
    """Return how many batches ``epoch_batches`` yields."""
    return max(1, count // batch_size)


def single_views(
    videos: CachedVideos,
    rows: Sequence[int] | np.ndarray,
    clip: ClipSpec,
    *,
    draw: DrawClip,
    rng: np.random.Generator,
) -> np.ndarray:
    """Take one random clip with a random crop from each video.

    Args:
        videos: The cache.
        rows: Which videos.
        clip: The contract.
        draw: How a clip is placed in time.
        rng: Source of all randomness.

    Returns:
        uint8 (B, T, crop, crop, 3).
    """
    out = np.empty((len(rows), *clip.clip_shape), np.uint8)
    for target, row in zip(out, rows, strict=True):
        frames = videos.frames(row)
        _crop_into(target, frames, draw(len(frames), clip, rng), rng)
    return out


def dual_views(
    videos: CachedVideos,
    rows: Sequence[int] | np.ndarray,
    clip: ClipSpec,
    *,
    draw: DrawClip,
    rng: np.random.Generator,
    reverse_probability: float = 0.0,
) -> np.ndarray:
    """Take the three clips of each video that the dual losses compare.

    Clips 0 and 1 are drawn independently; clip 2 holds the frames of clip 0. Every clip has a crop of its
    own.

    Args:
        videos: The cache.
        rows: Which videos.
        clip: The contract.
        draw: How a clip is placed in time.
        rng: Source of all randomness.
        reverse_probability: Probability that all three clips of a video run backwards.

    Returns:
        uint8 (3, B, T, crop, crop, 3).
    """
    out = np.empty((3, len(rows), *clip.clip_shape), np.uint8)
    for place, row in enumerate(rows):
        frames = videos.frames(row)
        first, second = draw(len(frames), clip, rng), draw(len(frames), clip, rng)
        if rng.random() < reverse_probability:
            first, second = first[::-1], second[::-1]
        for view, indices in enumerate((first, second, first)):
            _crop_into(out[view, place], frames, indices, rng)
    return out


def draw_dual_batch(
    videos: CachedVideos,
    rows: np.ndarray,
    config: RunConfig,
    *,
    draw: DrawClip,
    rng: np.random.Generator,
) -> dict[str, Tensor | Changes]:
    """Draw the arguments of ``DualStep.forward``.

    Args:
        videos: The cache.
        rows: Which videos (B).
        config: Contract, network and augmentation.
        draw: How a clip is placed in time.
        rng: Source of all randomness.
    """
    count = len(rows)
    augment = config.augment
    views = dual_views(
        videos, rows, config.clip, draw=draw, rng=rng, reverse_probability=augment.reverse_probability
    )
    plain = np.zeros((3, count), dtype=bool)
    plain[0] = rng.random(count) < augment.plain_probability
    changes = draw_changes(augment, 3 * count, rng=rng, plain=plain.ravel())
    return {
        "views": torch.from_numpy(views),
        "changes": changes,
        "permutation": torch.from_numpy(draw_permutations(count, config.model.num_slots, rng=rng)),
    }


def draw_permutations(count: int, slots: int, *, rng: np.random.Generator) -> np.ndarray:
    """Draw an order of the segments for each video, the true one included.

    Returns:
        int64 (count, slots): place i takes segment ``[:, i]``.
    """
    return rng.permuted(np.tile(np.arange(slots), (count, 1)), axis=1)


def golden_clips(videos: CachedVideos, clip: ClipSpec, *, count: int = 4) -> np.ndarray:
    """Pick eval-mode clips for a checkpoint: the middle of ``count`` videos, of different classes first.

    Returns:
        uint8 (G, T, crop, crop, 3).
    """
    rows = golden_rows(videos.items, count=count)
    return np.concatenate([videos.eval_clips(row, clip, ViewPlan(num_clips=1)) for row in rows])


def golden_rows(items: Sequence[VideoItem], *, count: int = 4) -> list[int]:
    """Pick the videos that the golden clips of a checkpoint come from, of different classes first."""
    seen: dict[str | None, int] = {}
    order = []
    for row, item in enumerate(items):
        seen[item.label] = seen.get(item.label, 0) + 1
        order.append((seen[item.label], row))
    return [row for _, row in sorted(order)[:count]]


def _crop_into(target: np.ndarray, frames: np.ndarray, indices: np.ndarray, rng: np.random.Generator) -> None:
    size = target.shape[1]
    top, left = (int(rng.integers(extent - size + 1)) for extent in frames.shape[1:3])
    for picture, index in zip(target, indices, strict=True):
        picture[...] = frames[index, top : top + size, left : left + size]
