"""Arrays that one run makes and later runs read: a file belongs to one video and to what it was made with.

A file ends with a SHA-256 over its name and what is before it, which NumPy does not look at. Files appear whole or
not at all, so several runs may share a folder. Decode workers import this module: nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ivdr_deploy._files import atomic_path
from ivdr_deploy._text import reason_of
from ivdr_deploy.errors import DataError, VideoOpenError
from ivdr_deploy.spec import canonical_json
from ivdr_deploy.video import Source, VideoLimits

DIGEST_BYTES = hashlib.sha256().digest_size
"""At the end of every file."""

_PIECE_BYTES = 1 << 20


def kept_name(source: Source, made_with: dict[str, Any]) -> str:
    """Name the file of a video: by its uri, size and time of change, the decoder's version, and ``made_with``.

    Raises:
        VideoError: if the video is absent or cannot be looked at.
    """
    found = source.identity()
    video = {"uri": source.uri, "size": found.size_bytes, "changed_ns": found.changed_ns}
    return _name(video | made_with) + ".npy"


def content_name(source: Source, /, made_with: dict[str, Any], *, limits: VideoLimits) -> str:
    """Name a video by its content, the decoder's version and ``made_with``: a job of the decode workers.

    Raises:
        VideoError: if the video is absent or cannot be read.
    """
    source.identity()  # its message says why
    try:
        with source.open() as stream:
            content = _sha256(stream)
    except OSError as error:
        raise VideoOpenError(f"{source.uri} cannot be read ({error.strerror})") from error
    return _name({"content": content} | made_with)


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := stream.read(_PIECE_BYTES):
        digest.update(piece)
    return digest.hexdigest()


def _name(identity: dict[str, Any]) -> str:
    whole = canonical_json({"decoder": ["pyav", metadata.version("av")], **identity})
    return hashlib.sha256(whole.encode("utf-8", "surrogateescape")).hexdigest()[:32]


@contextmanager
def writing(file: Path) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Yield what takes the bytes of a file, piece by piece; it appears with its digest when the block ends well.

    Raises:
        OSError: if it cannot be written.
    """
    with atomic_path(file) as temporary, temporary.open("wb") as out:
        digest = _new_digest(file)

        def write(piece: bytes | memoryview) -> None:
            digest.update(piece)
            out.write(piece)

        yield write
        out.write(digest.digest())


def is_whole(file: Path) -> bool:
    """Whether a file is there, and its digest is that of its name and all that is before it."""
    try:
        with file.open("rb") as stream:
            left = stream.seek(0, io.SEEK_END) - DIGEST_BYTES
            stream.seek(0)
            digest = _new_digest(file)
            while left > 0 and (piece := stream.read(min(left, _PIECE_BYTES))):
                digest.update(piece)
                left -= len(piece)
            return stream.read() == digest.digest()
    except OSError:  # absent, or a disk that does not give back what it holds
        return False


def open_kept(file: Path) -> np.ndarray:
    """Map the array of a file that was found whole.

    Raises:
        DataError: if it has gone or changed since.
    """
    try:
        mapped: np.ndarray = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise removed_or_damaged(file, error) from error
    return mapped


def removed_or_damaged(file: Path, error: Exception) -> DataError:
    """Return what is said of a file that was found whole and cannot be read any more."""
    return DataError(
        f"{file} was removed or damaged while it was in use ({reason_of(error, most=100)})",
        hint="run the same command again: the cache is checked, and training goes on from its last state",
    )


def _new_digest(file: Path) -> hashlib._Hash:
    """Begin the digest of a file with its name, so that another one does not pass for it."""
    return hashlib.sha256(file.name.encode())
