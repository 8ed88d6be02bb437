"""Golden videos: small made videos that show whether a decoder gives the right frames in the right colours.

They are stored in a bundle beside the clips that came out of them at export. Whoever opens the bundle decodes them
again and compares: a decoder that is one frame late, swaps colours or turns the picture is found before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ivdr_deploy._text import reason_of
from ivdr_deploy.errors import ClipShapeError, ExportError, VideoError
from ivdr_deploy.video import open_video

GOLDEN_FRAMES = 64
"""Frames of each video: a clip of 16 frames with stride 4, or of 32 with stride 2."""

GOLDEN_FPS = 25
GOLDEN_SIZE = (96, 128)
"""(height, width) in pixels."""

DECODE_TOLERANCE = 2.5
"""Levels of 0 to 255, as the mean of a frame, by which two decodings may differ: see ``compare_clips``.

Measured on these videos, for contracts from 64 to 256 pixels on the short side: PyAV 18 and 19 against each other 0,
OpenCV 4.13 and 5.0 against PyAV at most 1.6. Faults: one frame late 74, red and blue swapped 25, U and V swapped 29,
mirrored 61, limited taken for full range or the reverse 8, BT.601 for BT.709 or the reverse 3.7, one pixel aside 3.0
(at 256; 6 at 128). The same frames of a sound decoder, drawn against decoded: 1.6.
"""

_CODEC_ERROR = 3.0
"""Levels, as the mean of a frame, that encoding may cost; measured: at most 1.6."""

_CELL = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class _Recipe:
    name: str
    codec: str
    bframes: int
    options: Mapping[str, str]
    colorspace: int
    """FFmpeg's number of the colour matrix: 1 is BT.709; 2 says nothing, which stands for BT.601."""

    kr: float
    kb: float
    """Weights of red and blue in the luma of that matrix."""


_RECIPES = (
    _Recipe(  # PyAV finds its frames by time
        name="golden_h264.mp4",
        codec="libx264",
        bframes=3,
        options={"crf": "16", "x264-params": "keyint=24:min-keyint=24:scenecut=0:b-adapt=0"},
        colorspace=1,
        kr=0.2126,
        kb=0.0722,
    ),
    _Recipe(  # and the frames of this one by count
        name="golden_mpeg4.avi",
        codec="mpeg4",
        bframes=2,
        options={"qmin": "2", "qmax": "3"},
        colorspace=2,
        kr=0.299,
        kb=0.114,
    ),
)


def make_golden_videos(folder: Path) -> tuple[str, ...]:
    """Write the golden videos, about 45 KB together, and check that what is decoded is what was drawn.

    The same versions of PyAV and NumPy write the same bytes.

    Args:
        folder: An existing folder.

    Returns:
        The names of the files in it.

    Raises:
        ExportError: if PyAV cannot encode one, or decodes other frames, other times or other colours.
        OSError: if a file cannot be written.
    """
    frames = np.stack([golden_frame(number) for number in range(GOLDEN_FRAMES)])
    for recipe in _RECIPES:
        path = folder / recipe.name
        _write(path, frames, recipe)
        _check(path, frames)
    return tuple(recipe.name for recipe in _RECIPES)


def compare_clips(expected: np.ndarray, found: np.ndarray) -> float:
    """Return the largest mean absolute difference of a frame, in levels of 0 to 255.

    Args:
        expected: uint8 RGB (..., H, W, 3), frames in any number of leading axes.
        found: The same shape and dtype.

    Raises:
        ClipShapeError: if shape or dtype differ, or are not those of frames.
    """
    for clips in (expected, found):
        if clips.dtype != np.uint8 or clips.ndim < 3 or clips.shape != expected.shape or not clips.size:
            raise ClipShapeError(
                f"cannot compare {expected.dtype} frames {expected.shape} with {found.dtype} {found.shape}",
                hint="decode both with the same contract: uint8 (..., height, width, 3)",
            )
    frame_shape = expected.shape[-3:]
    pairs = zip(expected.reshape(-1, *frame_shape), found.reshape(-1, *frame_shape), strict=True)
    return max(float(np.abs(one.astype(np.int16) - other).mean()) for one, other in pairs)


