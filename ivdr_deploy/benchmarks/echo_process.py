"""A server that answers at once, in a process of its own: what the load generator reaches when nothing else works.

``load.own_limit`` starts it with ``python -P -m``; it prints its port and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from ivdr_deploy._optional import require

_ANSWER = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 17\r\n\r\n{"timings": null}'


class _Echo(asyncio.Protocol):
    def __init__(self) -> None:
        self._parser = require("httptools", extra="load").HttpRequestParser(self)
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """Answer; the parser calls it when the body is whole."""
        self._transport.write(_ANSWER)


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Echo, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_serve())
