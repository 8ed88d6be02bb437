"""What is said to the clients of a worker that was killed: the process that started it holds their connections too.

A worker hands a duplicate of each connection over when it accepts it, and notes in memory that both see how far each
is. When it is gone, whoever asked something and was told nothing is told to ask again; an answer that had begun is cut
off. Nothing is waited for: where a duplicate cannot be handed over, that connection is cut off as well.
"""

from __future__ import annotations

import json
import mmap
import selectors
import socket
import struct
import tempfile
import threading
import time
from contextlib import ExitStack, suppress

from ivdr_deploy.errors import WorkerDiedError
from ivdr_deploy.serving.core.answers import refusal
from ivdr_deploy.serving.http.oip import in_both_forms

MOST_CONNECTIONS = 512
"""Of a worker, of which a duplicate is held: those whose number in the worker is lower."""

VERSION_HEADER = "X-Model-Version"
"""Of every answer, also of one that is an error: which version of the model gave it."""

IDLE, ASKED, ANSWERING = 0, 1, 2
"""How far a connection is: nothing is asked; something of a request has come; something of its answer has gone."""

_NUMBER = struct.Struct("=I")
"""A note: the number of a connection in the worker. With a descriptor it is new, without it has ended."""

_IDLE_SECONDS = 1.0
"""In which a client that does not know yet may send its next request, and is told."""

_SENDING_SECONDS = 60.0
"""In which a client that is sending its request is listened to, so that it sees what it was told."""

_LAST_NOTES_SECONDS = 5.0
"""For the last notes of a worker that has ended. They end with it, unless something that it started has them too."""

_PIECE_BYTES = 1 << 18

_RETRY_SECONDS = "1"
"""Another worker accepts already, or the port keeps whoever comes until there is one."""

_VERSIONS = 3
"""Of a model that may be loaded at a time, while one is changed for another."""

_OTHER_DESCRIPTORS = 256
"""Of the process that looks after the workers, besides the duplicates."""


class Handover:
    """The end of the worker.

    Args:
        notes: Connected to ``Standby``.
        table: Descriptor of the memory that both see.
    """

    def __init__(self, notes: socket.socket, table: int) -> None:
        self._notes = notes
        self._notes.setblocking(False)
        self._states = mmap.mmap(table, 0)

    def accepted(self, connection: socket.socket) -> None:
        """Hand a connection over."""
        number = connection.fileno()
        if number < len(self._states):
            self._states[number] = IDLE
            # Where the other process is stopped it takes no notes: better cut off, some day, than waiting for it now.
            with suppress(OSError):
                socket.send_fds(self._notes, [_NUMBER.pack(number)], [number])

    def note(self, number: int, state: int) -> None:
        """Say how far a connection is."""
        if number < len(self._states):
            self._states[number] = state

    def ended(self, connection: socket.socket) -> None:
        """Say that a connection has ended, and end it: closing it here would not, while there is a duplicate."""
        with suppress(OSError):  # the client has ended it
            connection.shutdown(socket.SHUT_RDWR)
        with suppress(
            OSError
        ):  # as in accepted; it is shut, and held no longer than until its number comes again
            self._notes.send(_NUMBER.pack(connection.fileno()))


class Standby:
    """The end of the process that starts a worker, which then closes its ``theirs`` and ``table``.

    Args:
        most: Connections of which a duplicate is held.

    Raises:
        OSError: if the system gives no more descriptors or room.
    """

    def __init__(self, most: int = MOST_CONNECTIONS) -> None:
        with ExitStack() as made:
            self.table = made.enter_context(tempfile.TemporaryFile())
            self.table.truncate(most)
            self._states = mmap.mmap(self.table.fileno(), most)
            self._notes, self.theirs = socket.socketpair()
            made.pop_all()  # whoever starts the worker closes it
        self._held: dict[int, socket.socket] = {}
        self._thread = threading.Thread(target=self._listen, name="standby", daemon=True)
        self._thread.start()

    def speak(self, answer: bytes) -> int:
        """Answer for the worker, which has ended; return how many requests there were to answer for.

        Args:
            answer: What each is told, see ``last_words``.
        """
        self._thread.join(_LAST_NOTES_SECONDS)
        told = 0
        left: list[_Parting] = []
        for number, connection in list(self._held.items()):
            if self._states[number] == ANSWERING:
                connection.close()
                continue
            left.append(_Parting(connection, answer))
            if self._states[number] == ASKED:
                told += left[-1].tell()
        self._held.clear()
        if left:
            threading.Thread(target=_see_off, args=(left,), name="see-off", daemon=True).start()
        return told

    def _listen(self) -> None:
        """Take duplicates until the worker has ended."""
        with self._notes:
            while True:
                note, descriptors, _, _ = socket.recv_fds(self._notes, _NUMBER.size, 1)
                if not note:
                    return
                (number,) = _NUMBER.unpack(note)
                if (before := self._held.pop(number, None)) is not None:
                    before.close()
                if descriptors:  # else it has ended, or this process may open no more
                    self._held[number] = socket.socket(fileno=descriptors[0])


def most_connections(workers: int) -> int:
    """Return how many connections of each worker there is room for, having asked the system for what they need."""
    import resource  # here, because not every system has it

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _VERSIONS * workers * MOST_CONNECTIONS + _OTHER_DESCRIPTORS
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    room = wanted if soft == resource.RLIM_INFINITY else soft
    return max(1, min(MOST_CONNECTIONS, (room - _OTHER_DESCRIPTORS) // (_VERSIONS * workers)))


def last_words(version: str) -> bytes:
    """Return what a client is told whose request a worker had when it was killed: a whole answer of HTTP.

    Args:
        version: Of the model, as in every other answer.
    """
    error = WorkerDiedError(
        "the process that was to answer this request has ended", hint="send the request again"
    )
    found = refusal(error)
    body = json.dumps(in_both_forms(found.body)).encode()
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        VERSION_HEADER: version,
        "Retry-After": _RETRY_SECONDS,
    }
    lines = [
        f"HTTP/1.1 {found.status} Service Unavailable",
        *(f"{name}: {text}" for name, text in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


class _Parting:
    """A connection that is about to end."""

    def __init__(self, connection: socket.socket, answer: bytes) -> None:
        self.connection = connection
        self.until = time.monotonic() + _IDLE_SECONDS
        self._answer = answer

    def tell(self) -> bool:
        """Answer, once, and say that no more comes; False where the client has gone."""
        answer, self._answer = self._answer, b""
        self.until = time.monotonic() + _SENDING_SECONDS
        try:
            self.connection.send(answer)
            self.connection.shutdown(socket.SHUT_WR)
        except OSError:
            self.connection.close()
            return False
        return True

    def hear(self) -> None:
        """Take what a client sends, and tell it if that is not done."""
        try:
            more = self.connection.recv(_PIECE_BYTES)
        except OSError:
            more = b""
        if not more:  # it has gone
            self.connection.close()
        elif self._answer:
            self.tell()

    def goes_on(self) -> bool:
        """Whether the client is there, and has time left."""
        if time.monotonic() >= self.until:
            self.connection.close()
        return self.connection.fileno() >= 0


def _see_off(parting: list[_Parting]) -> None:
    """Listen to clients: one that is sending would not see its answer if the connection was reset under it."""
    while parting := [one for one in parting if one.goes_on()]:
        with selectors.DefaultSelector() as selector:
            for one in parting:
                selector.register(one.connection, selectors.EVENT_READ, one)
            wait = min(one.until for one in parting) - time.monotonic()
            for key, _ in selector.select(max(0.0, wait)):
                key.data.hear()
