"""Training videos, decoded once into memory-mapped frames.

Decoding costs more than everything else on few cores, so the frames of every video are kept on disk, resized under the
contract but not cropped: exactly what ``ivdr_deploy.video.open_frames`` gives. A file ends with a SHA-256 over
its name and what is before it, which every run holds against the file before it trains on it; one that is damaged is
made again. Decode workers import this module: nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import io
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

_DIGEST_BYTES = hashlib.sha256().digest_size
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class CachedVideos:
    """The usable videos of a list, decoded."""

    items: tuple[VideoItem, ...]
    files: tuple[Path, ...]
    """One ``.npy`` per item: uint8 (L, h, w, 3), and behind it a digest that NumPy does not look at."""

    skipped: tuple[tuple[VideoItem, VideoError], ...]
    """Videos that cannot be used, with the reason."""

    def __len__(self) -> int:
        return len(self.items)

    def frames(self, row: int) -> np.ndarray:
        """Return the frames of one video, uint8 (L, h, w, 3), mapped from disk."""
        file = self.files[row]
        try:
            mapped: np.ndarray = np.load(file, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{file} was removed or damaged while it was in use ({str(error)[:100]})",
                hint="run the same command again: the cache is checked, and training goes on from its last state",
            ) from error
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
    try:
        with DecodePool(decode) as pool:

            def start(source: Source) -> VideoError | tuple[Future[None], Path]:
                try:
                    file = folder / f"{_cache_key(source, clip)}.npy"
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
    if not _is_whole(file):
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
            with atomic_path(file) as temporary, temporary.open("wb") as out:
                start = io.BytesIO()
                np.lib.format.write_array_header_1_0(start, header)
                digest = _new_digest(file)
                digest.update(start.getvalue())
                out.write(start.getvalue())
                for frame in stream.frames:
                    pixels = np.ascontiguousarray(frame).data
                    digest.update(pixels)
                    out.write(pixels)
                out.write(digest.digest())
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise ScratchError(error.errno, error.strerror, error.filename) from error


def _new_digest(file: Path) -> hashlib._Hash:
    """Begin the digest of a file of the cache with its name, so that another one does not pass for it."""
    return hashlib.sha256(file.name.encode())


def _is_whole(file: Path) -> bool:
    """Whether a file of the cache is there, and its digest is that of its name and all that is before it."""
    try:
        with file.open("rb") as stream:
            left = stream.seek(0, io.SEEK_END) - _DIGEST_BYTES
            stream.seek(0)
            digest = _new_digest(file)
            while left > 0 and (piece := stream.read(min(left, _PIECE_BYTES))):
                digest.update(piece)
                left -= len(piece)
            return stream.read() == digest.digest()
    except OSError:  # absent, or a disk that does not give back what it holds
        return False


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
