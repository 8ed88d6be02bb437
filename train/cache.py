"""Training videos, decoded once into memory-mapped frames.

Decoding costs more than everything else on few cores, so the frames of every video are kept on disk, resized under the
contract but not cropped: exactly what ``ivdr_deploy.video.open_frames`` gives. Decode workers import this module:
nothing here needs torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from ivdr_deploy._console import progress
from ivdr_deploy._files import NO_SPACE, atomic_path, remove_left_over
from ivdr_deploy.datasets.lists import VideoItem, VideoList
from ivdr_deploy.decoding import DecodeOptions, DecodePool, ScratchError
from ivdr_deploy.errors import DataError, VideoError
from ivdr_deploy.spec import ClipSpec, ViewPlan, canonical_json
from ivdr_deploy.video import PathSource, Source, VideoLimits, open_frames
from ivdr_deploy.video.preprocess import crops
from ivdr_deploy.video.sampling import place_clips


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
    """Decode every video of a list that is not in the cache yet.

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
    pairs = list(zip(videos.items, filled, strict=True))
    good = [(item, file) for item, file in pairs if isinstance(file, Path)]
    skipped = tuple((item, error) for item, error in pairs if isinstance(error, VideoError))
    if len(skipped) > max_bad_share * len(pairs) or len(good) < 2:
        named = "; ".join(f"{item.uri}: {error.message}" for item, error in skipped[:3])
        raise DataError(
            f"{videos.source}: {len(skipped)} of {len(pairs)} videos cannot be used"
            + (f" ({named})" if named else "; training needs at least 2"),
            hint="take them out of the list, or raise data.max_bad_share",
        )
    return CachedVideos(tuple(item for item, _ in good), tuple(file for _, file in good), skipped)


def fill_cache(
    sources: Sequence[Source],
    clip: ClipSpec,
    folder: Path,
    *,
    decode: DecodeOptions | None = None,
    limits: VideoLimits | None = None,
) -> list[Path | VideoError]:
    """Decode the videos that are not in the cache yet.

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
    try:
        with DecodePool(decode) as pool:

            def start(source: Source) -> Path | VideoError | tuple[Future[None], Path]:
                try:
                    file = folder / f"{_cache_key(source, clip)}.npy"
                except VideoError as error:
                    return error
                if file.is_file():
                    return file
                return pool.submit(write_frames, source, clip, file, limits=limits), file

            def finish(started: Path | VideoError | tuple[Future[None], Path]) -> Path | VideoError:
                if not isinstance(started, tuple):
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


def write_frames(source: Source, /, clip: ClipSpec, file: Path, *, limits: VideoLimits) -> None:
    """Decode all frames of a video into a ``.npy`` file, holding one at a time: a job of the decode workers.

    Raises:
        VideoError: if the video cannot be used.
        ScratchError: if there is no space for the file.
    """
    with open_frames(source, clip, limits=limits) as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": stream.shape}
        try:
            with atomic_path(file) as temporary, temporary.open("wb") as out:
                np.lib.format.write_array_header_1_0(out, header)
                for frame in stream.frames:
                    out.write(np.ascontiguousarray(frame).data)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise ScratchError(error.errno, error.strerror, error.filename) from error


def _cache_key(source: Source, clip: ClipSpec) -> str:
    found = source.identity()
    identity = {
        "uri": source.uri,
        "size": found.size_bytes,
        "changed_ns": found.changed_ns,
        "frames": [clip.short_side, clip.exact_size, clip.resize, clip.color, clip.target_fps],
        "decoder": ["pyav", metadata.version("av")],
    }
    return hashlib.sha256(canonical_json(identity).encode("utf-8", "surrogateescape")).hexdigest()[:32]
