"""A source before any decoder sees it: whether it exists, its size and container; and what it may cost."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ivdr_deploy._text import quoted, reason_of
from ivdr_deploy.errors import VideoLimitError, VideoOpenError, VideoTimeoutError
from ivdr_deploy.video._declared import check_declared
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

    def renew(self) -> None:
        """Charge from here on as if nothing had been spent."""
        self._spent_seconds = 0.0

    @contextmanager
    def charged(self) -> Iterator[None]:
        """Charge the time of a call into the decoder.

        Raises:
            VideoTimeoutError: after the call, when the time allowed is used up.
            VideoLimitError: if it needs more memory than there is, or than this process may take.
        """
        start = time.monotonic()
        try:
            yield
        except MemoryError as error:  # FFmpeg's own is one, too
            raise VideoLimitError(
                f"{self._name} needs more memory than the decoder may take",
                hint="send a smaller video, or raise the memory of a decode worker",
            ) from error
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

    def check_packets(self, num_packets: int) -> None:
        """Refuse more packets than frames within the limit can have: two, when each holds one field."""
        if num_packets > 2 * self.limits.max_frames:
            self.check_count(num_packets)

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
    """Check existence, size, container, and what the header of an MP4 declares.

    Raises:
        VideoOpenError: if it is absent, a folder, not readable, or not an allowed container.
        NoVideoStreamError: if it is a sound file.
        VideoLimitError: if it is larger than ``limits.max_bytes``, or declares more than the limits allow.
    """
    source = as_source(source)
    data, name = source.local(), source.uri
    if not isinstance(data, bytes):
        data = data.absolute()
    with _opened(data, name) as stream:
        size = stream.seek(0, io.SEEK_END)
        if size > limits.max_bytes:
            raise VideoLimitError(
                f"{name} has {size} bytes, more than the limit of {limits.max_bytes}",
                hint="send a smaller file",
            )
        stream.seek(0)
        container = sniff_container(stream.read(HEAD_BYTES), name=name)
        if container not in limits.containers:
            raise VideoOpenError(
                f"{name} is a {container} file, which is not allowed here",
                hint=f"allowed are {', '.join(limits.containers)}; --allow-container {container} allows it too, "
                "or limits.containers in the settings of an endpoint",
            )
        if container == "mov":
            check_declared(stream, name=name, max_frames=limits.max_frames)
    return CheckedSource(data=data, name=name, size_bytes=size, container=container)


@contextmanager
def _opened(data: Path | bytes, name: str) -> Iterator[BinaryIO]:
    """Open a source; an error of the system, then or while it is read, is one of the video."""
    if isinstance(data, bytes):
        yield io.BytesIO(data)
        return
    path = data
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
            yield stream
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise VideoOpenError(
            f"{quoted(name)} cannot be read: {reason_of(error)}", hint="check the path and its permissions"
        ) from error
