"""The side of a decode worker process: how it starts, what it may take, and how arrays come back.

A result is pickled with its arrays outside the pickle; they travel through a scratch file, at memory speed. The file
lies in shared memory where there is room, else in the temporary folder.
"""

from __future__ import annotations

import errno
import io
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ivdr_deploy._files import make_locked, remove_unless_locked
from ivdr_deploy._memory import give_back_freed_memory, keep_freed_memory, resident_bytes
from ivdr_deploy._text import reason_of
from ivdr_deploy.errors import IvdrError
from ivdr_deploy.video.source import BytesSource, Source, SourceIdentity

_SHARED_MEMORY = Path("/dev/shm")
_NICENESS = 10
"""Of a decode worker, above that of its process, on the scale from -20 to 19."""

_LARGE_BYTES = 1 << 20
_KEPT_BYTES = 64 << 20

_MORE_BYTES = 20 << 20
"""Resident memory of a worker beyond what it has before its first video, from which on it gives back what is freed.
One that decodes ordinary videos has 14 MB more, and gives nothing back."""

_fresh_bytes = 0
"""What it has before its first video."""

_ROOM_BYTES = 1 << 30
"""Free space below which shared memory is not used: containers often have 64 MiB of it."""

_PREFIX = "ivdr-decode-"


class ScratchError(OSError):
    """A result cannot be written, by the pool or by a job: no fault of the video, so the run gets it."""


class Scratch:
    """A folder for the files that jobs and their results travel in.

    It is locked while this process lives; folders that killed processes left are removed when the next one is made.
    """

    def __init__(self) -> None:
        roomy = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free >= _ROOM_BYTES
        base = _SHARED_MEMORY if roomy else Path(tempfile.gettempdir())
        for left in base.glob(f"{_PREFIX}*"):
            remove_unless_locked(left)
        self._folder, self._lock = make_locked(lambda: Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base)))

    def file(self, number: int) -> Path:
        """Return where one worker's results are written, each over the last: a new file costs as much as its content.

        Args:
            number: Of the worker.
        """
        return self._folder / str(number)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)


