"""Files that are either complete or absent, and their digests."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when the disk, the user's share of it or the largest size of a file is full."""

_LEFT_OVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.(?P<kind>tmp|old)", re.DOTALL)
"""Names of ``_beside``."""


def at_home(path: str | os.PathLike[str]) -> str:
    """Return a path that a person wrote, with ``~`` and ``~user`` at its beginning replaced by the home folder.

    A shell does this for a word that begins so, and not behind ``--out=`` or ``out=``, nor in a file of settings.
    """
    return os.path.expanduser(path)


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_bounded(path: Path, most: int) -> bytes:
    """Read a file that somebody else wrote and that should be small.

    Args:
        path: The file; a pipe or a device, which may have no end, is none.
        most: Bytes that it may hold.

    Raises:
        OSError: if it cannot be read, or is no file.
        ValueError: if it holds more.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:  # a pipe would be waited for
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a file", str(path))
        content = stream.read(most + 1) if status.st_size <= most else b""  # it may grow meanwhile
    if max(len(content), status.st_size) > most:
        raise ValueError(f"it holds more than {most:,} bytes")
    return content


def fsync_directory(path: Path) -> None:
    """Make renames inside ``path`` durable."""
    _fsync(path)


def _fsync_all(folder: Path) -> None:
    """Make a folder durable with all files and folders below it."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            if not os.path.islink(os.path.join(place, name)):
                _fsync(Path(place, name))
        _fsync(Path(place))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path to write to; what is there takes the place of ``path`` when the block ends without an exception.

    It lies in a temporary folder beside ``path``, and is flushed to disk first: after a crash ``path`` holds the old
    content or the new one. The file gets the mode that the umask says, whatever the writer chose. The parent folder is
    made when absent. What runs that were killed here left over for the same ``path`` is removed.

    Raises:
        OSError: if a file cannot be written; when the disk is full, it names the folder that ``path`` is in.
    """
    with _temporary_folder(path) as folder:
        temporary = folder / path.name
        temporary.touch()
        mode = temporary.stat().st_mode
        temporary.unlink()
        yield temporary
        if temporary.stat().st_mode != mode:
            temporary.chmod(mode)
        _fsync(temporary)
        try:
            temporary.replace(path)
        except OSError as error:  # it names the temporary file first
            raise OSError(error.errno, error.strerror, str(path)) from error
        fsync_directory(path.parent)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that takes the place of ``path`` when the block ends well.

    An older folder at ``path`` is replaced as a whole; on an exception it stays as it was. The new one is flushed to
    disk first, with all that is in it. On Linux the two change places in one step, so that a kill at any moment leaves
    one of them under the name. Where ``path`` is a link, the folder it leads to is replaced. What runs that were killed
    here left over for the same ``path`` is removed.

    Raises:
        NotADirectoryError: if ``path`` is a file.
        OSError: if a file cannot be written; when the disk is full, it names the folder that ``path`` is in.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, expected a folder")
    with _temporary_folder(path) as temporary:
        yield temporary
        _fsync_all(temporary)
        _put_in_place(temporary, path)
        fsync_directory(path.parent)


def try_beside(path: Path) -> None:
    """Make a temporary folder beside ``path``, as ``atomic_directory`` will after the work that it is for; remove it.

    Raises:
        OSError: if the system refuses it; names the folder that ``path`` is in.
    """
    with _temporary_folder(path.resolve()):
        pass


@contextmanager
def naming_full_disk(folder: Path, *, below: Path | None = None) -> Iterator[None]:
    """Let an error of a full disk name the folder that is full.

    A failed write does not say which file it was; one that does may name a temporary folder, or, when it was copying,
    the source.

    Args:
        folder: What to name.
        below: Folder whose files are written here; ``folder`` when None. Files elsewhere are named as they are.
    """
    below = below or folder
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        named = error.filename2 or error.filename
        where = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else folder
        if named is None or below == where or below in where.parents:
            where = folder
        raise OSError(error.errno, error.strerror, str(where)) from error


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """Make a folder in the system's temporary one, for as long as the block runs.

    Raises:
        OSError: if it cannot be made; when the disk is full, in the whole block, it names the system's folder.
    """
    base = Path(tempfile.gettempdir())
    with naming_full_disk(base):
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
    try:
        with naming_full_disk(base, below=folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def left_over_name(name: str) -> bool:
    """Say whether a file name is that of something temporary of this module."""
    return _LEFT_OVER.fullmatch(name) is not None


def remove_left_over(folder: Path, name: str | None = None) -> None:
    """Remove the temporary folders of runs that were killed; those that are in use stay.

    Args:
        folder: Where they lie.
        name: Of the file or folder that they were to become; any when None.
    """
    for path in folder.glob(".*"):
        left = _LEFT_OVER.fullmatch(path.name)
        if left is None or name not in (None, left["name"]):
            continue
        if left["kind"] == "old" and not (folder / left["name"]).exists():
            # Killed between two renames: this is all there is.
            with contextlib.suppress(OSError):
                path.rename(folder / left["name"])
        elif path.is_dir() and not path.is_symlink():
            remove_unless_locked(path)


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """Make a folder beside ``path`` that is locked while the block runs, and gone after it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left_over(path.parent, path.name)

    def make() -> Path:
        made = _beside(path, "tmp")
        try:
            made.mkdir()
        except OSError as error:  # the name of what was to be temporary says nothing to a person
            raise OSError(error.errno, error.strerror, str(path.parent)) from error
        return made

    with naming_full_disk(path.parent):
        folder, lock = make_locked(make)
    try:
        with naming_full_disk(path.parent, below=folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def make_locked(make: Callable[[], Path]) -> tuple[Path, int]:
    """Make a folder that others can see is in use, for as long as this process lives.

    Args:
        make: Makes a new folder and returns it; called again if another process removed it too early.

    Returns:
        The folder, and the open descriptor that locks it.
    """
    while True:
        folder = make()
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        # A file system without locks gives none to whoever wants to remove the folder either.
        with contextlib.suppress(OSError):
            _lock(descriptor, wait=True)  # for a process that removes it at this moment
        if os.fstat(descriptor).st_nlink:
            return folder, descriptor
        os.close(descriptor)


def remove_unless_locked(folder: Path) -> None:
    """Remove a folder of ``make_locked`` whose process is gone."""
    with contextlib.suppress(OSError):  # gone already, or another user's
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            if try_lock(descriptor):
                shutil.rmtree(folder)
        finally:
            os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against others who call this, and wait for them; where it is absent or has no locks, do nothing."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            held.callback(os.close, descriptor)
            _lock(descriptor, wait=True)
        yield


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder against other processes; the system lets go of it however this one ends.

    Returns:
        False if another process has it.

    Raises:
        OSError: if the file system has no locks.
    """
    try:
        _lock(descriptor, wait=False)
    except BlockingIOError:
        return False
    return True


def _lock(descriptor: int, *, wait: bool) -> None:
    import fcntl  # here, because not every system has it

    fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _beside(path: Path, kind: str) -> Path:
    """Name a temporary neighbour that no other thread, process or machine names."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.{kind}")


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
    retired = _beside(path, "old")
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
