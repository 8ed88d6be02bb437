"""A server whose service time is known, to measure a load generator with. A program: ``known_server.py MILLISECONDS``.

One worker answers in the order in which requests came, and each takes the same time. It uses no processor: an answer is
due at a time that follows from those before, and a machine that is late with one is not late with the next for it.
The answer says how long its turn took (``infer_ms``) and how late it was sent after that (``preprocess_ms``). The
status is 503 for a body that begins with ``refuse``, and there is no answer to one that begins with ``hang up``.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ivdr_deploy.benchmarks.http_client import Address


@contextmanager
def known_server(service_ms: float) -> Iterator[Address]:
    """Run it in a process of its own; gives its address."""
    command = [sys.executable, str(Path(__file__)), str(service_ms)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Address(host="127.0.0.1", port=int(process.stdout.readline()), path="/predictions/known")
        finally:
            process.stdin.close()


class _Worker:
    def __init__(self, service_ms: float) -> None:
        self._service = service_ms / 1000.0
        self._free = 0.0
        self._clock = asyncio.get_running_loop().time

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                writer.close()
                return
            length = int(head.lower().partition(b"content-length:")[2].split()[0])
            body = await reader.readexactly(length)
            if body.startswith(b"hang up"):
                writer.close()
                return
            self._free = due = max(self._clock(), self._free) + self._service
            await asyncio.sleep(due - self._clock())
            timings = {"decode_ms": 0.0, "preprocess_ms": (self._clock() - due) * 1000.0}
            said = json.dumps({"timings": {**timings, "infer_ms": self._service * 1000.0}}).encode()
            status = b"503 Service Unavailable" if body.startswith(b"refuse") else b"200 OK"
            writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(said), said))


async def _serve(service_ms: float) -> None:
    server = await asyncio.start_server(_Worker(service_ms).answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_serve(float(sys.argv[1])))
