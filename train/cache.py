"""Training videos, decoded once: their frames are kept on disk, as many as may be.

Decoding costs more than everything else on few cores, so the frames of every video are kept, resized under the contract
but not cropped: what ``ivdr_deploy.video.open_frames`` gives, as JPEG pictures or as they are (``train.frames``). Every
run holds the files against their digests before it trains on them; one that is damaged is made again. Decode workers
import this module: nothing here needs torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import numpy as np

from ivdr_deploy._console import print_text, progress
from ivdr_deploy._files import remove_left_over
from ivdr_deploy._optional import require
from ivdr_deploy.datasets.lists import VideoItem, VideoList
from ivdr_deploy.decoding import DecodeOptions, DecodePool
from ivdr_deploy.errors import DataError, IvdrError, VideoError
from ivdr_deploy.spec import ClipSpec, ViewPlan
from ivdr_deploy.video import PathSource, Source, VideoLimits, open_frames
from ivdr_deploy.video.preprocess import crops
from ivdr_deploy.video.sampling import place_clips
from train.frames import Form, Frames, KeptFrames, Shape, StraightFrames, kept_shape, made_with, write_frames
from train.kept import content_name, is_whole

T = TypeVar("T")

SUFFIX = ".frames"
_NAMED = 3
"""Unusable videos that a message names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Keeping:
    """How frames are kept."""

    form: Form = "jpeg"
    max_bytes: float = 64.0 * (1 << 30)
    """Of all files in the folder."""

    fill: bool = True
    """Whether files are made and removed; else those that are there are read."""


@dataclass(frozen=True, slots=True)
class CachedVideos:
    """The usable videos of a list; a context manager where some of them are decoded whenever they are wanted."""

    items: tuple[VideoItem, ...]
    videos: tuple[Frames, ...]
    """The frames of each item."""

    skipped: tuple[tuple[VideoItem, IvdrError], ...]
    """Videos that cannot be used, with the reason."""

    pool: DecodePool
    """Decodes what is not kept."""

    threads: ThreadPoolExecutor
    """Read what is kept, and wait for the pool."""

    def __len__(self) -> int:
        return len(self.items)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.threads.shutdown(cancel_futures=True)
        self.pool.close()

    @property
    def straight(self) -> int:
        """Videos that are decoded whenever they are wanted."""
        return sum(isinstance(video, StraightFrames) for video in self.videos)

    def take(self, wanted: Sequence[tuple[int, np.ndarray]]) -> Iterator[np.ndarray]:
        """Yield frames of several videos, several at a time: the row of each, and the places, see ``Frames.take``."""
        return self.threads.map(lambda one: self.videos[one[0]].take(one[1]), wanted)

    def eval_clips(self, row: int, clip: ClipSpec, plan: ViewPlan) -> np.ndarray:
        """Return the clips that scoring would take, uint8 (N, T, crop, crop, 3), as far as the frames are those."""
        video = self.videos[row]
        chosen = video.take(place_clips(video.shape[0], clip, plan))  # (clips, T, h, w, 3)
        views = crops(chosen, clip.crop_size, count=plan.spatial_crops)
        return np.stack(views, axis=1).reshape(-1, *clip.clip_shape)


def cache_videos(
    videos: VideoList,
    clip: ClipSpec,
    folder: Path,
    *,
    keeping: Keeping | None = None,
    decode: DecodeOptions | None = None,
    limits: VideoLimits | None = None,
    max_bad_share: float = 0.0,
) -> CachedVideos:
    """Decode every video of a list that is not in the cache yet, or damaged there, as far as there is room.

    Args:
        videos: What to decode. A file that is absent is a video that cannot be used.
        clip: The contract.
        folder: The cache; made when absent.
        keeping: How frames are kept; as JPEG when None.
        decode: The decode workers.
        limits: What a video may cost; the defaults when None.
        max_bad_share: Share of videos that may be unusable.

    Raises:
        DataError: if more videos than allowed cannot be used; names the first of them.
        MissingDependencyError: if the package that writes JPEG is not there.
        OSError: if the cache cannot be written.
    """
    with DecodePool(decode) as pool:  # its workers start again when they are wanted
        sources = [PathSource(item.path.absolute()) for item in videos.items]
        filled = fill_cache(sources, clip, folder, pool, keeping=keeping, limits=limits)
    good, skipped = usable(videos, filled, max_bad_share=max_bad_share)
    return CachedVideos(
        items=tuple(item for item, _ in good),
        videos=tuple(frames for _, frames in good),
        skipped=skipped,
        pool=pool,
        threads=ThreadPoolExecutor(pool.options.workers, thread_name_prefix="frames"),
    )


def usable(
    videos: VideoList, made: Sequence[T | IvdrError], *, max_bad_share: float
) -> tuple[list[tuple[VideoItem, T]], tuple[tuple[VideoItem, IvdrError], ...]]:
    """Part the videos of a list into those of which something could be made, with it, and the others, with the reason.

    Raises:
        DataError: if more of them than allowed are unusable, or fewer than two are left; names the first of them.
    """
    pairs = list(zip(videos.items, made, strict=True))
    good = [(item, one) for item, one in pairs if not isinstance(one, IvdrError)]
    skipped = tuple((item, error) for item, error in pairs if isinstance(error, IvdrError))
    if len(skipped) > max_bad_share * len(pairs) or len(good) < 2:
        named = "; ".join(f"{item.uri}: {error.message}" for item, error in skipped[:_NAMED])
        named += f"; and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
        raise DataError(
            f"{videos.source}: {len(skipped)} of {len(pairs)} videos cannot be used"
            + (f" ({named})" if named else "; training needs at least 2"),
            hint="take them out of the list, or raise data.max_bad_share",
        )
    return good, skipped


