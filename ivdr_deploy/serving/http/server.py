"""The server: its ports, its start and its end."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Self

import uvicorn

from ivdr_deploy.errors import ConfigError, ServerError
from ivdr_deploy.serving.client import EndpointClient
from ivdr_deploy.serving.core.service import InferenceService
from ivdr_deploy.serving.http.app import ByPort, admin_app, inference_app
from ivdr_deploy.serving.http.settings import MAX_SECONDS_PER_CLIP, HttpSettings

_LOOPBACK = "127.0.0.1"


class HttpServer:
    """Serves one bundle. A context manager that opens the ports and the model on entry.

    Args:
        bundle: Its folder.
        settings: What to do with it.
        host: Address of the inference port. Whoever reaches it is answered: nobody is asked who they are.
        port: Of inference; management and metrics have the next one, on this machine alone. 0 takes two that are free.
    """

    def __init__(
        self, bundle: Path, settings: HttpSettings, *, host: str = _LOOPBACK, port: int = 8080
    ) -> None:
        if not 0 <= port < 65535:
            raise ConfigError(f"port must be between 0 and 65534, found {port}")
        self.settings = settings
        self._bundle, self._host, self._port = bundle, host, port
        self._sockets: list[socket.socket] = []
        self._ended = threading.Event()
        self._failure = "no reason is known"

    def __enter__(self) -> Self:
        """Open the ports, then the model: golden clips and videos agree when this returns.

        Raises:
            ServerError: if a port is taken.
            ArtifactError: as ``InferenceService.open``, and its other errors.
        """
        try:
            self._sockets = [_listen(self._host, self._port, "inference")]
            following = self._port and self._port + 1
            self._sockets.append(_listen(_LOOPBACK, following, "management"))
            self.service = InferenceService.open(self._bundle, self.settings.service)
        except BaseException:
            self._close_sockets()
            raise
        self._canary = self.service.canary(
            every_seconds=self.settings.canary_seconds, seconds_per_clip=MAX_SECONDS_PER_CLIP
        )
        if self._canary is not None:
            self._canary.__enter__()
        inference, management = (held.getsockname()[1] for held in self._sockets)
        app = ByPort(
            {
                inference: inference_app(self.service, self.settings, self._canary),
                management: admin_app(self.service),
            }
        )
        address = f"http://{_LOOPBACK}:{management}"
        self.client = EndpointClient(
            model=self.service.model.name,
            inference_url=f"http://{self._host}:{inference}",
            management_url=address,
            metrics_url=address,
        )
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=self.settings.stop_seconds,
            )
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._close_sockets()
        if self._canary is not None:
            self._canary.__exit__(*exception)
        self.service.close()

    def start(self) -> None:
        """Begin to answer requests, in a thread of its own, until ``stop``."""
        threading.Thread(target=self._run, name="http-server", daemon=True).start()

    def stop(self) -> None:
        """Refuse new connections, and let ``wait`` return when all requests that were taken are answered."""
        self._server.should_exit = True

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
            self._failure = f"{type(error).__name__}: {str(error)[:200]}"
            raise
        finally:
            self._ended.set()

    def _close_sockets(self) -> None:
        for held in self._sockets:
            held.close()


def _listen(host: str, port: int, purpose: str) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:  # also a name that nobody knows
        raise ServerError(
            f"port {port} ({purpose}) of {host[:100]} cannot be used: {error.strerror}",
            hint="stop what listens there, or choose two other ports in a row with --port FIRST",
        ) from error
