"""One connection of a client as uvicorn speaks it, with an end to everybody's patience."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ivdr_deploy.serving.http.standby import ANSWERING, ASKED, IDLE, Handover

_MOST_HEAD_BYTES = 1 << 16
"""Of a request before its body, and behind it: lines that may follow a body in chunks. uvicorn would keep whatever
comes."""

_BESIDE_SECONDS = 5.0
"""On top of what a client has for its request, so that whoever reads it is the first to say that the time is up."""


class Connection(HttpToolsProtocol):
    """A connection whose client has to send a request, or to take its answer, in a certain time.

    Args:
        patience_seconds: For a request from its first byte to its last (for the first one: from the connection on),
            and to take an answer, or what there is of one that is still being made; then the connection is cut.
        handover: Is told how far it is; None where nobody would answer in its place.
        options: Of uvicorn.
    """

    def __init__(self, *, patience_seconds: float, handover: Handover | None, **options: Any) -> None:
        super().__init__(**options)
        self.app_state = {"connection": self}  # a copy is the ``state`` of each request
        self._patience = patience_seconds + _BESIDE_SECONDS
        self._handover = handover
        self._number = -1
        self._asking: asyncio.TimerHandle | None = None
        self._taking: asyncio.TimerHandle | None = None
        """Apart from the other: a client may send requests and take no answer."""

        self._beside_body = 0
        """Bytes that have come since a request began, its head was there, or something of its body came."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn
        """Begin."""
        self._number = transport.get_extra_info("socket").fileno()
        self._outgoing = _HeadWithBody(transport, self.loop, before=lambda: self._note(ANSWERING))
        super().connection_made(cast(asyncio.Transport, self._outgoing))
        self._wait_for_request()

    def data_received(self, data: bytes) -> None:
        """Take what the client sends."""
        if self._at_rest():
            self._note(ASKED)
        self._beside_body += len(data)
        super().data_received(data)
        if self._beside_body <= _MOST_HEAD_BYTES or self.transport.is_closing():
            return
        if self._at_rest():
            self.send_400_response("The head of the request is too large.")
        else:  # an answer is being made, and there would be two
            self.transport.abort()

    def on_message_begin(self) -> None:
        """Hear from the parser that a request begins."""
        super().on_message_begin()
        self._beside_body = 0
        self._wait_for_request()

    def on_headers_complete(self) -> None:
        """Hear that its head is there."""
        self._beside_body = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take something of its body."""
        self._beside_body = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Hear that all of it is there."""
        super().on_message_complete()
        self._beside_body = 0
        self._wait_no_longer()

    def answering(self) -> None:
        """Say that the head of an answer comes next."""
        self._outgoing.hold_next()

    def on_response_complete(self) -> None:
        """Hear that an answer has been written."""
        self._outgoing.let_go()
        self._wait_for_taking()
        if self._taking is None:
            self._note(ASKED if self.pipeline else IDLE)
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Hear that the client takes less than there is for it."""
        super().pause_writing()
        self._wait_for_taking()

    def resume_writing(self) -> None:
        """Hear that it has taken most of it: it has as long again for the rest."""
        super().resume_writing()
        self._wait_for_taking()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request."""
        self.answering()
        super().send_400_response(msg)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._wait_no_longer()
        self._take_no_longer()
        if self._handover is not None:
            self._handover.ended(self.transport.get_extra_info("socket"))
        super().connection_lost(exc)

    def _at_rest(self) -> bool:
        """Whether no request is being answered, and what was answered has gone out."""
        done = self.cycle is None or self.cycle.response_complete
        return done and not self.transport.get_write_buffer_size()

    def _note(self, state: int) -> None:
        if self._handover is not None:
            self._handover.note(self._number, state)

    def _wait_for_request(self) -> None:
        self._wait_no_longer()
        self._asking = self.loop.call_later(self._patience, self.transport.abort)

    def _wait_for_taking(self) -> None:
        self._take_no_longer()
        if self.transport.get_write_buffer_size():
            self._taking = self.loop.call_later(self._patience, self._cut_unless_taken)

    def _cut_unless_taken(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _wait_no_longer(self) -> None:
        if self._asking is not None:
            self._asking.cancel()

    def _take_no_longer(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None


class _HeadWithBody:
    """A transport that sends the head of an answer with what follows it: in one piece where that is there at once.

    A worker that is killed between the two would leave the client with half an answer, and nobody could say more.
    """

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, *, before: Callable[[], None]
    ) -> None:
        self._transport, self._loop, self._before = transport, loop, before
        self._holds_next = False
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def hold_next(self) -> None:
        """Keep what is written next until more is, or until there is something else to do."""
        self._holds_next = True

    def write(self, data: bytes) -> None:
        """Send, or keep."""
        if self._holds_next:
            self._holds_next, self._head = False, data
            self._loop.call_soon(self.let_go)
        elif self._head:
            self._head += data
            self.let_go()
        else:
            self._transport.write(data)

    def let_go(self) -> None:
        """Send what is kept."""
        if self._head:
            self._before()
            self._transport.write(self._head)
            self._head = b""

    def close(self) -> None:
        """Send what is kept, and end."""
        self.let_go()
        self._transport.close()
