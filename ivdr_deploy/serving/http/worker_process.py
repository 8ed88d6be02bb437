"""A worker process, as the process that started it sees it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivdr_deploy.environment import signal_name
from ivdr_deploy.errors import ServerError
from ivdr_deploy.records import to_dict
from ivdr_deploy.serving.http.auth import VARIABLE
from ivdr_deploy.serving.http.channel import Channel, Message, Questions
from ivdr_deploy.serving.http.settings import HttpSettings
from ivdr_deploy.serving.http.standby import MOST_CONNECTIONS, Standby, last_words

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0
"""For a worker to say how it is, which it does however busy it is; one that says nothing is replaced."""

_EXIT_SECONDS = 10.0
"""For a worker to end when it has answered everything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """How a worker is started."""

    bundle: Path
    settings: HttpSettings
    token: str | None
    listening: socket.socket
    """The socket of the port. Whoever started the workers keeps it open, so that connections wait and are not refused
    while there is none; all workers accept from it, so that none waits for one that is dead."""

    host: str = "127.0.0.1"
    """Address of the port of gRPC."""

    grpc_port: int | None = None
    """Reserved by whoever started the workers, each of which listens on it; None is none."""

    kept_connections: int = MOST_CONNECTIONS
    """Whose clients are answered if the worker is killed."""


class WorkerProcess:
    """One process with HTTP and the network, in a process group of its own.

    Args:
        launch: How it is started.
        name: For messages.
        on_news: Called when ``facts`` can be read, and when it has ended.

    Raises:
        ServerError: if the system starts no process.
    """

    def __init__(self, launch: Launch, name: str, *, on_news: Callable[[], None]) -> None:
        try:
            ours, theirs = socket.socketpair()
            try:
                self._standby = Standby(launch.kept_connections)
            except BaseException:
                ours.close()
                theirs.close()
                raise
        except OSError as error:  # there are no more descriptors, or the disk is full: it may pass
            raise ServerError(f"what a worker needs cannot be made ({error.strerror})") from error
        self.unanswered = 0
        """Requests that it had when it was killed, and that were answered in its place."""

        with theirs, self._standby.theirs, self._standby.table:
            try:
                self._process = _start(
                    theirs.fileno(),
                    launch.listening.fileno(),
                    self._standby.theirs.fileno(),
                    self._standby.table.fileno(),
                )
            except BaseException:
                ours.close()
                raise
        self._channel = Channel(ours)
        self._questions = Questions(self._channel, name, on_gone=on_news)
        self._questions.greeting.add_done_callback(lambda _: on_news())
        first = {"bundle": str(launch.bundle), "settings": to_dict(launch.settings), "token": launch.token}
        first |= {"host": launch.host, "grpc_port": launch.grpc_port}
        with suppress(OSError):  # it has ended already, which the first question finds
            self._channel.send(first)

    @property
    def pid(self) -> int:
        """Of the process, and its process group."""
        return self._process.pid

    @property
    def loaded(self) -> bool:
        """Whether it has loaded the model, or failed to."""
        return self._questions.greeting.done()

    def facts(self) -> Message:
        """Return what ``InferenceService.describe`` says: its golden clips and videos agree. Only when ``loaded``.

        Raises:
            IvdrError: that it met when it loaded the model.
        """
        facts: Message = self._questions.greeting.result()["facts"]
        return facts

    def ask(self, do: str, *, seconds: float | None = None, **fields: Any) -> Message:
        """Ask it; see ``Questions.ask``."""
        return self._questions.ask(do, seconds=ANSWER_SECONDS if seconds is None else seconds, **fields)

    def end(self, seconds: float) -> Message | None:
        """Let it answer what it has taken, for so long at most, and end it; return the last it says about itself."""
        last = None
        try:
            last = self.ask("end", seconds=seconds)
            self._process.wait(_EXIT_SECONDS)
        except (ServerError, subprocess.TimeoutExpired):
            logger.warning("worker process %d had to be killed", self.pid)
        self.kill()
        return last

    def kill(self) -> str:
        """End it and its decoders at once, and answer in its place; return how it ended, by itself or so."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        code = self._process.wait()
        self._channel.close()
        self.unanswered += self._standby.speak(last_words(self._version()))
        return f"was ended by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"

    def _version(self) -> str:
        greeting = self._questions.greeting
        loaded = greeting.done() and greeting.exception() is None
        return str(greeting.result()["facts"]["version"]) if loaded else ""


def _start(*numbers: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "ivdr_deploy.serving.http.worker", *map(str, numbers)],
            pass_fds=numbers,
            stdin=subprocess.DEVNULL,
            stdout=2,  # ours is for results
            env={name: value for name, value in os.environ.items() if name != VARIABLE},
            start_new_session=True,  # Ctrl-C must reach us alone, so that requests can be finished first
        )
    except (
        OSError,
        ValueError,
    ) as error:  # ValueError: the socket was closed just now, since the server stops
        raise ServerError(f"no process can be started ({error})") from error
