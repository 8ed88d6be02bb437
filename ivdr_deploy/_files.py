"""Files that are either complete or absent, and their digests."""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync_directory(path: Path) -> None:
    """Make renames inside ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it over ``path`` when the block ends without an exception.

    The temporary file is flushed to disk first, so after a crash ``path`` holds the old content or the new one.
    The parent folder is made when absent. On an exception the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
        fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that takes the place of ``path`` when the block ends well.

    An older folder at ``path`` is replaced as a whole; on an exception it stays as it was. On Linux the two change
    places in one step, so that a kill at any moment leaves one of them under the name. Where ``path`` is a link, the
    folder it leads to is replaced.

    Raises:
        NotADirectoryError: if ``path`` is a file.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, expected a folder")
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        _put_in_place(temporary, path)
        fsync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path) -> Path:
    """Name a temporary neighbour that no other thread, process or machine names."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _put_in_place(temporary: Path, path: Path) -> None:
    """Give a folder the name ``path``; one that had it is removed, or has the name ``temporary`` now."""
    try:
        temporary.rename(path)  # works where nothing is there, or an empty folder
        return
    except OSError:
        if not path.exists():
            raise
    if _exchange(temporary, path):
        return
    retired = _beside(path)
    path.rename(retired)
    try:
        temporary.rename(path)
    except OSError:
        retired.rename(path)
        raise
    shutil.rmtree(retired)


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change places in one step; False where the system or the file system cannot."""
    renameat2 = (
        getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    )
    if renameat2 is None:
        return False
    at_fdcwd, rename_exchange = -100, 2
    return bool(renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0)
