"""Where the bytes of a video come from: one thing with a name, whatever holds it."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ivdr_deploy._text import quoted, reason_of
from ivdr_deploy.errors import VideoOpenError


@dataclass(frozen=True, slots=True)
class SourceIdentity:
    """What tells that a source is still the same file."""

    size_bytes: int
    changed_ns: int | None
    """Time of the last change in nanoseconds; None where there is no such time."""


class Source(ABC):
    """One encoded video. Small and picklable, since decoding may happen in another process."""

    uri: str
    """Its name for people, rows and messages."""

    @abstractmethod
    def local(self) -> Path | bytes:
        """Return what a decoder opens: a path on this machine, or the encoded file itself."""

    @abstractmethod
    def open(self) -> BinaryIO:
        """Open the encoded file for reading, at its beginning.

        Raises:
            OSError: if it cannot be opened.
        """

    @abstractmethod
    def identity(self) -> SourceIdentity:
        """Return what tells that it is still the same file.

        Raises:
            VideoOpenError: if it is absent or cannot be looked at.
        """


@dataclass(frozen=True, slots=True)
class PathSource(Source):
    """A local file. A string is always a path, never a URL."""

    path: Path
    uri: str = ""

    def __post_init__(self) -> None:
        if not self.uri:
            object.__setattr__(self, "uri", str(self.path))

    def local(self) -> Path | bytes:
        """Return the path."""
        return self.path

    def open(self) -> BinaryIO:
        """Open the file."""
        return self.path.open("rb")

    def identity(self) -> SourceIdentity:
        """Return size and time of change."""
        try:
            status = self.path.stat()
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            raise VideoOpenError(
                f"{quoted(self.uri)} cannot be read: {reason_of(error)}",
                hint="check the path and its permissions",
            ) from error
        return SourceIdentity(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class BytesSource(Source):
    """An encoded file in memory, for example the body of a request."""

    data: bytes
    uri: str = "the video"

    def local(self) -> Path | bytes:
        """Return the bytes."""
        return self.data

    def open(self) -> BinaryIO:
        """Return a stream over the bytes."""
        return io.BytesIO(self.data)

    def identity(self) -> SourceIdentity:
        """Return the size."""
        return SourceIdentity(len(self.data), None)


VideoSource = str | Path | bytes | Source
"""Everything that is taken for a video; see ``as_source``."""


def as_source(video: VideoSource) -> Source:
    """Return the source that a path or bytes stand for."""
    if isinstance(video, Source):
        return video
    return BytesSource(video) if isinstance(video, bytes) else PathSource(Path(video))
