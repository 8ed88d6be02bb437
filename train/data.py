"""What one step of training sees: the rows of a batch, and random clips of their videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ivdr_deploy.datasets.lists import VideoItem
from ivdr_deploy.spec import ClipSpec, ViewPlan
from train.augment import Changes, draw_changes
from train.cache import CachedVideos
from train.config import RunConfig
from train.frames import Shape

DrawClip = Callable[[int, ClipSpec, np.random.Generator], np.ndarray]
"""Draws the frame indices of a random clip: ``random_centre_clip`` or ``random_start_clip``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The videos of a step, and those of them that are to be drawn here.

    What is drawn for a video depends on the seed, the step and the video's place in the whole batch alone: several
    processes, or several parts one after the other, draw what one process draws at once.
    """

    rows: np.ndarray
    """int64 (N,) rows of the training list."""

    places: np.ndarray
    """int64 (B,) places in ``rows`` to draw."""

    seed: int
    step: int

    @property
    def own_rows(self) -> np.ndarray:
        """Rows of the training list to draw, (B,)."""
        rows: np.ndarray = self.rows[self.places]
        return rows

    def whole(self) -> np.random.Generator:
        """Return a generator for what is drawn for all N videos at once, the same in every part."""
        return np.random.default_rng([self.seed, 1, self.step])

    def video(self, place: int) -> np.random.Generator:
        """Return a generator for the video at a place of the batch."""
        return np.random.default_rng([self.seed, 3, self.step, place])

    def torch_seed(self, rank: int) -> int:
        """Return a seed for torch's own generators in one of several processes."""
        return int(np.random.SeedSequence([self.seed, 4, self.step, rank]).generate_state(1, np.uint64)[0])

    def part(self, number: int, parts: int, *, rank: int = 0, ranks: int = 1) -> Batch:
        """Return one of several equal parts, and of that the share of one of several processes."""
        places = np.array_split(self.places, parts)[number]
        return replace(self, places=np.array_split(places, ranks)[rank])


def epoch_batches(
    count: int, *, batch_size: int, rng: np.random.Generator, multiple: int = 1
) -> Iterator[np.ndarray]:
    """Yield the rows of each step of an epoch, in random order; rows that do not fill a batch are left out.

    A list shorter than a batch is one batch, of the largest size that ``multiple`` divides.
    """
    order = rng.permutation(count)
    size = min(batch_size, count) // multiple * multiple
    for start in range(0, count - size + 1, size):
        yield order[start : start + size]