def say_skipped(skipped: Iterable[tuple[VideoItem, IvdrError]]) -> None:
    """Tell a person which videos cannot be used, a line each, whatever is in their names."""
    for item, error in skipped:
        print_text(f"skipped {item.uri}: {error}", style="yellow")


def fill_cache(
    sources: Sequence[Source],
    clip: ClipSpec,
    folder: Path,
    pool: DecodePool,
    *,
    keeping: Keeping | None = None,
    limits: VideoLimits | None = None,
) -> list[Frames | VideoError]:
    """Decode the videos that are not in the cache yet, or damaged there, as far as there is room; check the others.

    A file of the cache belongs to the content of one video, to the settings of the contract that shape its frames, to
    its form and to the versions of decoder and encoder. Files appear whole or not at all, so several runs may share a
    folder. Those that were not used for longest make room; a run that still uses one decodes its video instead.

    Args:
        sources: What to decode.
        clip: The contract.
        folder: The cache; made when absent.
        pool: Decodes.
        keeping: How frames are kept; as JPEG when None.
        limits: What a video may cost; the defaults when None.

    Returns:
        For every source its frames, or why it cannot be used.

    Raises:
        OSError: if the cache cannot be written.
    """
    keeping, limits = keeping or Keeping(), limits or VideoLimits()
    form = keeping.form
    if form == "jpeg":
        require("cv2", extra="opencv")
    folder.mkdir(parents=True, exist_ok=True)
    shape = [clip.short_side, clip.exact_size, clip.resize, clip.color, clip.target_fps]
    identity = {"frames": shape, "form": made_with(form)}
    named = pool.each(content_name, ((source, identity) for source in sources), limits=limits)
    files = [
        name if isinstance(name, VideoError) else folder / name[:2] / f"{name}{SUFFIX}"
        for name in progress(named, total=len(sources), description="reading")
    ]
    known = [(source, file) for source, file in zip(sources, files, strict=True) if isinstance(file, Path)]
    room = _Room(folder, {file for _, file in known}, keeping)
    calls = ((source, clip, file, form, room.takes(file)) for source, file in known)
    try:
        seen = progress(
            pool.each(keep_frames, calls, limits=limits), total=len(known), description="decoding"
        )
        found: dict[Source, Frames | VideoError] = {}
        gone: set[Path] = set()
        for (source, file), one in zip(known, seen, strict=True):
            if isinstance(one, VideoError):
                found[source] = one
            else:
                video = StraightFrames(one, form, source, clip, pool, limits)
                found[source] = KeptFrames(one, form, file, video, gone) if room.holds(file) else video
    finally:
        for part in folder.glob("??"):
            remove_left_over(part)  # of workers that were killed
    pairs = zip(sources, files, strict=True)
    return [file if isinstance(file, VideoError) else found[source] for source, file in pairs]


def keep_frames(
    source: Source, /, clip: ClipSpec, file: Path, form: Form, takes: bool, *, limits: VideoLimits
) -> Shape:
    """Make sure that a file of the cache is there and whole, and return its shape: a job of the decode workers.

    Args:
        source: The video.
        clip: The contract.
        file: Of the cache.
        form: Of the frames.
        takes: Whether there is room for the file. Where there is none, the video is only opened.
        limits: What the video may cost.

    Raises:
        VideoError: if the video cannot be used.
        ScratchError: if there is no space for the file.
    """
    with suppress(FileNotFoundError):  # another run may remove it between the two
        if is_whole(file):
            return kept_shape(file)
    if takes:
        return write_frames(source, clip, file, form, limits=limits)
    with open_frames(source, clip, limits=limits) as stream:
        return stream.shape


class _Room:
    """What the files of a cache take, and which of them go when there is no more room.

    Args:
        folder: The cache.
        wanted: Files of this run, which stay.
        keeping: How much there may be.
    """

    def __init__(self, folder: Path, wanted: set[Path], keeping: Keeping) -> None:
        self._most, self._fills = keeping.max_bytes, keeping.fill
        there = {path: found for path in folder.glob(f"??/*{SUFFIX}") if (found := _status(path))}
        self._sizes = {path: status.st_size for path, status in there.items()}
        self._used = sum(self._sizes.values())
        self._full = False
        others = [path for path in there if path not in wanted]
        self._others = sorted(others, key=lambda path: there[path].st_mtime_ns, reverse=True)
        for path in wanted & there.keys():
            with suppress(FileNotFoundError):  # removed by another run
                os.utime(path)  # used last now

    def takes(self, file: Path) -> bool:
        """Whether a file may be made: one that is there is made again when it is damaged.

        The first that had to go for want of room is the last that is made: each of those after it would be decoded, all
        of it, for nothing.
        """
        room = self._used < self._most or bool(self._others)
        return file in self._sizes or (self._fills and not self._full and room)

    def holds(self, file: Path) -> bool:
        """Count a file, and whether it stays: others go for it, and where that is not enough, it goes itself."""
        if file not in self._sizes:
            found = _status(file)
            if found is None:
                return False
            self._sizes[file] = found.st_size
            self._used += self._sizes[file]
        while self._fills and self._used > self._most and self._others:
            self._remove(self._others.pop())
        if self._fills and self._used > self._most:
            self._remove(file)
            self._full = True
            return False
        return True

    def _remove(self, file: Path) -> None:
        file.unlink(missing_ok=True)
        self._used -= self._sizes.pop(file)


def _status(file: Path) -> os.stat_result | None:
    """Return the status of a file; None where another run has removed it."""
    try:
        return file.stat()
    except FileNotFoundError:
        return None
