"""Training videos, decoded once into memory-mapped frames.

Decoding costs more than everything else on few cores, so the frames of every video are kept on disk, resized under the
contract but not cropped: exactly what ``ivdr_deploy.video.open_frames`` gives. Every run holds the files against their
digests (``train.kept``) before it trains on them; one that is damaged is made again. Decode workers import this module:
nothing here needs torch.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from ivdr_deploy._console import progress
from ivdr_deploy._files import NO_SPACE, remove_left_over
from ivdr_deploy.datasets.lists import VideoItem, VideoList
from ivdr_deploy.decoding import DecodeOptions, DecodePool, ScratchError
from ivdr_deploy.errors import DataError, IvdrError, VideoError
from ivdr_deploy.spec import ClipSpec, ViewPlan
from ivdr_deploy.video import PathSource, Source, VideoLimits, open_frames
from ivdr_deploy.video.preprocess import crops
from ivdr_deploy.video.sampling import place_clips
from train.kept import is_whole, kept_name, open_kept, writing

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CachedVideos:
    """The usable videos of a list, decoded."""

    items: tuple[VideoItem, ...]
    files: tuple[Path, ...]
    """One ``.npy`` per item: uint8 (L, h, w, 3), and behind it a digest that NumPy does not look at."""

    skipped: tuple[tuple[VideoItem, IvdrError], ...]
    """Videos that cannot be used, with the reason."""

    def __len__(self) -> int:
        return len(self.items)

    def frames(self, row: int) -> np.ndarray:
        """Return the frames of one video, uint8 (L, h, w, 3), mapped from disk."""
        return open_kept(self.files[row])

    def eval_clips(self, row: int, clip: ClipSpec, plan: ViewPlan) -> np.ndarray:
        """Return the clips that scoring would take, uint8 (N, T, crop, crop, 3); equal to those of ``load_clips``."""
        frames = self.frames(row)
        chosen = frames[place_clips(len(frames), clip, plan)]  # (clips, T, h, w, 3)
        views = crops(chosen, clip.crop_size, count=plan.spatial_crops)
        return np.stack(views, axis=1).reshape(-1, *clip.clip_shape)


def cache_videos(
    videos: VideoList,
    clip: ClipSpec,
    folder: Path,
    *,
    decode: DecodeOptions | None = None,
    limits: VideoLimits | None = None,
    max_bad_share: float = 0.0,
) -> CachedVideos:
    """Decode every video of a list that is not in the cache yet, or damaged there.

    Args:
        videos: What to decode. A file that is absent is a video that cannot be used.
        clip: The contract.
        folder: The cache; made when absent.
        decode: The decode workers.
        limits: What a video may cost; the defaults when None.
        max_bad_share: Share of videos that may be unusable.

    Raises:
        DataError: if more videos than allowed cannot be used; names the first of them.
        OSError: if the cache cannot be written.
    """
    sources = [PathSource(item.path.absolute()) for item in videos.items]
    filled = fill_cache(sources, clip, folder, decode=decode, limits=limits)
    good, skipped = usable(videos, filled, max_bad_share=max_bad_share)
    return CachedVideos(tuple(item for item, _ in good), tuple(file for _, file in good), skipped)


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
        named = "; ".join(f"{item.uri}: {error.message}" for item, error in skipped[:3])
        raise DataError(
            f"{videos.source}: {len(skipped)} of {len(pairs)} videos cannot be used"
            + (f" ({named})" if named else "; training needs at least 2"),
            hint="take them out of the list, or raise data.max_bad_share",
        )
    return good, skipped


def fill_cache(
    sources: Sequence[Source],
    clip: ClipSpec,
    folder: Path,
    *,
    decode: DecodeOptions | None = None,
    limits: VideoLimits | None = None,
) -> list[Path | VideoError]:
    """Decode the videos that are not in the cache yet, or damaged there; check those that are.

    A file of the cache belongs to one video (its name, size and time of change), to the settings of the contract that
    shape its frames, and to the decoder's version. Files appear whole or not at all, so several runs may share a
    folder.

    Args:
        sources: What to decode; a name together with size and time of change tells them apart.
        clip: The contract.
        folder: The cache; made when absent.
        decode: The decode workers.
        limits: What a video may cost; the defaults when None.

    Returns:
        For every source its file, or why it cannot be used.

    Raises:
        OSError: if the cache cannot be written.
    """
    limits = limits or VideoLimits()
    folder.mkdir(parents=True, exist_ok=True)
    shape = [clip.short_side, clip.exact_size, clip.resize, clip.color, clip.target_fps]
    try:
        with DecodePool(decode) as pool:

            def start(source: Source) -> VideoError | tuple[Future[None], Path]:
                try:
                    file = folder / kept_name(source, {"frames": shape})
                except VideoError as error:
                    return error
                return pool.submit(keep_frames, source, clip, file, limits=limits), file

            def finish(started: VideoError | tuple[Future[None], Path]) -> Path | VideoError:
                if isinstance(started, VideoError):
                    return started
                written, file = started
                try:
                    written.result()
                except VideoError as error:
                    return error
                return file

            jobs = [start(source) for source in sources]
            return [finish(job) for job in progress(jobs, total=len(jobs), description="decoding")]
    finally:
        remove_left_over(folder)  # of workers that were killed


def keep_frames(source: Source, /, clip: ClipSpec, file: Path, *, limits: VideoLimits) -> None:
    """Make sure that a file of the cache is there and whole: a job of the decode workers.

    Raises:
        VideoError: if the video cannot be used.
        ScratchError: if there is no space for the file.
    """
    if not is_whole(file):
        write_frames(source, clip, file, limits=limits)


def write_frames(source: Source, /, clip: ClipSpec, file: Path, *, limits: VideoLimits) -> None:
    """Decode all frames of a video into a file of the cache, holding one at a time.

    Raises:
        VideoError: if the video cannot be used.
        ScratchError: if there is no space for the file.
    """
    with open_frames(source, clip, limits=limits) as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": stream.shape}
        try:
            with writing(file) as write:
                start = io.BytesIO()
                np.lib.format.write_array_header_1_0(start, header)
                write(start.getvalue())
                for frame in stream.frames:
                    write(np.ascontiguousarray(frame).data)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise ScratchError(error.errno, error.strerror, error.filename) from error
