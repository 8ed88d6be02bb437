"""A video that somebody else has decoded: frames and their times in an ``.npz`` file, treated like any other container.

The file is what ``numpy.savez`` writes, not compressed: ``frames`` uint8 RGB (T, H, W, 3) as they are displayed, and
``timestamps`` float64 (T,) in seconds, rising. Sampling, resize and crop are those of the contract. Pixels are near
those of the encoded file, not equal: there the resize begins with the decoded planes, here with RGB.
"""

from __future__ import annotations

import io
import tokenize
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ivdr_deploy._text import quoted, quoted_few, reason_of
from ivdr_deploy.errors import ClipShapeError, VideoDecodeError, VideoOpenError
from ivdr_deploy.video._source import Budget, CheckedSource
from ivdr_deploy.video.preprocess import resize_frame
from ivdr_deploy.video.reader import VideoInfo, VideoLimits, VideoReader

CONTAINER = "npz"

_HINT = (
    "write it with numpy.savez(path, frames=uint8 (T, H, W, 3), timestamps=float64 (T,) in rising seconds)"
)
_MEMBERS = ("frames.npy", "timestamps.npy")
_LEAST_GAP_SECONDS, _MOST_GAP_SECONDS = 1e-9, 1e9
"""On the average. Beyond them a rate is no number any more."""

_DAMAGE = (
    zipfile.BadZipFile, ValueError, EOFError, OSError, RuntimeError, NotImplementedError,
    SyntaxError, tokenize.TokenError, IndexError, TypeError,
)  # fmt: skip
"""What zipfile and numpy raise; the last four come from a header that is no Python, or none of an array, to numpy."""

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def pack_frames(frames: np.ndarray, timestamps: np.ndarray) -> bytes:
    """Return the file of a decoded video, for ``predict`` or an endpoint.

    Args:
        frames: uint8 RGB (T, H, W, 3), T >= 1.
        timestamps: (T,) seconds, rising; the first need not be 0.

    Raises:
        ClipShapeError: if they are something else.
    """
    if problem := _problem(frames, times := np.asarray(timestamps, np.float64)):
        raise ClipShapeError(problem, hint=_HINT)
    packed = io.BytesIO()
    np.savez(packed, frames=frames, timestamps=times)
    return packed.getvalue()


class FrameArrayReader(VideoReader):
    """Reads such a file, all of it at once: its size is bounded by ``max_bytes``."""

    def __init__(self, source: CheckedSource, limits: VideoLimits) -> None:
        self._name = source.name
        self._budget = Budget(source.name, limits)
        with self._budget.charged():
            frames, times = _read(source)
        if problem := _problem(frames, times):
            raise VideoOpenError(f"{source.name}: {problem}", hint=_HINT)
        self._frames: np.ndarray | None = frames
        height, width = frames.shape[1:3]
        self.pts_seconds = times - times[0]
        info = VideoInfo.of(
            self.pts_seconds,
            nominal_fps=0.0,
            size=(width, height),
            codec="rawvideo",
            container=CONTAINER,
            rotation=0,
            size_bytes=source.size_bytes,
            decoder="pyav",
        )
        self.info = self._budget.check_info(info)

    def frames(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """See ``VideoReader.frames``; a frame is uint8 RGB (height, width, 3)."""
        if self._frames is None:
            raise ValueError(f"{self._name} is closed")
        for index in indices:
            yield index, self._frames[index]

    def to_rgb(self, frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """See ``VideoReader.to_rgb``."""
        import av

        with self._budget.charged():
            return resize_frame(av.VideoFrame.from_ndarray(frame, format="rgb24"), size)

    def renew_time(self) -> None:
        """See ``VideoReader.renew_time``."""
        self._budget.renew()

    def close(self) -> None:
        """Free the frames; calling it twice is allowed."""
        self._frames = None


def _problem(frames: np.ndarray, times: np.ndarray) -> str:
    """Say what is wrong with a decoded video; empty if nothing is."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        return (
            f"frames has dtype {frames.dtype} and shape {quoted(frames.shape)}, expected uint8 (T, H, W, 3)"
        )
    if times.shape != (len(frames),):
        return f"timestamps has shape {quoted(times.shape)}, expected ({len(frames)},), one for each frame"
    with np.errstate(over="ignore", invalid="ignore"):
        gaps = np.diff(times)
        apart = (times[-1] - times[0]) / max(1, len(gaps))
    if not np.isfinite(times).all() or not (gaps > 0).all():
        return "timestamps does not rise from each frame to the next, as float64"
    if len(gaps) and not _LEAST_GAP_SECONDS <= apart <= _MOST_GAP_SECONDS:
        return f"timestamps has frames {apart:g} s apart, expected from {_LEAST_GAP_SECONDS:g} to {_MOST_GAP_SECONDS:g}"
    return ""


def _read(source: CheckedSource) -> tuple[np.ndarray, np.ndarray]:
    opened = source.data if isinstance(source.data, Path) else io.BytesIO(source.data)
    try:
        with zipfile.ZipFile(opened) as archive:
            names = sorted(archive.namelist())
            if names != sorted(_MEMBERS):
                raise VideoOpenError(
                    f"{source.name} is a zip file with {quoted_few(names)}, expected {' and '.join(_MEMBERS)}",
                    hint=_HINT,
                )
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                # What is compressed may become a thousand times as large.
                raise VideoOpenError(f"{source.name} is compressed, expected it not to be", hint=_HINT)
            frames, times = (_array(archive.read(name), name) for name in _MEMBERS)
    except _DAMAGE as error:
        raise VideoDecodeError(
            f"{source.name} cannot be read as npz ({reason_of(error, most=100)})",
            hint="the file is damaged or incomplete: write it again",
        ) from error
    with np.errstate(over="ignore"):  # a long double may be infinite in it, which does not rise
        # In their own type the steps of small or unsigned integers wrap, and what falls may rise.
        return frames, times.astype(np.float64)


def _array(data: bytes, name: str) -> np.ndarray:
    """Read an array whose header says no more than is there; nothing is unpickled."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"{name} has the version {version} of the format")
    shape, fortran, dtype = _HEADERS[version](stream)
    if dtype.kind not in "uif" or fortran:
        raise ValueError(f"{name} holds {dtype}, or its columns first")
    count = int(np.prod(shape, dtype=object)) if shape else 1
    if count * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(
            f"{name} has {len(data) - stream.tell()} bytes, its shape {str(shape)[:80]} needs others"
        )
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape)
