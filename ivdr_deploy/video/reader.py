"""What every decoder promises: the facts of a video, its frames by index, and the limits it keeps."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from ivdr_deploy._text import quoted
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.spec import DecoderName
from ivdr_deploy.video.containers import CONTAINER_NAMES, DEFAULT_CONTAINERS
from ivdr_deploy.video.sampling import is_constant_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoLimits:
    """What a video may cost. All are on; passing one raises ``VideoLimitError`` or ``VideoTimeoutError``."""

    max_bytes: int = 1 << 30
    """Size of the encoded file."""

    max_seconds: float = 3600.0
    """Duration."""

    max_frames: int = 250_000
    """Displayed frames."""

    max_pixels: int = 4096 * 2304
    """Pixels per frame, as stored and as displayed."""

    max_decode_seconds: float = 120.0
    """Time spent in decoding and resizing one opened video, or each piece of a timeline. It is looked at between
    frames: a single frame that hangs can only be ended from outside the process."""

    containers: tuple[str, ...] = DEFAULT_CONTAINERS
    """Containers that may be opened, by their names in ``containers.CONTAINER_NAMES``."""

    @classmethod
    def allowing(cls, containers: Iterable[str]) -> Self:
        """Return the defaults, with more containers allowed."""
        return cls(containers=tuple(dict.fromkeys((*DEFAULT_CONTAINERS, *containers))))

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_seconds", "max_frames", "max_pixels", "max_decode_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"the video limit {name} must be positive, found {getattr(self, name)}")
        unknown = [name for name in self.containers if name not in CONTAINER_NAMES]
        if unknown:
            raise ConfigError(
                f"unknown video container {quoted(unknown[0])}",
                hint=f"known containers: {', '.join(CONTAINER_NAMES)}",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """Facts of one opened video, as it is displayed: rotated upright, in square pixels."""

    num_frames: int
    """Displayed frames: those an edit list removes are not counted."""

    duration_seconds: float
    """From the first frame to the end of the last one, which lasts one average frame."""

    fps: float
    """Average frames per second."""

    width: int
    height: int
    codec: str
    container: str
    rotation: int
    """Degrees counter-clockwise by which stored frames are turned for display: 0, 90, 180 or 270."""

    variable_frame_rate: bool
    """Whether frames lie off an even time grid, so that they are sampled by time."""

    size_bytes: int
    decoder: DecoderName

    @classmethod
    def of(
        cls,
        pts_seconds: np.ndarray,
        *,
        nominal_fps: float,
        size: tuple[int, int],
        codec: str,
        container: str,
        rotation: int,
        size_bytes: int,
        decoder: DecoderName,
    ) -> Self:
        """Describe a video by its frame times; the nominal rate counts only where a single frame has none.

        Args:
            pts_seconds: (num_frames,) from 0, num_frames >= 1.
            nominal_fps: What the container says; 0 when it says nothing.
            size: (width, height) as displayed.
            codec: FFmpeg's name of the format, or the file's four letters.
            container: Name from ``containers.CONTAINER_NAMES``.
            rotation: Degrees counter-clockwise, one of 0, 90, 180, 270.
            size_bytes: Size of the encoded file.
            decoder: Which reader made it.
        """
        count = len(pts_seconds)
        fps = (count - 1) / float(pts_seconds[-1]) if count > 1 else nominal_fps or 1.0
        return cls(
            num_frames=count,
            duration_seconds=count / fps,
            fps=fps,
            width=size[0],
            height=size[1],
            codec=codec,
            container=container,
            rotation=rotation,
            variable_frame_rate=not is_constant_rate(pts_seconds),
            size_bytes=size_bytes,
            decoder=decoder,
        )


class VideoReader(abc.ABC):
    """An open video. Use it as a context manager, from one thread at a time."""

    info: VideoInfo

    pts_seconds: np.ndarray
    """float64 (num_frames,): presentation times in display order; the first is 0."""

    @abc.abstractmethod
    def frames(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Decode some frames in one pass, holding one at a time.

        Args:
            indices: Strictly increasing, each in [0, num_frames).

        Yields:
            Each index with its frame as this decoder gives it, for ``to_rgb``: stored size, not rotated. It is
            exactly the frame that decoding the whole file would give at this position.

        Raises:
            VideoDecodeError: if one of the frames cannot be decoded.
            VideoTimeoutError: if decoding takes longer than the limit.
        """

    @abc.abstractmethod
    def to_rgb(self, frame: Any, size: tuple[int, int]) -> np.ndarray:
        """Turn a frame of this reader into a picture for display: resize, convert, rotate.

        Args:
            frame: From ``frames``.
            size: (height, width) of the result.

        Returns:
            uint8 RGB, shape (height, width, 3), upright. PyAV's is that of ``preprocess.resize_frame``, the
            resize that a contract names; OpenCV's is near it (``OpenCvReader`` says how near).

        Raises:
            VideoTimeoutError: if decoding and resizing take longer than the limit together.
        """

    @abc.abstractmethod
    def renew_time(self) -> None:
        """Count ``max_decode_seconds`` from here on: for a reader that works through a long video piece by piece."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free the decoder; calling it twice is allowed."""

    def read(self, indices: Sequence[int], *, size: tuple[int, int] | None = None) -> np.ndarray:
        """Decode frames into one array.

        Args:
            indices: In any order, with repetitions, each in [0, num_frames).
            size: (height, width) to resize to with ``to_rgb``; the display size when None.

        Returns:
            uint8 RGB, shape (len(indices), height, width, 3), upright.

        Raises:
            IndexError: if an index is outside the video.
            VideoDecodeError: if one of the frames cannot be decoded.
            VideoTimeoutError: if decoding takes longer than the limit.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        unique, inverse = np.unique(wanted, return_inverse=True)
        if unique.size and not (unique[0] >= 0 and unique[-1] < self.info.num_frames):
            raise IndexError(f"frame index outside [0, {self.info.num_frames}): {unique[0]}..{unique[-1]}")
        height, width = size or (self.info.height, self.info.width)
        out = np.empty((unique.size, height, width, 3), np.uint8)
        for row, (_, frame) in enumerate(self.frames(unique.tolist())):
            out[row] = self.to_rgb(frame, (height, width))
        return out if np.array_equal(unique, wanted) else out[inverse]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
