"""A source before any decoder sees it: whether it exists, its size and container; and what it may cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ivdr_deploy.errors import VideoLimitError, VideoOpenError, VideoTimeoutError
from ivdr_deploy.video.containers import HEAD_BYTES, sniff_container
from ivdr_deploy.video.reader import VideoInfo, VideoLimits
from ivdr_deploy.video.source import VideoSource, as_source

DAMAGED_HINT = "the file is damaged or incomplete: copy or encode it again"

_MAX_ASPECT = 64
"""Longer side over shorter side. A sliver of a picture, resized to a short side, grows without bound."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedSource:
    """A source that may be handed to a decoder."""

    data: Path | bytes
    """Absolute path, or the encoded file."""

    name: str
    """For messages."""

    size_bytes: int
    container: str


class Budget:
    """Keeps one opened video within its limits."""

    def __init__(self, name: str, limits: VideoLimits) -> None:
        self.limits = limits
        self._name = name
        self._spent_seconds = 0.0

    @contextmanager
    def charged(self) -> Iterator[None]:
        """Charge the time of a call into the decoder.

        Raises:
            VideoTimeoutError: after the call, when the time allowed is used up.
        """
        start = time.monotonic()
        try:
            yield
        finally:
            self._spent_seconds += time.monotonic() - start
        if self._spent_seconds > self.limits.max_decode_seconds:
            raise VideoTimeoutError(
                f"{self._name}: decoding took longer than the limit of {self.limits.max_decode_seconds:g} s",
                hint="send a shorter or smaller video, or raise the limit",
            )

    def check_count(self, num_frames: int) -> None:
        """Refuse more frames than ``max_frames``."""
        if num_frames > self.limits.max_frames:
            raise VideoLimitError(
                f"{self._name} has more than {self.limits.max_frames} frames, the limit",
                hint="send a shorter video",
            )

    def check_size(self, width: int, height: int) -> None:
        """Refuse frames of more than ``max_pixels``, and slivers."""
        size = f"{width}x{height} pixels"
        if width * height > self.limits.max_pixels:
            raise VideoLimitError(
                f"{self._name} has frames of {size}, more than the limit of {self.limits.max_pixels} pixels",
                hint="send a smaller picture, or raise the limit",
            )
        if max(width, height) > _MAX_ASPECT * max(1, min(width, height)):
            raise VideoLimitError(
                f"{self._name} has frames of {size}; no side may be more than {_MAX_ASPECT} times the other",
                hint="crop it to the part that matters",
            )

    def check_info(self, info: VideoInfo) -> VideoInfo:
        """Return ``info`` when the video it describes keeps the limits."""
        self.check_count(info.num_frames)
        self.check_size(info.width, info.height)
        if info.duration_seconds > self.limits.max_seconds:
            raise VideoLimitError(
                f"{self._name} lasts {info.duration_seconds:.1f} s, more than the limit of "
                f"{self.limits.max_seconds:g} s",
                hint="send a shorter video",
            )
        return info


def check_source(source: VideoSource, limits: VideoLimits) -> CheckedSource:
    """Check existence, size and container.

    Raises:
        VideoOpenError: if it is absent, a folder, not readable, or not an allowed container.
        NoVideoStreamError: if it is a sound file.
        VideoLimitError: if it is larger than ``limits.max_bytes``.
    """
    source = as_source(source)
    data, name = source.local(), source.uri
    if isinstance(data, bytes):
        size, head = len(data), data[:HEAD_BYTES]
    else:
        data = data.absolute()
        size, head = _look_into(data, name)
    if size > limits.max_bytes:
        raise VideoLimitError(
            f"{name} has {size} bytes, more than the limit of {limits.max_bytes}", hint="send a smaller file"
        )
    container = sniff_container(head, name=name)
    if container not in limits.containers:
        raise VideoOpenError(
            f"{name} is a {container} file, which is not allowed here",
            hint=f"allowed containers: {', '.join(limits.containers)}",
        )
    return CheckedSource(data=data, name=name, size_bytes=size, container=container)


def _look_into(path: Path, name: str) -> tuple[int, bytes]:
    try:
        if path.is_dir():
            raise VideoOpenError(
                f"{name} is a folder, expected a video file", hint="give the path of one file"
            )
        if not path.exists():
            raise VideoOpenError(f"{name} does not exist", hint="check the path")
        if not path.is_file():  # a pipe or device could block for ever
            raise VideoOpenError(f"{name} is not a regular file", hint="copy it to a file first")
        with path.open("rb") as stream:
            return path.stat().st_size, stream.read(HEAD_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise VideoOpenError(
            f"{name!r} cannot be read: {error}", hint="check the path and its permissions"
        ) from error
