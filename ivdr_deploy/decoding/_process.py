"""The side of whoever has jobs for a decode worker process: it is started, given one job at a time, and replaced.

Each process has a connection of its own: what all of them shared, a killed one would leave locked, or half read.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ivdr_deploy._text import reason_of
from ivdr_deploy.decoding._worker import Parcel, serve
from ivdr_deploy.environment import ending
from ivdr_deploy.errors import ResourceError, VideoCrashError, VideoTimeoutError
from ivdr_deploy.video.source import Source

_ATTEMPTS = 3
"""At giving a job to a process: one that is idle may be killed, and is not missed before."""


_START_SECONDS = 60.0
"""For a process to be ready. It takes milliseconds, and seconds on a machine that is busy."""


class _NotTakenError(Exception):
    """A job has not begun: there is no process, or it has ended before it read of it."""


class WorkerProcess:
    """A decode worker process, and the one that follows when it has ended. One thread at a time gives it a job.

    Args:
        context: Makes processes.
        path: Of the file in which results come back.
        memory_bytes: That it may take beyond what it needs before the first video.
        closing: Can be read from as soon as nobody waits for jobs any longer: the number of a pipe.
    """

    def __init__(self, context: ForkServerContext, path: Path, memory_bytes: int, closing: int) -> None:
        self._context, self._path = context, path
        self._memory_bytes, self._closing = memory_bytes, closing
        self._running: tuple[BaseProcess, Connection] | None = None

    def start(self) -> None:
        """Start the process, so that the first job need not wait; where that fails, the first job tries again."""
        with suppress(_NotTakenError):
            self._connected()

    def do(
        self,
        job: Callable[..., Any],
        source: Source,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        seconds: float,
    ) -> Any:
        """Do a job, called as ``job(source, *args, **kwargs)``; return what it gives.

        Args:
            job: A function of a module.
            source: Its video.
            args: More arguments.
            kwargs: More arguments.
            seconds: After which the process is killed.

        Raises:
            VideoCrashError: if the process has ended before the job was done.
            VideoTimeoutError: if the time is up.
            ResourceError: if one process after the other cannot be started, or has ended before it took the job.
            ScratchError: if there is no space for the source.
            CancelledError: if nobody waits any longer.
            Exception: what the job raises.
        """
        parcel = Parcel.pack(source, self._path)
        try:
            answer = self._ask(pickle.dumps((job, parcel, args, kwargs)), source.uri, seconds)
            packed, error = pickle.loads(answer)
            if error is not None:
                raise error
            return parcel.unpack(packed)
        finally:
            parcel.release()

    def end(self) -> int | None:
        """Kill the process, if there is one; return its exit code."""
        if self._running is None:
            return None
        (process, connection), self._running = self._running, None
        if process.exitcode is None:  # else its number may be another process's by now
            process.kill()
            process.join()
        connection.close()
        code = process.exitcode
        process.close()
        return code

    def _ask(self, call: bytes, name: str, seconds: float) -> bytes:
        for _ in range(_ATTEMPTS):
            try:
                return self._ask_once(call, name, seconds)
            except _NotTakenError as error:
                reason = error
        raise ResourceError(
            f"{name} was taken by none of {_ATTEMPTS} decode workers in a row ({reason_of(reason)})",
            hint="see what ends them, or raise the limits of memory and processes (`ulimit -v`, `ulimit -u`)",
        ) from reason

    def _ask_once(self, call: bytes, name: str, seconds: float) -> bytes:
        connection = self._connected()
        try:
            connection.send_bytes(call)
            ready = wait([connection, self._closing], seconds)
            if ready and self._closing not in ready:
                return connection.recv_bytes()
        except (BrokenPipeError, ConnectionResetError) as error:
            # What it was sent lies there unread: it was idle when it ended. Linux alone tells that from a job that was
            # taken; elsewhere a job that meets the death of an idle worker is a crash of its video.
            raise _NotTakenError(f"the last one {ending(self.end())}") from error
        except (EOFError, OSError) as error:
            raise VideoCrashError(
                f"{name}: the process that decoded it {ending(self.end())}",
                hint="the file, or the machine's memory; the other videos are not affected",
            ) from error
        self.end()
        if ready:
            raise CancelledError
        raise VideoTimeoutError(
            f"{name}: decoding did not end within {seconds:g} s, and its process was killed",
            hint="the file is damaged, or the machine is overloaded; raise max_decode_seconds if it is large",
        )

    def _connected(self) -> Connection:
        """Return the connection to a process that waits for a job, started where there is none."""
        if self._running is None:
            try:
                connection = self._started()
            except (OSError, EOFError) as error:  # EOFError: of the server that forks, which was killed
                raise _NotTakenError(f"no process can be started: {reason_of(error)}") from error
            self._await_ready(connection)
            return connection
        return self._running[1]

    def _started(self) -> Connection:
        ours, theirs = self._context.Pipe()
        with theirs, ExitStack() as undone:
            undone.enter_context(ours)
            process = self._context.Process(target=serve, args=(theirs, self._memory_bytes), daemon=True)
            process.start()
            undone.pop_all()
        self._running = process, ours
        return ours

    def _await_ready(self, connection: Connection) -> None:
        """Wait for the word of a new process, so that its start is no part of the time that a video has."""
        ready = wait([connection, self._closing], _START_SECONDS)
        try:
            if ready and self._closing not in ready:
                connection.recv_bytes()
                return
        except (EOFError, OSError) as error:
            raise _NotTakenError(f"the last one {ending(self.end())}") from error
        self.end()
        if ready:
            raise CancelledError
        raise _NotTakenError(f"the last one was not ready within {_START_SECONDS:g} s")
