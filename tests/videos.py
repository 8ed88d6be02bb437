"""Small videos whose frames say which frame they are, so that a wrong index is visible.

The number is drawn as a 4 x 4 grid of black and white cells over the centred square of the frame: 15 bits and
a parity bit. It survives lossy codecs, an aspect-true resize and a centre crop of 7/8 of the short side or more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

_GRID = 4


def numbered_frame(number: int, *, size: tuple[int, int]) -> np.ndarray:
    """uint8 RGB (height, width, 3) showing ``number`` (0..32767); ``size`` is (width, height)."""
    bits = np.array([number >> bit & 1 for bit in range(15)])
    cells = np.append(bits, 1 - bits.sum() % 2).reshape(_GRID, _GRID)  # an odd number of white cells, always
    width, height = size
    side = min(size)
    row = np.arange(side) * _GRID // side
    frame = np.full((height, width, 3), 128, np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    frame[top : top + side, left : left + side] = np.where(cells[row][:, row], 235, 16)[..., None]
    return frame


def frame_number(rgb: np.ndarray) -> int:
    """Read the number back from a decoded (and perhaps resized and centre-cropped) frame (H, W, 3)."""
    height, width = rgb.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = rgb[top : top + side, left : left + side].mean(axis=2)
    middle = [
        slice(round((k + 0.3) * side / _GRID), round((k + 0.7) * side / _GRID) or None) for k in range(_GRID)
    ]
    cells = np.array([[square[y, x].mean() > 128 for x in middle] for y in middle]).ravel()
    if cells.sum() % 2 != 1:
        raise ValueError("the frame shows no number: parity is wrong")
    return int(sum(int(bit) << i for i, bit in enumerate(cells[:15])))


def numbered_video(
    path: Path,
    *,
    num_frames: int = 40,
    fps: float = 25,
    size: tuple[int, int] = (128, 96),
    codec: str = "libx264",
    gop: int = 12,
    bframes: int = 2,
    pts_ms: Sequence[int] | None = None,
) -> Path:
    """Write a video of numbered frames; the suffix of ``path`` picks the container.

    Args:
        path: File to write, e.g. ``folder / "a.mp4"``.
        num_frames: Frames, numbered from 0.
        fps: Constant frame rate, unless ``pts_ms`` is given.
        size: (width, height) in pixels.
        codec: FFmpeg encoder.
        gop: Frames from key frame to key frame.
        bframes: Consecutive B-frames.
        pts_ms: Presentation time of every frame in milliseconds, for a variable frame rate.

    Returns:
        ``path``.
    """
    frames = (numbered_frame(number, size=size) for number in range(num_frames))
    return write_video(path, frames, fps=fps, codec=codec, gop=gop, bframes=bframes, pts_ms=pts_ms)


def write_video(
    path: Path,
    frames: Iterable[np.ndarray],
    *,
    fps: float = 25,
    codec: str = "libx264",
    gop: int = 12,
    bframes: int = 2,
    pts_ms: Sequence[int] | None = None,
    pix_fmt: str = "yuv420p",
    options: Mapping[str, str] | None = None,
) -> Path:
    """Encode uint8 RGB frames (H, W, 3); see ``numbered_video``. ``options`` go to the encoder as they
    are."""
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w") as container:
        stream = None
        for index, rgb in enumerate(frames):
            if stream is None:
                stream = container.add_stream(codec, rate=rate, options=dict(options or {}))
                stream.height, stream.width, stream.pix_fmt = *rgb.shape[:2], pix_fmt
                stream.codec_context.gop_size = gop
                stream.codec_context.max_b_frames = bframes
                stream.codec_context.thread_count = 1
                stream.codec_context.time_base = 1 / rate if pts_ms is None else Fraction(1, 1000)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            frame.time_base = stream.codec_context.time_base
            frame.pts = index if pts_ms is None else pts_ms[index]
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode(None))
    return path


def three_videos(folder: Path) -> Path:
    """Write three short videos and a broken one, and lists of them with labels of the tiny bundle."""
    for index in range(3):
        numbered_video(folder / f"{index}.mp4", num_frames=10 + index, size=(64, 48))
    (folder / "test.csv").write_text("path,label\n0.mp4,bow\n1.mp4,jump\n2.mp4,sit\n")
    (folder / "one.csv").write_text("path,label\n0.mp4,bow\n")
    (folder / "broken.mp4").write_bytes(b"")
    (folder / "with_broken.csv").write_text("path,label\n0.mp4,bow\nbroken.mp4,jump\n")
    (folder / "unknown.csv").write_text("path,label\n0.mp4,tango\n")
    return folder
