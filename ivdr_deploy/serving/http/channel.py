"""Questions and answers between the processes of one server: lines of JSON over a socket."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from ivdr_deploy import errors
from ivdr_deploy._text import reason_of
from ivdr_deploy.errors import IvdrError, ServerError

Message = dict[str, Any]


class Channel:
    """One end. Several threads may send; one receives.

    Args:
        stream: Connected; ``close`` closes it.
    """

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._lines = stream.makefile("rb")
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Send one message.

        Raises:
            OSError: if nobody is there any more.
        """
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            self._stream.sendall(line)

    def receive(self) -> Message | None:
        """Wait for the next message; None when the other end is gone, however that happened."""
        try:
            line = self._lines.readline()
        except (OSError, ValueError):  # ValueError: this end was closed
            return None
        if not line.endswith(b"\n"):  # cut off in the middle
            return None
        message: Message = json.loads(line)
        return message

    def close(self) -> None:
        """Let the other end see that this one is gone."""
        with suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)  # ends a wait for the next message
        self._lines.close()
        self._stream.close()


class Questions:
    """The end that asks.

    Args:
        channel: To the other end, whose answers bear the ``id`` of the question.
        whose: Who is asked, for messages.
        on_gone: Called when the other end is gone.
    """

    def __init__(self, channel: Channel, whose: str, *, on_gone: Callable[[], None]) -> None:
        self._channel, self._whose, self._on_gone = channel, whose, on_gone
        self._lock = threading.Lock()
        self._open: dict[int, Future[Message]] = {}
        self._last = 0
        self._gone = False
        self.greeting: Future[Message] = Future()
        """The first word of the other end, which answers no question; or its error."""

        threading.Thread(target=self._listen, name=f"answers of {whose}", daemon=True).start()

    def ask(self, do: str, *, seconds: float, **fields: Any) -> Message:
        """Ask and wait for the answer.

        Raises:
            IvdrError: what the other end answered, if that is an error.
            ServerError: if it is gone, or does not answer in time.
        """
        answer: Future[Message] = Future()
        with self._lock:
            self._last += 1
            number = self._last
            self._open[number] = answer
            gone = self._gone
        try:
            if gone:
                raise ServerError(f"{self._whose} is gone")
            self._channel.send({**fields, "id": number, "do": do})
            return answer.result(seconds)
        except TimeoutError as error:
            raise ServerError(f"{self._whose} did not answer within {seconds:g} s") from error
        except OSError as error:
            raise ServerError(f"{self._whose} is gone ({reason_of(error)})") from error
        finally:
            with self._lock:
                self._open.pop(number, None)

    def _listen(self) -> None:
        while (message := self._channel.receive()) is not None:
            with self._lock:
                answer = self._open.pop(message["id"], None) if "id" in message else self.greeting
            if answer is not None:  # else nobody waits for it any more
                settle(answer, message)
        with self._lock:
            self._gone = True
            waiting = [*self._open.values(), self.greeting]
            self._open.clear()
        for answer in waiting:
            if not answer.done():
                answer.set_exception(ServerError(f"{self._whose} ended before it answered"))
        self._on_gone()


def settle(answer: Future[Message], message: Message) -> None:
    """Set the result of a future, or the error that the message is."""
    if "error" in message:
        answer.set_exception(error_from(message["error"]))
    else:
        answer.set_result(message)


def error_message(error: Exception) -> Message:
    """Return a message that stands for an error; ``error_from`` makes it one again."""
    if isinstance(error, IvdrError):
        kind, text, hint = type(error).__name__, error.message, error.hint
    else:
        kind, text, hint = ServerError.__name__, f"unexpected {type(error).__name__}: {reason_of(error)}", ""
    return {"error": {"kind": kind, "message": text, "hint": hint}}


def error_from(said: Message) -> IvdrError:
    """Return the error that another process of ours met."""
    kind = getattr(errors, str(said["kind"]), ServerError)
    if not (isinstance(kind, type) and issubclass(kind, IvdrError)):
        kind = ServerError
    return kind(str(said["message"]), hint=str(said["hint"]))
