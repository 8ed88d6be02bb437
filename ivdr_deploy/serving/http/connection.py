"""One connection of a client as uvicorn speaks it, with an end to everybody's patience."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ivdr_deploy.serving.http.standby import ANSWERING, ASKED, IDLE, Handover

_MOST_HEAD_BYTES = 1 << 16
"""Of a request before its body. uvicorn would keep whatever comes."""

_BESIDE_SECONDS = 5.0
"""On top of what a client has for its request, so that whoever reads it is the first to say that the time is up."""


class Connection(HttpToolsProtocol):
    """A connection whose client has to send a request, or to take its answer, in a certain time.

    Args:
        patience_seconds: For a request from its first byte to its last (for the first one: from the connection on),
            and to take an answer; then the connection is cut.
        handover: Is told how far it is; None where nobody would answer in its place.
        options: Of uvicorn.
    """

    def __init__(self, *, patience_seconds: float, handover: Handover | None, **options: Any) -> None:
        super().__init__(**options)
        self.app_state = {"connection": self}  # a copy is the ``state`` of each request
        self._patience = patience_seconds + _BESIDE_SECONDS
        self._handover = handover
        self._number = -1
        self._cut: asyncio.TimerHandle | None = None
        self._head_bytes: int | None = 0
        """Of the request that is coming; None when its head has come."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn
        """Begin."""
        self._number = transport.get_extra_info("socket").fileno()
        super().connection_made(transport)
        self._wait_for_client()

    def data_received(self, data: bytes) -> None:
        """Take what the client sends."""
        if self._at_rest():
            self._note(ASKED)
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if (self._head_bytes or 0) > _MOST_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")

    def on_message_begin(self) -> None:
        """Hear from the parser that a request begins."""
        super().on_message_begin()
        self._head_bytes = 0
        self._wait_for_client()

    def on_headers_complete(self) -> None:
        """Hear that its head is there."""
        self._head_bytes = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Hear that all of it is there."""
        super().on_message_complete()
        self._wait_no_longer()

    def answering(self) -> None:
        """Say that an answer begins to go out."""
        self._note(ANSWERING)

    def on_response_complete(self) -> None:
        """Hear that an answer has been written."""
        if self.transport.get_write_buffer_size():
            self._wait_for_client()
        else:
            self._note(ASKED if self.pipeline else IDLE)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request."""
        self.answering()
        super().send_400_response(msg)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._wait_no_longer()
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

    def _wait_for_client(self) -> None:
        self._wait_no_longer()
        self._cut = self.loop.call_later(self._patience, self.transport.abort)

    def _wait_no_longer(self) -> None:
        if self._cut is not None:
            self._cut.cancel()
            self._cut = None