def golden_frame(number: int) -> np.ndarray:
    """Draw frame ``number``: uint8 RGB (96, 128, 3).

    A large picture moves up and left by one cell from frame to frame. Its brightness is a chequer of random cells, so
    that no two frames, no mirrored frame and no shifted one are alike. Its colour changes slowly over the picture, so
    that decoders which interpolate colour differently agree.
    """
    height, width = GOLDEN_SIZE
    y, x = np.mgrid[:height, :width] + _CELL * number
    luma = np.where(_coin(y // _CELL, x // _CELL), 193.0, 62.0)
    blue = 53.0 * np.sin(2 * np.pi * (x / 150 + y / 330))
    red = 56.0 * np.sin(2 * np.pi * (x / 210 - y / 120) + 1.0)
    green = -0.35 * (red + blue)
    rgb = np.stack([luma + red, luma + green, luma + blue], axis=-1)
    return np.asarray(np.rint(rgb), np.uint8)


def _coin(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Toss a coin for each cell of the plane, bool, the same on every machine: a hash in 32-bit arithmetic."""
    word = (row * 0x9E3779B1 + column * 0x85EBCA77) & 0xFFFFFFFF
    word = ((word ^ word >> 15) * 0x2C1B3C6D) & 0xFFFFFFFF
    return np.asarray((word ^ word >> 12) * 0x297A2D39 >> 31 & 1, bool)


def _to_yuv420(rgb: np.ndarray, recipe: _Recipe) -> np.ndarray:
    """Convert a frame to limited range, as uint8 (H * 3 / 2, W): not by FFmpeg, whose faults would cancel out."""
    red, green, blue = np.moveaxis(rgb / 255.0, -1, 0)
    luma = recipe.kr * red + (1 - recipe.kr - recipe.kb) * green + recipe.kb * blue
    planes = [16 + 219 * luma]
    for colour, weight in ((blue, recipe.kb), (red, recipe.kr)):
        chroma = 128 + 112 * (colour - luma) / (1 - weight)
        planes.append(chroma.reshape(rgb.shape[0] // 2, 2, -1, 2).mean(axis=(1, 3)))
    values = np.concatenate([plane.ravel() for plane in planes])
    return np.asarray(np.rint(values), np.uint8).reshape(-1, rgb.shape[1])


def _write(path: Path, frames: np.ndarray, recipe: _Recipe) -> None:
    import av

    try:
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream(recipe.codec, rate=GOLDEN_FPS, options=dict(recipe.options))
            stream.height, stream.width = GOLDEN_SIZE
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.thread_type, context.thread_count = (
                "NONE",
                1,
            )  # more would not give the same bytes each time
            context.gop_size, context.max_b_frames = 24, recipe.bframes
            context.colorspace, context.color_range = recipe.colorspace, 1
            for number, rgb in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(_to_yuv420(rgb, recipe), format="yuv420p")
                frame.colorspace, frame.color_range = recipe.colorspace, 1
                frame.pts, frame.time_base = number, Fraction(1, GOLDEN_FPS)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except OSError:  # PyAV's errors of the file system are of both kinds
        raise
    except (av.FFmpegError, ValueError) as error:  # ValueError: an encoder that this build lacks
        raise ExportError(
            f"the golden video {path.name} cannot be encoded with {recipe.codec}: {reason_of(error)}",
            hint="install PyAV from its wheel: pip install --force-reinstall av",
        ) from error


def _check(path: Path, frames: np.ndarray) -> None:
    hint = "this decoder cannot be trusted: install PyAV from its wheel, pip install --force-reinstall av"
    try:
        with open_video(path) as reader:
            if reader.info.num_frames != len(frames) or reader.info.fps != GOLDEN_FPS:
                raise ExportError(
                    f"{path.name}: {len(frames)} frames at {GOLDEN_FPS} a second were written, "
                    f"{reader.info.num_frames} at {reader.info.fps:g} are read",
                    hint=hint,
                )
            decoded = reader.read(range(len(frames)))
    except VideoError as error:
        raise ExportError(
            f"the golden video just written is not readable: {error.message}", hint=hint
        ) from error
    difference = compare_clips(frames, decoded)
    if difference > _CODEC_ERROR:
        raise ExportError(
            f"{path.name}: a decoded frame differs from the one drawn by {difference:.1f} levels in the mean, "
            f"expected at most {_CODEC_ERROR}",
            hint=hint,
        )
