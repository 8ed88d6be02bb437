"""The Open Inference Protocol (KServe v2) over gRPC, beside the HTTP server and over the same service."""

from __future__ import annotations

import asyncio
import math
import threading
from concurrent.futures import Future
from contextlib import suppress

import grpc.aio

from ivdr_deploy._text import reason_of
from ivdr_deploy.errors import ServerError
from ivdr_deploy.serving.http.oip import TensorEndpoint
from ivdr_deploy.serving.http.oip_calls import handlers
from ivdr_deploy.serving.http.settings import HttpSettings

_BESIDE_VIDEOS = 8
"""Calls that are taken beside those with videos: whoever asks for health must get through."""


_BESIDE_SECONDS = 5.0
"""On top of what a client has for its request, for a connection on which nothing is asked."""


class GrpcListening:
    """Answers the protocol on a port, from ``start`` until ``stop``, in a thread of its own, as ``Listening`` HTTP.

    Args:
        endpoint: Answers.
        host: Address of the port.
        port: Of gRPC. Others of the same user may listen there too: the system deals connections out among them.
        settings: What is allowed.
        token: What whoever asks must show; None answers everyone.
    """

    def __init__(
        self, endpoint: TensorEndpoint, host: str, port: int, *, settings: HttpSettings, token: str | None
    ) -> None:
        self._host, self._port, self._settings = host, port, settings
        self._handlers = handlers(endpoint, token, seconds=settings.receive_seconds)
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._begun: Future[None] = Future()
        self._closed, self._ended = threading.Event(), threading.Event()
        self._failure = "no reason is known"

    def start(self) -> None:
        """Begin to accept connections.

        Raises:
            ServerError: if the port cannot be listened on.
        """
        threading.Thread(target=self._run, name="grpc-server", daemon=True).start()
        self._begun.result()

    def stop(self) -> None:
        """Refuse new calls, and let ``wait`` return when those that were taken are answered."""
        with suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._stopping.set)

    def wait_closed(self) -> None:
        """Wait until it accepts no more connections."""
        self._closed.wait()

    @property
    def closed(self) -> bool:
        """Whether it accepts no more connections."""
        return self._closed.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it has ended; False after ``seconds``.

        Raises:
            ServerError: if it ended by itself.
        """
        ended = self._ended.wait(seconds)
        if ended and not self._stopping.is_set():
            raise ServerError(f"gRPC ended by itself ({self._failure})", hint="the log says more")
        return ended

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {reason_of(error)}"
            if self._begun.done():
                raise
            self._begun.set_exception(error)
        finally:
            self._closed.set()
            self._ended.set()
            self._loop.close()

    async def _serve(self) -> None:
        patience_ms = math.ceil((self._settings.receive_seconds + _BESIDE_SECONDS) * 1000)
        server = grpc.aio.server(
            options=(
                # As over HTTP, a connection that asks nothing is ended: there is room for so many.
                ("grpc.server_handshake_timeout_ms", patience_ms),
                ("grpc.max_connection_idle_ms", patience_ms),
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", self._settings.service.max_request_bytes),
                ("grpc.max_send_message_length", -1),  # the answer has a limit of its own
                # Nothing compressed, as over HTTP: what a message unpacks to has no limit.
                ("grpc.compression_enabled_algorithms_bitset", 1 << grpc.Compression.NoCompression.value),
            ),
            maximum_concurrent_rpcs=self._settings.max_requests + _BESIDE_VIDEOS,
        )
        server.add_generic_rpc_handlers(self._handlers)
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            server.add_insecure_port(f"{host}:{self._port}")
        except RuntimeError as error:
            raise ServerError(f"port {self._port} (gRPC) of {self._host[:100]} cannot be used") from error
        await server.start()
        self._begun.set_result(None)
        await self._stopping.wait()
        leaving = asyncio.ensure_future(server.stop(self._settings.stop_seconds))
        await asyncio.sleep(0)  # it closes the port first, then waits
        self._closed.set()
        await leaving