def steps_per_epoch(count: int, *, batch_size: int) -> int:
    """Return how many batches ``epoch_batches`` yields."""
    return max(1, count // batch_size)


def single_views(videos: CachedVideos, batch: Batch, clip: ClipSpec, *, draw: DrawClip) -> np.ndarray:
    """Take one random clip with a random crop from each video.

    Args:
        videos: The cache.
        batch: Which videos.
        clip: The contract.
        draw: How a clip is placed in time.

    Returns:
        uint8 (B, T, crop, crop, 3).
    """
    drawn = []
    for place, row in zip(batch.places, batch.own_rows, strict=True):
        shape, rng = videos.videos[row].shape, batch.video(place)
        drawn.append([_View(draw(shape[0], clip, rng), *_corner(shape, clip.crop_size, rng))])
    views: np.ndarray = _cut(videos, batch, drawn, clip)[0]
    return views


def dual_views(
    videos: CachedVideos,
    batch: Batch,
    clip: ClipSpec,
    *,
    draw: DrawClip,
    count: int = 3,
    reverse_probability: float = 0.0,
) -> np.ndarray:
    """Take the clips of each video that the dual losses compare.

    Clips 0 and 1 are drawn independently; clip 2 holds the frames of clip 0. Every clip has a crop of its
    own.

    Args:
        videos: The cache.
        batch: Which videos.
        clip: The contract.
        draw: How a clip is placed in time.
        count: 3, or 2 to leave clip 2 out (V).
        reverse_probability: Probability that all clips of a video run backwards.

    Returns:
        uint8 (V, B, T, crop, crop, 3).
    """
    drawn = []
    for place, row in zip(batch.places, batch.own_rows, strict=True):
        shape, rng = videos.videos[row].shape, batch.video(place)
        first, second = draw(shape[0], clip, rng), draw(shape[0], clip, rng)
        if rng.random() < reverse_probability:
            first, second = first[::-1], second[::-1]
        views = (first, second, first)[:count]
        drawn.append([_View(places, *_corner(shape, clip.crop_size, rng)) for places in views])
    return _cut(videos, batch, drawn, clip)


def draw_dual_batch(
    videos: CachedVideos, batch: Batch, config: RunConfig, *, draw: DrawClip
) -> dict[str, Tensor | Changes]:
    """Draw the arguments of the ``forward`` of a dual step.

    Args:
        videos: The cache.
        batch: Which videos (B).
        config: Contract, network, augmentation and method.
        draw: How a clip is placed in time.
    """
    augment, dual, rng = config.augment, config.dual, batch.whole()
    count, slots = len(batch.rows), config.model.num_slots
    plain = np.zeros((dual.views, count), dtype=bool)
    plain[0] = rng.random(count) < augment.plain_probability
    changes = draw_changes(augment, dual.views * count, rng=rng, plain=plain.ravel())
    permutations = draw_permutations(count, slots, rng=rng, exclude_identity=dual.rank_exclude_identity)
    own = np.arange(dual.views)[:, None] * count + batch.places
    views = dual_views(
        videos,
        batch,
        config.clip,
        draw=draw,
        count=dual.views,
        reverse_probability=augment.reverse_probability,
    )
    drawn: dict[str, Tensor | Changes] = {
        "views": torch.from_numpy(views),
        "changes": changes.take(own.ravel()),
        "permutation": torch.from_numpy(permutations[batch.places]),
    }
    if dual.rank_warmup_steps:
        drawn["contrast"] = torch.tensor(float(batch.step >= dual.rank_warmup_steps))
    if dual.form == "moco":
        drawn["videos"] = torch.from_numpy(batch.own_rows.astype(np.int64))
    return drawn


def draw_permutations(
    count: int, slots: int, *, rng: np.random.Generator, exclude_identity: bool = False
) -> np.ndarray:
    """Draw an order of the segments for each video, all as likely.

    Args:
        count: Videos.
        slots: Segments (S).
        rng: Source of all randomness.
        exclude_identity: Whether the true order is left out; for S of at least 2.

    Returns:
        int64 (count, slots): place i takes segment ``[:, i]``.
    """
    orders = rng.permuted(np.tile(np.arange(slots), (count, 1)), axis=1)
    while exclude_identity and slots > 1 and (true := (orders == np.arange(slots)).all(axis=1)).any():
        orders[true] = rng.permuted(orders[true], axis=1)
    return orders


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


class _View(NamedTuple):
    """What is cut out of one video."""

    places: np.ndarray
    """int64 (T,) frames."""

    top: int
    left: int


def _corner(shape: Shape, size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw the upper left corner of a square."""
    top, left = (int(rng.integers(extent - size + 1)) for extent in shape[1:3])
    return top, left


def _cut(videos: CachedVideos, batch: Batch, drawn: Sequence[Sequence[_View]], clip: ClipSpec) -> np.ndarray:
    """Cut the views of each video, as many of every one: uint8 (V, B, T, crop, crop, 3)."""
    size = clip.crop_size
    out = np.empty((len(drawn[0]), len(drawn), *clip.clip_shape), np.uint8)
    wanted = [
        (int(row), np.stack([view.places for view in views]))
        for row, views in zip(batch.own_rows, drawn, strict=True)
    ]
    for number, (views, frames) in enumerate(zip(drawn, videos.take(wanted), strict=True)):
        for place, (_, top, left) in enumerate(views):
            out[place, number] = frames[place, :, top : top + size, left : left + size]
    return out
