"""uvicorn on sockets that are open already, in a thread of its own; it leaves without cutting anybody off."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ivdr_deploy._text import reason_of
from ivdr_deploy.errors import ServerError
from ivdr_deploy.serving.http.connection import Connection
from ivdr_deploy.serving.http.requests import REQUEST_ID_HEADER, request_id
from ivdr_deploy.serving.http.standby import Handover

_LINGER_SECONDS = 1.0
"""That a connection which is open when the server leaves may take to send one more request; its answer says that the
connection ends. Without it, what a client has just sent on a connection of before would be lost."""

_LOOK_SECONDS = 0.02


class SharedSocket(socket.socket):
    """A socket that listens already, and from which other processes accept as well.

    It never waits: whether a call does is a property of the socket itself, which all processes share. ``dup`` of one
    that waits would let all of them wait, and a worker that comes too late for a connection would hang.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.setblocking(False)
        self.handover: Handover | None = None
        """Gets a duplicate of each connection, before anything is read from it."""

    def accept(self) -> tuple[socket.socket, Any]:
        """Take the next connection."""
        connection, address = super().accept()
        if self.handover is not None:
            self.handover.accepted(connection)
        return connection, address

    def listen(self, backlog: int = 0, /) -> None:
        """Leave the queue as whoever opened the socket made it."""


class Listening:
    """Answers requests on some sockets, from ``start`` until ``stop``.

    Args:
        app: What answers.
        sockets: Open, and closed when it leaves; others that accept from them go on.
        stop_seconds: Longest time that requests which were taken may need.
        patience_seconds: Longest time in which a client may send a request; see ``Connection``.
        headers: That every answer bears.
        handover: To the process that answers when this one is killed.
    """

    def __init__(
        self,
        app: ASGIApp,
        sockets: Sequence[SharedSocket],
        *,
        stop_seconds: int,
        patience_seconds: float,
        headers: dict[str, str] | None = None,
        handover: Handover | None = None,
    ) -> None:
        self._sockets: list[socket.socket] = list(sockets)
        self._outgoing = _Outgoing(app, headers or {})
        config = uvicorn.Config(
            self._outgoing,
            lifespan="off",
            http=cast(Any, partial(Connection, patience_seconds=patience_seconds, handover=handover)),
            ws="none",
            # The event loop accepts so many connections at a time. It would take all that wait, and refuse most of them
            # as too many, while another worker has nothing to do. Another loop might shorten the socket's queue to it.
            loop="asyncio",
            backlog=1,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=stop_seconds,
        )
        self._server = _Server(config, self._outgoing)
        self._ended = threading.Event()
        self._failure = "no reason is known"
        for held in sockets:
            # The connections inherit it. What is streamed goes in packets of its own, each of which would else wait for
            # the client's system to acknowledge the one before, which takes its time: 40 ms.
            held.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            held.handover = handover

    def start(self) -> None:
        """Begin to accept connections."""
        threading.Thread(target=self._run, name="http-server", daemon=True).start()

    def stop(self) -> None:
        """Accept no more connections, and let ``wait`` return when all requests that were taken are answered."""
        self._server.should_exit = True

    @property
    def closed(self) -> bool:
        """Whether it accepts no more connections."""
        return self._outgoing.leaving.is_set()

    def wait_closed(self) -> None:
        """Wait until it accepts no more connections, which it soon does after ``stop``."""
        self._outgoing.leaving.wait()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it has ended; False after ``seconds``. A signal's handler may interrupt it and it be called again.

        Raises:
            ServerError: if it ended by itself.
        """
        ended = self._ended.wait(seconds)
        if ended and not self._server.should_exit:
            raise ServerError(f"the server ended by itself ({self._failure})", hint="the log says more")
        return ended

    def _run(self) -> None:
        # Not joined as a thread: in Python 3.11 a join that is interrupted takes the thread for ended.
        try:
            self._server.run(sockets=self._sockets)
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {reason_of(error)}"
            raise
        finally:
            self._outgoing.leaving.set()
            self._ended.set()


class _Outgoing:
    """Puts headers on every answer: the name of the request, what the server says of itself, and that it leaves."""

    def __init__(self, app: ASGIApp, headers: dict[str, str]) -> None:
        self.leaving = threading.Event()
        self._app = app
        self._headers = [
            (name.lower().encode("latin-1"), value.encode("latin-1", "replace"))
            for name, value in headers.items()
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope["state"]["connection"].answering()
                ends = [(b"connection", b"close")] if self.leaving.is_set() else []
                name = (REQUEST_ID_HEADER.encode(), request_id(scope).encode())
                message = {**message, "headers": [*message.get("headers", ()), name, *self._headers, *ends]}
            await send(message)

        await self._app(scope, receive, sending)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, outgoing: _Outgoing) -> None:
        super().__init__(config)
        self._outgoing = outgoing

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse connections, wait for those that may have sent something already, then leave as uvicorn does."""
        for server in self.servers:
            server.close()
        self._outgoing.leaving.set()
        loop = asyncio.get_running_loop()
        until = loop.time() + _LINGER_SECONDS
        await asyncio.sleep(
            _LOOK_SECONDS
        )  # one that was accepted just now is not counted before the next turn
        while self.server_state.connections and loop.time() < until:
            await asyncio.sleep(_LOOK_SECONDS)
        await super().shutdown(sockets)