@dataclass(frozen=True, slots=True)
class Parcel:
    """A source on its way to a worker, and the file in which the arrays come back."""

    source: Source
    path: Path

    @classmethod
    def pack(cls, source: Source, path: Path) -> Parcel:
        """Prepare a source for the way: bytes go through a file, anything else as it is.

        Raises:
            ScratchError: if there is no space for the file.
        """
        if not isinstance(source, BytesSource):
            return cls(source, path)
        spooled = path.with_suffix(".in")
        try:
            spooled.write_bytes(source.data)
        except OSError as error:
            spooled.unlink(missing_ok=True)
            raise ScratchError(error.errno, error.strerror, str(spooled)) from error
        return cls(_SpooledSource(spooled, source.uri), path)

    def unpack(self, packed: tuple[bytes, list[int]]) -> Any:
        """Put together what came back; its arrays are writable copies.

        Raises:
            ScratchError: if the file holds less than was written.
        """
        data, sizes = packed
        content = np.empty(sum(map(_aligned, sizes)), np.uint8).data
        if content.nbytes:
            with self.path.open("rb") as stream:  # buffered: a plain read gives 2 GiB at most
                if stream.readinto(content) != content.nbytes:
                    raise ScratchError(errno.EIO, "a result came back cut short", str(self.path))
        starts = itertools.accumulate(map(_aligned, sizes), initial=0)
        buffers = [content[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        return pickle.loads(data, buffers=buffers)

    def release(self) -> None:
        """Remove the bytes of a source whose job is done, or will never be."""
        if isinstance(self.source, _SpooledSource):
            self.source.path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _SpooledSource(Source):
    """The bytes of a request, read back in the worker: to the decoder they are bytes again, not a file."""

    path: Path
    uri: str

    def local(self) -> Path | bytes:
        return self.path.read_bytes()

    def open(self) -> BinaryIO:
        return io.BytesIO(self.path.read_bytes())

    def identity(self) -> SourceIdentity:
        return SourceIdentity(self.path.stat().st_size, None)


def serve(connection: Connection, memory_bytes: int) -> None:
    """Do one job after the other until the other end is gone; what a worker process runs.

    Args:
        connection: Takes a word when this is ready. Brings what ``_run`` takes, and takes back ``(result, None)``, or
            ``(None, error)``; all pickled.
        memory_bytes: That this process may take on top of what it has now.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started the pool ends it
    _initialise(memory_bytes)
    with suppress(EOFError, OSError):  # OSError: it has gone in the middle of a message
        connection.send_bytes(b"ready")
        while True:
            connection.send_bytes(_answer(connection.recv_bytes()))


def _answer(call: bytes) -> bytes:
    """Do a job; return what goes back, pickled."""
    try:
        return pickle.dumps((_run(*pickle.loads(call)), None))
    except Exception as error:  # noqa: BLE001  # whoever waits for the job gets it
        return pickle.dumps((None, _that_travels(error)))
    finally:
        # The C library gives back what is free at the end of its memory, and not what lies between pieces that are in
        # use: after some odd files one worker had 100 MB where another one had 50, and kept them.
        if resident_bytes() > _fresh_bytes + _MORE_BYTES:
            give_back_freed_memory()


def _that_travels(error: Exception) -> Exception:
    """Return an error that another process can read, with its traceback where it may be a defect."""
    try:
        pickle.loads(pickle.dumps(error))
        told = error
    except Exception:  # noqa: BLE001  # whatever its class does when it is read
        told = RuntimeError(f"{type(error).__name__}: {reason_of(error)}")
    if not isinstance(error, IvdrError | ScratchError | MemoryError):
        told.add_note("".join(traceback.format_exception(error)))  # a traceback itself does not travel
    return told


def _run(
    job: Callable[..., Any], parcel: Parcel, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[bytes, list[int]]:
    """Do a job; return the pickled result and the sizes of its arrays in the parcel's file."""
    result = job(parcel.source, *args, **kwargs)
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(result, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    if any(view.nbytes for view in views):
        try:
            # Over what an earlier job left: the sizes tell how much of it counts.
            with open(os.open(parcel.path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as stream:
                for view in views:
                    stream.write(view)
                    stream.write(bytes(_aligned(view.nbytes) - view.nbytes))
        except OSError as error:
            raise ScratchError(error.errno, error.strerror, str(parcel.path)) from error
    return data, [view.nbytes for view in views]


def give_way() -> None:
    """Let this worker have the cores only while the network does not want them.

    A network on the CPU waits for its slowest thread in every operator: a decoder that shares one of its cores slows
    all of it down. On two cores, one of them busy, decoding ahead took 1.14 times as long as one after the other on
    torch without this, and 0.99 with it. Where the network runs on a GPU the cores are free anyway.
    """
    if sys.platform == "linux":  # where a thread has a priority of its own
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, min(niceness, 19))


def _initialise(memory_bytes: int) -> None:
    """Prepare a worker process: it can be ended at any moment, and its memory is limited where the system can."""
    give_way()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Python's own handler would wait for the decoder to return
    if sys.platform == "linux":
        _end_with_parent()
        # By itself the C library keeps large frames for later once one has been freed, and after a 4096x2304 video
        # 0.8 GB stayed with the worker; other sizes then came on top, until the limit was met. A frame of an ordinary
        # video is no large one. Once told about large ones, it would give small ones back as well, and take them again
        # for the next video: 171 page faults and 1.8 of 18.9 ms for one of 160x120 pixels.
        keep_freed_memory(_KEPT_BYTES, large_bytes=_LARGE_BYTES)
        global _fresh_bytes
        _fresh_bytes = resident_bytes()
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        allowed = pages * resource.getpagesize() + memory_bytes
        _, before = resource.getrlimit(resource.RLIMIT_AS)
        if before != resource.RLIM_INFINITY:
            allowed = min(allowed, before)  # what the whole process may take
        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))


def end_with(descriptor: int) -> None:
    """Let the kernel kill this process when the one that holds the other end of a pipe is gone. Linux only.

    Args:
        descriptor: Of the end to read from; nothing is ever written to it, and one process alone holds its other end.
    """
    if sys.platform != "linux":
        return
    import fcntl  # here, because not every system has it

    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)
    if multiprocessing.connection.wait([descriptor], timeout=0):  # it had ended before
        os._exit(1)


def _end_with_parent() -> None:
    """Let the kernel kill this process when the one that started the pool is gone.

    A worker that waits notices by itself, one that hangs in a decoder does not. Its parent is the server that forks, so
    that the usual signal at the death of a parent would come too late.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    end_with(parent.sentinel)


def _aligned(size: int) -> int:
    """Round up, so that every array begins where the processor reads it fastest."""
    return -(-size // 64) * 64
