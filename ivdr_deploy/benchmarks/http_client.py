"""HTTP/1.1 as lean as Python has it, so that a load generator measures the server and not itself.

On a core of a Xeon at 2.8 GHz httptools reads an answer of the endpoint in 5 us; h11, which the comfortable clients are
built on, takes 120 to 170. A whole request to a server that answers at once takes this client and that server together
90 to 130.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ivdr_deploy._optional import require
from ivdr_deploy._text import quoted
from ivdr_deploy.errors import ConfigError

MOST_CONNECTIONS = 512
"""Open at a time. Requests beyond them wait here, and the wait counts: their latency began when they were due."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where requests go."""

    host: str
    port: int
    path: str
    """With the query."""

    tls: bool = False

    @classmethod
    def of(cls, url: str) -> Address:
        """Take a URL apart.

        Raises:
            ConfigError: if it is not one of HTTP with a host and a path.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
            (host or "").encode("idna")  # as whoever looks it up will do
        except ValueError:  # a port that is none, or a host that no name can be
            host = port = None
        if not host or parts.scheme not in ("http", "https") or len(parts.path) < 2:
            raise ConfigError(
                f"{quoted(url)} is not the address of an endpoint",
                hint="give the one that `ivdr serve` prints, such as http://127.0.0.1:8080/predictions/NAME",
            )
        tls = parts.scheme == "https"
        path = f"{parts.path}?{parts.query}" if parts.query else parts.path
        return cls(host=host, port=port or (443 if tls else 80), path=path, tls=tls)

    def request(self, body: bytes, *, content_type: str, query: str = "", token: str = "") -> Request:
        """Make a POST of a body; ``query`` is added to the path, ``token`` is shown where there is one."""
        path = self.path + (("&" if "?" in self.path else "?") + query if query else "")
        host = f"[{self.host}]" if ":" in self.host else self.host
        head = f"POST {path} HTTP/1.1\r\nHost: {host}:{self.port}\r\nContent-Type: {content_type}\r\n"
        head += f"Authorization: Bearer {token}\r\n" if token else ""
        return Request(f"{head}Content-Length: {len(body)}\r\n\r\n".encode("latin-1", "replace"), body)


@dataclass(frozen=True, slots=True)
class Request:
    """One request, ready to be sent any number of times."""

    head: bytes
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    """Names in lower case."""

    body: bytes


class BrokenAnswerError(ConnectionError):
    """The connection ended, or spoke something else than HTTP, before the answer was whole."""

    def __init__(self, message: str, *, begun: bool) -> None:
        super().__init__(message)
        self.begun = begun
        """Whether some of the answer had come."""


class Connections:
    """Connections to one address that are kept and used again. A context manager of asyncio.

    Args:
        address: Where to.
        most: Open at a time.
    """

    def __init__(self, address: Address, *, most: int = MOST_CONNECTIONS) -> None:
        self.resent = 0
        """Requests sent once more: the server had closed a kept connection just when it was used again."""

        self._address = address
        self._parser = require("httptools", extra="load").HttpResponseParser
        self._tls = ssl.create_default_context() if address.tls else None
        self._places = asyncio.Semaphore(most)
        self._idle: list[_Connection] = []

    async def ask(self, request: Request) -> Answer:
        """Send a request and wait for its answer.

        Raises:
            OSError: if no connection can be made.
            BrokenAnswerError: if it ends before the answer is whole.
        """
        async with self._places:
            while True:
                connection, kept = await self._take()
                try:
                    answer = await connection.ask(request)
                except BrokenAnswerError as error:
                    if error.begun or not kept:
                        raise
                    self.resent += 1
                    continue
                except BaseException:
                    connection.close()
                    raise
                if connection.open:
                    self._idle.append(connection)
                return answer

    async def __aenter__(self) -> Connections:
        return self

    async def __aexit__(self, *exception: object) -> None:
        for connection in self._idle:
            connection.close()

    async def _take(self) -> tuple[_Connection, bool]:
        while self._idle:
            if (connection := self._idle.pop()).open:
                return connection, True
        address = self._address
        _, made = await asyncio.get_running_loop().create_connection(
            lambda: _Connection(self._parser), address.host, address.port, ssl=self._tls
        )
        return made, False


@dataclass(slots=True)
class _Arriving:
    """An answer on its way; its methods are what the parser calls."""

    done: asyncio.Future[Answer]
    parser: Any = None
    begun: bool = False
    keeps: bool = False
    """Whether the connection can be used again; the parser knows it only while it gives the end of the answer."""

    headers: dict[str, str] = field(default_factory=dict)
    body: list[bytes] = field(default_factory=list)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, part: bytes) -> None:
        self.body.append(part)

    def on_message_complete(self) -> None:
        status, self.keeps = self.parser.get_status_code(), self.parser.should_keep_alive()
        if status >= 200 and not self.done.done():  # 1xx: the answer itself is still to come
            self.done.set_result(Answer(status, self.headers, b"".join(self.body)))


class _Connection(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser
        self._transport: asyncio.Transport | None = None
        self._arriving: _Arriving | None = None

    @property
    def open(self) -> bool:
        """Whether it can be used again."""
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def ask(self, request: Request) -> Answer:
        """Send and wait; see ``Connections.ask``."""
        assert self._transport is not None
        arriving = _Arriving(asyncio.get_running_loop().create_future())
        arriving.parser = self._parser(arriving)
        self._arriving = arriving
        # Not joined: that would copy the video. What the socket does not take at once asyncio keeps.
        self._transport.write(request.head)
        self._transport.write(request.body)
        answer = await arriving.done
        self._arriving = None
        if not arriving.keeps:
            self.close()
        return answer

    def data_received(self, data: bytes) -> None:
        arriving = self._arriving
        if arriving is None:  # nobody asked
            self.close()
            return
        arriving.begun = True
        try:
            arriving.parser.feed_data(data)
        except Exception as error:  # noqa: BLE001  # httptools has a tree of its own; whatever it is, this is no HTTP
            self._fail(f"the answer is not HTTP ({type(error).__name__})")
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the connection ended before the answer was whole ({error or 'closed'})")

    def close(self) -> None:
        """Close it."""
        if self._transport is not None:
            self._transport.close()

    def _fail(self, reason: str) -> None:
        arriving = self._arriving
        if arriving is not None and not arriving.done.done():
            arriving.done.set_exception(BrokenAnswerError(reason, begun=arriving.begun))
