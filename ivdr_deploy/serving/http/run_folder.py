"""The folder of one running server: its lock, its token, what it serves since the last update, and its socket."""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from ivdr_deploy._files import atomic_path, try_lock
from ivdr_deploy._text import quoted, reason_of
from ivdr_deploy.errors import ConfigError, FolderError, ServerError
from ivdr_deploy.records import from_dict
from ivdr_deploy.serving.http.channel import Channel, Message, error_from, error_message

logger = logging.getLogger(__name__)

_SOCKET, _RECORD, _LOCK, _TOKEN = "control.sock", "serving.json", ".lock", "token"

_SOCKET_PATH_BYTES = 103
"""Longest path of a Unix socket on macOS; on Linux it may have 107."""

Say = Callable[[Message], None]
Handler = Callable[[Message, Say], Message]
"""Does what a message asks for, says how far it is, and returns the last answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """Which bundles a server has, as it stands in its folder: a server that is started again serves the same."""

    started_with: str
    """What the command line named. Another one begins anew."""

    serving: str
    previous: str | None = None
    """What ``--rollback`` goes back to."""


class RunFolder:
    """The folder of a server that runs. A context manager: nobody else has it meanwhile.

    Args:
        path: The folder; made when absent. Nothing in it is touched but what this class made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._lock = -1
        self._listening: socket.socket | None = None

    @property
    def token_file(self) -> Path:
        """Where the token lies, unless the environment has it."""
        return self.path / _TOKEN

    @property
    def record_file(self) -> Path:
        """Where it is recorded what is served."""
        return self.path / _RECORD

    def __enter__(self) -> Self:
        """Take the folder.

        Raises:
            FolderError: if another server has it.
            ConfigError: if its path is too long for a socket.
        """
        control = self.path / _SOCKET
        if len(os.fsencode(control)) > _SOCKET_PATH_BYTES:
            raise ConfigError(
                f"the path of the run folder {self.path} is too long for a socket in it",
                hint="choose a shorter one with --run-dir",
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        if not try_lock(self._lock):
            os.close(self._lock)
            raise FolderError(
                f"another server uses the run folder {self.path}", hint="choose another one with --run-dir"
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._listening is not None:
            with suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)  # wakes who accepts, which closing does not
            self._listening.close()
            (self.path / _SOCKET).unlink(missing_ok=True)
        os.close(self._lock)

    def read(self) -> Record | None:
        """Return what is recorded, if anything is.

        Raises:
            ConfigError: if it cannot be read.
        """
        path = self.record_file
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_bytes())
        except ValueError as error:
            raise ConfigError(
                f"{path} is damaged ({reason_of(error)})", hint="remove it to begin anew"
            ) from error
        return from_dict(Record, values, where=str(path))

    def write(self, record: Record) -> None:
        """Record which bundles the server has."""
        with atomic_path(self.record_file) as temporary:
            # Not ``to_dict``: a path whose bytes are no text must come back as it is.
            temporary.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")

    def listen(self, handler: Handler) -> None:
        """Answer who asks at the control socket, which only the user of this process can open, until the end."""
        path = self.path / _SOCKET
        if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
            raise FolderError(
                f"{path} is there and is no socket", hint="choose another folder with --run-dir"
            )
        path.unlink(missing_ok=True)  # of a server that was killed: this one holds the lock
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        path.chmod(0o600)  # before anyone can connect
        self._listening.listen()
        threading.Thread(
            target=_accept, args=(self._listening, handler), name="control-socket", daemon=True
        ).start()


def ask_server(folder: Path, question: Message) -> Iterator[Message]:
    """Ask the server of a run folder to do something; yield what it says meanwhile, and its answer as the last.

    Raises:
        ServerError: if none runs there, or it ends meanwhile.
        IvdrError: that it met.
    """
    path = folder.resolve() / _SOCKET
    stream = socket.socket(socket.AF_UNIX)
    try:
        stream.connect(str(path))
    except OSError as error:
        stream.close()
        raise ServerError(
            f"no server answers at {path} ({error.strerror or error})",
            hint="name the run folder of the server with --run-dir; `ivdr serve` prints it",
        ) from error
    channel = Channel(stream)
    with closing(channel):
        channel.send(question)
        while (message := channel.receive()) is not None:
            if "error" in message:
                raise error_from(message["error"])
            last = "last" in message
            yield message
            if last:
                return
    raise ServerError("the server ended before it had done what was asked", hint="its log says more")


def _accept(listening: socket.socket, handler: Handler) -> None:
    while True:
        try:
            stream, _ = listening.accept()
        except OSError:  # it was closed
            return
        threading.Thread(target=_answer, args=(Channel(stream), handler), name="control", daemon=True).start()


class _GoneError(Exception):
    """Whoever asked hears nothing any more."""


def _answer(channel: Channel, handler: Handler) -> None:
    def say(message: Message) -> None:
        try:
            channel.send(message)
        except OSError as error:  # not any: a disk that is full is to be told
            raise _GoneError from error

    with closing(channel), suppress(_GoneError):
        question = channel.receive()
        if question is None:
            return
        try:
            answer = handler(question, say)
        except _GoneError:
            logger.warning("%s was given up: whoever asked for it has gone", quoted(question.get("do")))
            raise
        except Exception as error:  # noqa: BLE001  # whoever asked gets it
            logger.warning("%s was refused: %s", quoted(question.get("do")), error)
            say(error_message(error))
        else:
            say({**answer, "last": True})
