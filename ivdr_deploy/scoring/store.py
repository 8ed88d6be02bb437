"""Where a score table lies: a folder of this machine, or a prefix of an object store.

A file appears whole under its name or not at all: by renaming one that is on the disk, or by one put of an object.
Names are decided by what is in the file, so that two writers of one name write the same rows.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from ivdr_deploy._files import (
    at_home,
    atomic_path,
    fsync_directory,
    left_over_name,
    remove_left_over,
    try_lock,
)
from ivdr_deploy._text import reason_of
from ivdr_deploy.errors import DataError, FolderError
from ivdr_deploy.video.remote import file_system, is_url

LOCK_FILE = "_run.lock"

_AGAIN = "delete it and run the same `ivdr score` command: it is made again"


class Store(Protocol):
    """A place for the files of one table. Names may have folders in them, with ``/``."""

    def __str__(self) -> str:
        """Return what a person calls it."""
        ...

    def path(self, name: str) -> str:
        """Return what a person calls a file in it."""
        ...

    def names(self) -> list[str]:
        """Return the names of all files, sorted; those of the store's own are left out."""
        ...

    def has(self, name: str) -> bool:
        """Say whether a file is there."""
        ...

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading.

        Raises:
            OSError: if it cannot be opened.
        """
        ...

    def write(self, name: str, data: bytes) -> None:
        """Let a file appear, in place of one that has its name; after this returns it survives a crash of the machine.

        Raises:
            OSError: if it cannot be written.
        """
        ...

    def remove(self, name: str) -> None:
        """Remove a file; one that is gone already is no error."""
        ...

    def claim(self) -> AbstractContextManager[None]:
        """Hold the place for writing, for as long as the returned context is open.

        Raises:
            FolderError: if another process holds it, where that can be told.
        """
        ...


def _raise(error: OSError) -> None:
    raise error


def damaged(where: str, reason: str) -> DataError:
    """Return the error for a file of a table that is not what was written."""
    return DataError(f"{where} is damaged ({reason})", hint=_AGAIN)


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn whatever a damaged file makes its reader raise into a ``DataError`` that names it.

    What the system says, such as that the disk does not answer, stays an ``OSError``: the file may be as it was.
    """
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        if error.errno is None:  # not of the system: pyarrow's word for what it cannot read
            raise damaged(where, _reason(error)) from error
        raise OSError(error.errno, error.strerror, where) from error
    except MemoryError as error:  # too little of it, or a length that a damaged file claims
        raise DataError(
            f"{where} cannot be read: it asks for more memory than there is",
            hint="raise the memory limit of this process (`ulimit -v`); where there is enough, the file is damaged: "
            + _AGAIN,
        ) from error
    except Exception as error:
        raise damaged(where, _reason(error)) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {reason_of(error, most=100)}"


class FolderStore:
    """A folder; the lock in it is let go of by the kernel, however its holder ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: int | None = None
        """Of the folder that is held."""

    def __str__(self) -> str:
        return str(self.folder)

    def path(self, name: str) -> str:
        """Return the path of a file."""
        return str(self.folder / name)

    def names(self) -> list[str]:
        """Return the paths of all files below the folder; temporary ones and the lock are left out.

        Raises:
            OSError: if a folder cannot be listed: its files must not pass for absent.
        """
        found: list[str] = []
        if not self.folder.is_dir():
            return found
        for folder, below, files in os.walk(self.folder, onerror=_raise):
            below[:] = [name for name in below if not left_over_name(name)]
            inside = Path(folder).relative_to(self.folder)
            found += [
                (inside / name).as_posix()
                for name in files
                if not left_over_name(name) and (inside / name) != Path(LOCK_FILE)
            ]
        return sorted(found)

    def has(self, name: str) -> bool:
        """Say whether a file is there."""
        return (self.folder / name).is_file()

    def open(self, name: str) -> BinaryIO:
        """Open a file."""
        return (self.folder / name).open("rb")

    def write(self, name: str, data: bytes) -> None:
        """Write a temporary file, flush it to the disk and rename it.

        Raises:
            FolderError: if the folder is not the one any more that is held: the rows would be scattered over two.
        """
        if self._lock is not None and not self._is_held(self._lock):
            raise FolderError(
                f"{self.folder} was moved or removed while scores were written to it",
                hint="what was written is where it is now; the same command with -o there goes on",
            )
        with atomic_path(self.folder / name) as temporary:
            temporary.write_bytes(data)

    def remove(self, name: str) -> None:
        """Remove a file."""
        (self.folder / name).unlink(missing_ok=True)

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Make the folder if it is absent, lock it, and remove what killed writers left half written."""
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            what = "a link that leads to no folder" if self.folder.is_symlink() else "a file"
            raise FolderError(
                f"{self.folder} is {what}; expected a folder for the score table", hint="choose another name"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        fsync_directory(self.folder.parent)
        with (self.folder / LOCK_FILE).open("a") as lock:
            if not try_lock(lock.fileno()):
                raise FolderError(
                    f"another process is writing scores to {self.folder}",
                    hint="wait for it, or choose another folder",
                )
            remove_left_over(self.folder)
            self._lock = lock.fileno()
            try:
                yield
            finally:
                self._lock = None

    def _is_held(self, lock: int) -> bool:
        try:
            return os.path.samestat(os.fstat(lock), os.stat(self.folder / LOCK_FILE))
        except FileNotFoundError:
            return False


class UrlStore:
    """A prefix of an object store. A file appears by one put, or by the end of one upload in parts.

    There is no lock: two writers of one table cut the same list into the same shards, and write the same rows under the
    same names.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        scheme, _, self._prefix = self.url.partition("://")
        self._system = file_system(scheme)

    def __str__(self) -> str:
        return self.url

    def path(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{self.url}/{name}"

    def names(self) -> list[str]:
        """Return the names below the prefix."""
        with as_os_error(self.url):
            found = self._system.find(self._prefix)
        return sorted(str(name)[len(self._prefix) :].lstrip("/") for name in found)

    def has(self, name: str) -> bool:
        """Say whether an object is there."""
        with as_os_error(self.path(name)):
            return bool(self._system.isfile(f"{self._prefix}/{name}"))

    def open(self, name: str) -> BinaryIO:
        """Fetch an object."""
        with as_os_error(self.path(name)):
            return io.BytesIO(self._system.cat_file(f"{self._prefix}/{name}"))

    def write(self, name: str, data: bytes) -> None:
        """Put an object."""
        with as_os_error(self.path(name)):
            self._system.pipe_file(f"{self._prefix}/{name}", data)

    def remove(self, name: str) -> None:
        """Remove an object."""
        with as_os_error(self.path(name)), suppress(FileNotFoundError):
            self._system.rm_file(f"{self._prefix}/{name}")

    def claim(self) -> AbstractContextManager[None]:
        """Hold nothing: see above."""
        return nullcontext()


@contextmanager
def as_os_error(where: str) -> Iterator[None]:
    """Let what a store's library raises be an error of the system that names the place."""
    try:
        yield
    except OSError as error:
        # A number makes the kind of the error: the classes of libraries take other arguments.
        kind = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}
        number = error.errno or next((kind[of] for of in kind if isinstance(error, of)), errno.EIO)
        raise OSError(number, reason_of(error, most=200), where) from error
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {reason_of(error, most=200)}", where) from error


def open_store(where: str | Path) -> Store:
    """Return the place that a path or a URL stands for."""
    if isinstance(where, str) and is_url(where):
        return UrlStore(where)
    return FolderStore(Path(at_home(where)))
