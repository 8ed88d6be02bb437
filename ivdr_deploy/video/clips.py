"""THE definition of "video file -> network input". Training, scoring and serving all come through here."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from ivdr_deploy.spec import ClipSpec, DecoderName
from ivdr_deploy.video.decode import open_video
from ivdr_deploy.video.preprocess import center_crop, resize_frame, resized_size
from ivdr_deploy.video.reader import VideoInfo, VideoLimits, VideoReader, VideoSource
from ivdr_deploy.video.sampling import timeline, uniform_clips


@dataclass(frozen=True, kw_only=True, slots=True)
class Clips:
    """The network input made from one video."""

    video: np.ndarray
    """uint8 RGB, C-contiguous, shape (num_clips, T, crop, crop, 3)."""

    seconds: np.ndarray
    """float64 (num_clips, 2): presentation times of the first and the last frame of every clip."""

    info: VideoInfo
    decode_ms: float
    """Opening, indexing and decoding."""

    preprocess_ms: float
    """Resizing, colour conversion and cropping."""


def load_clips(
    source: VideoSource, spec: ClipSpec, *, limits: VideoLimits | None = None, decoder: DecoderName = "pyav"
) -> Clips:
    """Decode a video into the clips that a contract asks for.

    Only the frames needed are kept, cropped, one copy each: memory depends on the contract, not on the video.
    Equal, bit for bit, to the centre crop of ``load_frames`` at the places ``uniform_clips`` gives.

    Args:
        source: Path of a local file, or its bytes.
        spec: The contract.
        limits: What the video may cost; the defaults when None.
        decoder: Which decoder reads it.

    Raises:
        VideoError: if the video cannot be used; see ``open_video`` and ``VideoReader.read``.
    """
    start = time.perf_counter()
    with open_video(source, limits=limits, decoder=decoder) as reader:
        grid = timeline(reader.pts_seconds, reader.info.fps, spec)
        indices = grid[uniform_clips(len(grid), spec)]
        unique, inverse = np.unique(indices, return_inverse=True)
        frames, preprocess_seconds = _read_resized(reader, unique, spec, crop_size=spec.crop_size)
        info, seconds = reader.info, reader.pts_seconds[indices[:, [0, -1]]]
    gather = time.perf_counter()
    video = frames[inverse.reshape(indices.shape)]
    end = time.perf_counter()
    preprocess_seconds += end - gather
    return Clips(
        video=video,
        seconds=seconds,
        info=info,
        decode_ms=1000.0 * (end - start - preprocess_seconds),
        preprocess_ms=1000.0 * preprocess_seconds,
    )


def load_frames(
    source: VideoSource, spec: ClipSpec, *, limits: VideoLimits | None = None, decoder: DecoderName = "pyav"
) -> tuple[np.ndarray, VideoInfo]:
    """Decode every frame of the sampling grid, resized and not cropped: what the training cache holds.

    Args:
        source: Path of a local file, or its bytes.
        spec: The contract.
        limits: What the video may cost; the defaults when None.
        decoder: Which decoder reads it.

    Returns:
        uint8 RGB (L, height, width, 3), the shorter side at ``spec.short_side``; and the facts of the video.

    Raises:
        VideoError: if the video cannot be used; see ``open_video`` and ``VideoReader.read``.
    """
    with open_video(source, limits=limits, decoder=decoder) as reader:
        grid = timeline(reader.pts_seconds, reader.info.fps, spec)
        unique, inverse = np.unique(grid, return_inverse=True)
        frames, _ = _read_resized(reader, unique, spec, crop_size=None)
        return (frames if len(unique) == len(grid) else frames[inverse]), reader.info


def _read_resized(
    reader: VideoReader, indices: np.ndarray, spec: ClipSpec, *, crop_size: int | None
) -> tuple[np.ndarray, float]:
    """Decode strictly increasing ``indices``; return the frames and the seconds spent on their pixels."""
    size = resized_size(reader.info.height, reader.info.width, spec.short_side)
    shape = size if crop_size is None else (crop_size, crop_size)
    out = np.empty((len(indices), *shape, 3), np.uint8)
    seconds = 0.0
    for row, (_, frame) in enumerate(reader.frames(indices.tolist())):
        start = time.perf_counter()
        rgb = resize_frame(frame, size, rotation=reader.info.rotation)
        out[row] = rgb if crop_size is None else center_crop(rgb, crop_size)
        seconds += time.perf_counter() - start
    return out, seconds
