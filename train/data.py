"""Training videos: decoded once into memory-mapped frames, then sampled as random clips.

Decoding costs more than everything else on few cores, so the frames of every video are kept on disk, resized
under the contract but not cropped: exactly what ``ivdr_deploy.video.clips.load_frames`` returns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ivdr_deploy._console import progress
from ivdr_deploy._files import atomic_path
from ivdr_deploy.datasets.lists import VideoItem, VideoList
from ivdr_deploy.errors import DataError, VideoError
from ivdr_deploy.spec import ClipSpec, canonical_json
from ivdr_deploy.video.clips import load_frames
from ivdr_deploy.video.preprocess import center_crop
from ivdr_deploy.video.sampling import uniform_clips

DrawClip = Callable[[int, ClipSpec, np.random.Generator], np.ndarray]
"""Draws the frame indices of a random clip: ``random_centre_clip`` or ``random_start_clip``."""


@dataclass(frozen=True, slots=True)
class CachedVideos:
    """The usable videos of a list, decoded."""

    items: tuple[VideoItem, ...]
    files: tuple[Path, ...]
    """One ``.npy`` per item: uint8 (L, h, w, 3)."""

    skipped: tuple[tuple[VideoItem, VideoError], ...]
    """Videos that cannot be used, with the reason."""

    def __len__(self) -> int:
        return len(self.items)

    def frames(self, row: int) -> np.ndarray:
        """Return the frames of one video, uint8 (L, h, w, 3), mapped from disk."""
        mapped: np.ndarray = np.load(self.files[row], mmap_mode="r")
        return mapped

    def eval_clips(self, row: int, clip: ClipSpec) -> np.ndarray:
        """Return the clips that scoring would use, uint8 (num_clips, T, crop, crop, 3)."""
        frames = self.frames(row)
        return np.ascontiguousarray(center_crop(frames[uniform_clips(len(frames), clip)], clip.crop_size))


def cache_videos(
    videos: VideoList, clip: ClipSpec, folder: Path, *, decode_threads: int = 1, max_bad_share: float = 0.0
) -> CachedVideos:
    """Decode every video that is not in the cache yet.

    A file of the cache belongs to one video file (path, size, time of change) and to the settings of the
    contract that shape its frames. Files appear whole or not at all, so several runs may share a folder.

    Args:
        videos: What to decode.
        clip: The contract.
        folder: The cache; made when absent.
        decode_threads: Videos decoded at the same time.
        max_bad_share: Share of videos that may be unusable.

    Raises:
        DataError: if a file is missing, or more videos than allowed cannot be used; names the first of them.
    """
    videos.require_files()
    files = [folder / f"{_cache_key(item.path, clip)}.npy" for item in videos.items]

    def fill(pair: tuple[VideoItem, Path]) -> VideoError | None:
        item, file = pair
        if file.is_file():
            return None
        try:
            frames, _ = load_frames(item.path, clip)
        except VideoError as error:
            return error
        with atomic_path(file) as temporary, temporary.open("wb") as stream:
            np.save(stream, frames)
        return None

    pairs = list(zip(videos.items, files, strict=True))
    with ThreadPoolExecutor(max_workers=decode_threads, thread_name_prefix="decode") as pool:
        filled = progress(pool.map(fill, pairs), total=len(pairs), description="decoding")
        errors = list(filled)
    good = [pair for pair, error in zip(pairs, errors, strict=True) if error is None]
    skipped = tuple((pair[0], error) for pair, error in zip(pairs, errors, strict=True) if error is not None)
    if len(skipped) > max_bad_share * len(pairs) or len(good) < 2:
        named = "; ".join(f"{item.uri}: {error.message}" for item, error in skipped[:3])
        raise DataError(
            f"{videos.source}: {len(skipped)} of {len(pairs)} videos cannot be used"
            + (f" ({named})" if named else "; training needs at least 2"),
            hint="take them out of the list, or raise data.max_bad_share",
        )
    return CachedVideos(tuple(item for item, _ in good), tuple(file for _, file in good), skipped)


def _cache_key(path: Path, clip: ClipSpec) -> str:
    status = path.stat()
    identity = {
        "path": str(path.resolve()),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "frames": [clip.short_side, clip.resize, clip.color, clip.target_fps],
    }
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:32]


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


def golden_clips(videos: CachedVideos, clip: ClipSpec, *, count: int = 4) -> np.ndarray:
    """Pick eval-mode clips for a checkpoint: the middle of ``count`` videos, of different classes first.

    Returns:
        uint8 (G, T, crop, crop, 3).
    """
    seen: dict[str | None, int] = {}
    order = []
    for row, item in enumerate(videos.items):
        seen[item.label] = seen.get(item.label, 0) + 1
        order.append((seen[item.label], row))
    rows = [row for _, row in sorted(order)[:count]]
    middle = replace(clip, num_clips=1)
    return np.concatenate([videos.eval_clips(row, middle) for row in rows])


def _crop_into(target: np.ndarray, frames: np.ndarray, indices: np.ndarray, rng: np.random.Generator) -> None:
    size = target.shape[1]
    top, left = (int(rng.integers(extent - size + 1)) for extent in frames.shape[1:3])
    for picture, index in zip(target, indices, strict=True):
        picture[...] = frames[index, top : top + size, left : left + size]
