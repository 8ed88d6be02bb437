"""The one definition of "video file -> network input". Training, scoring and serving all come through here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from ivdr_deploy.errors import VideoLimitError
from ivdr_deploy.spec import ClipSpec, DecoderName, ViewPlan
from ivdr_deploy.video.decode import open_video
from ivdr_deploy.video.preprocess import crops, resized_size
from ivdr_deploy.video.reader import VideoInfo, VideoLimits, VideoReader
from ivdr_deploy.video.sampling import count_clips, place_clips, timeline
from ivdr_deploy.video.source import VideoSource, as_source


@dataclass(frozen=True, kw_only=True, slots=True)
class Clips:
    """The network input made from one video."""

    video: np.ndarray
    """uint8 RGB, C-contiguous, shape (N, T, crop, crop, 3). The spatial crops of one clip follow each other."""

    seconds: np.ndarray
    """float64 (N, 2): presentation times of the first and the last frame of every clip."""

    view_plan: ViewPlan
    """What was asked for."""

    info: VideoInfo
    decode_ms: float
    """Opening, indexing and decoding."""

    preprocess_ms: float
    """Resizing, colour conversion and cropping."""

    def without_pixels(self) -> Clips:
        """Return everything but the pixels, which are an empty array then."""
        return replace(self, video=self.video[:0].copy())


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameStream:
    """Every frame of a video's sampling grid, one at a time; see ``open_frames``."""

    shape: tuple[int, int, int, int]
    """(L, height, width, 3) of all frames together."""

    info: VideoInfo
    frames: Iterator[np.ndarray]
    """uint8 (height, width, 3) each, L of them or as many as were asked for."""


def load_clips(
    source: VideoSource,
    spec: ClipSpec,
    plan: ViewPlan,
    *,
    limits: VideoLimits | None = None,
    decoder: DecoderName = "pyav",
) -> Clips:
    """Decode the clips that a plan takes from a video, as a contract wants them.

    Only the frames needed are kept, cropped, one copy each: memory depends on contract and plan, not on the video.
    Equal, bit for bit, to the crops of ``open_frames`` at the places ``place_clips`` gives.

    Args:
        source: Path of a local file, its bytes, or a ``Source``.
        spec: The contract.
        plan: Which clips.
        limits: What the video may cost; the defaults when None.
        decoder: Which decoder reads it.

    Raises:
        VideoLimitError: if the plan's sliding clips do not reach the end of the video, or as ``open_video``.
        VideoError: if the video cannot be used; see ``open_video`` and ``VideoReader.read``.
    """
    start = time.perf_counter()
    with open_video(source, limits=limits, decoder=decoder) as reader:
        grid = timeline(reader.pts_seconds, reader.info.fps, spec)
        if (count := count_clips(len(grid), spec, plan)) > plan.num_clips:
            raise VideoLimitError(
                f"{as_source(source).uri} needs {count} sliding clips, the plan takes at most {plan.num_clips}",
                hint="send a shorter video, or raise num_clips or hop of the view plan",
            )
        indices = grid[place_clips(len(grid), spec, plan)]
        unique, inverse = np.unique(indices, return_inverse=True)
        shape = (len(unique), plan.spatial_crops, spec.crop_size, spec.crop_size, 3)
        frames = np.empty(shape, np.uint8)
        preprocess_seconds = 0.0
        size = target_size(reader.info, spec)
        for row, (_, frame) in enumerate(reader.frames(unique.tolist())):
            begin = time.perf_counter()
            rgb = reader.to_rgb(frame, size)
            for place, crop in enumerate(crops(rgb, spec.crop_size, count=plan.spatial_crops)):
                frames[row, place] = crop
            preprocess_seconds += time.perf_counter() - begin
        info, seconds = reader.info, reader.pts_seconds[indices[:, [0, -1]]]
    gather = time.perf_counter()
    order = inverse.reshape(indices.shape)  # (clips, T)
    video = np.empty((len(indices), plan.spatial_crops, *spec.clip_shape), np.uint8)
    for place in range(plan.spatial_crops):
        np.take(frames[:, place], order, axis=0, out=video[:, place], mode="clip")  # others are buffered
    end = time.perf_counter()
    preprocess_seconds += end - gather
    return Clips(
        video=video.reshape(-1, *spec.clip_shape),
        seconds=np.repeat(seconds, plan.spatial_crops, axis=0),
        view_plan=plan,
        info=info,
        decode_ms=1000.0 * (end - start - preprocess_seconds),
        preprocess_ms=1000.0 * preprocess_seconds,
    )


@contextmanager
def open_frames(
    source: VideoSource,
    spec: ClipSpec,
    *,
    places: np.ndarray | None = None,
    limits: VideoLimits | None = None,
    decoder: DecoderName = "pyav",
) -> Iterator[FrameStream]:
    """Open the frames of the sampling grid, resized and not cropped: what training draws its clips from.

    One frame is held at a time, however long the video is.

    Args:
        source: Path of a local file, its bytes, or a ``Source``.
        spec: The contract.
        places: int64, growing: the places of the grid to give; all when None.
        limits: What the video may cost; the defaults when None.
        decoder: Which decoder reads it.

    Raises:
        VideoError: if the video cannot be used; also while the frames are taken.
    """
    with open_video(source, limits=limits, decoder=decoder) as reader:
        grid = timeline(reader.pts_seconds, reader.info.fps, spec)
        height, width = size = target_size(reader.info, spec)
        yield FrameStream(
            shape=(len(grid), height, width, 3),
            info=reader.info,
            frames=_on_grid(reader, grid if places is None else grid[places], size),
        )


def target_size(info: VideoInfo, spec: ClipSpec) -> tuple[int, int]:
    """Return (height, width) of a video's frames after the resize of a contract."""
    return spec.exact_size or resized_size(info.height, info.width, spec.short_side)


def _on_grid(reader: VideoReader, grid: np.ndarray, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield the frame at every place of the grid; one that is shown for several places is decoded once."""
    unique, counts = np.unique(grid, return_counts=True)
    for (_, frame), count in zip(reader.frames(unique.tolist()), counts, strict=True):
        rgb = reader.to_rgb(frame, size)
        for _ in range(count):
            yield rgb
