"""The service and its HTTP server in one process: ports, start and end. ``ivdr serve`` runs one in each worker."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from starlette.types import ASGIApp

from ivdr_deploy._optional import require
from ivdr_deploy.errors import ConfigError, ServerError
from ivdr_deploy.serving.client import EndpointClient
from ivdr_deploy.serving.core.metrics import exposition
from ivdr_deploy.serving.core.service import InferenceService
from ivdr_deploy.serving.http.admission import Admission
from ivdr_deploy.serving.http.app import ByPort, admin_app, inference_app
from ivdr_deploy.serving.http.auth import Guarded
from ivdr_deploy.serving.http.listening import Listening, SharedSocket
from ivdr_deploy.serving.http.oip import TensorEndpoint
from ivdr_deploy.serving.http.settings import MAX_SECONDS_PER_CLIP, HttpSettings
from ivdr_deploy.serving.http.standby import VERSION_HEADER, Handover

if TYPE_CHECKING:
    from ivdr_deploy.serving.http.oip_grpc import GrpcListening

LOOPBACK = "127.0.0.1"

_LOOK_SECONDS = 0.02
"""How often ``HttpServer.wait`` asks."""


class HttpServer:
    """Serves one bundle. A context manager that opens the ports and the model on entry.

    Args:
        bundle: Its folder.
        settings: What to do with it.
        host: Address of the inference port.
        port: Of inference; management and metrics have the next one, on this machine alone. 0 takes two that are free.
        grpc_port: Of the Open Inference Protocol over gRPC, at the same address; 0 takes a free one, None is none.
        token: What whoever asks must show; None answers everyone who reaches the port.
        inherited: A listening socket of the process that started this one, which then has the management port too;
            ``port`` is not looked at, and ``grpc_port`` is one that it has reserved.
        handover: To that process, which answers when this one is killed.
    """

    def __init__(
        self,
        bundle: Path,
        settings: HttpSettings,
        *,
        host: str = LOOPBACK,
        port: int = 8080,
        grpc_port: int | None = None,
        token: str | None = None,
        inherited: SharedSocket | None = None,
        handover: Handover | None = None,
    ) -> None:
        check_port(port)
        self.settings = settings
        self._bundle, self._host, self._port, self._token = bundle, host, port, token
        self._grpc_port, self._inherited, self._handover = grpc_port, inherited, handover
        self.admission = Admission(settings.max_requests)
        self._sockets: list[SharedSocket] = []
        self._reserved: socket.socket | None = None
        self._listening: list[Listening | GrpcListening] = []
        """Those that accept connections are the last; those before them answer what they have taken."""

    def __enter__(self) -> Self:
        """Open the ports, then the model: golden clips and videos agree when this returns.

        Raises:
            ServerError: if a port is taken.
            ArtifactError: as ``InferenceService.open``, and its other errors.
        """
        try:
            if self._inherited is not None:
                self._sockets = [self._inherited]
            else:
                self._sockets = open_ports(self._host, self._port)
                if self._grpc_port is not None:
                    self._reserved = reserve_grpc_port(self._host, self._grpc_port)
                    self._grpc_port = self._reserved.getsockname()[1]
            self.service = InferenceService.open(self._bundle, self.settings.service)
        except BaseException:
            self._close_sockets()
            raise
        self._canary = self.service.canary(
            every_seconds=self.settings.canary_seconds, seconds_per_clip=MAX_SECONDS_PER_CLIP
        )
        if self._canary is not None:
            self._canary.__enter__()
        ports = [held.getsockname()[1] for held in self._sockets]
        self.client = client_of(self.service.model.name, self._host, ports[0], ports[-1])
        return self

    def __exit__(self, *exception: object) -> None:
        self._close_sockets()
        if self._canary is not None:
            self._canary.__exit__(*exception)
        self.service.close()

    def start(self) -> None:
        """Begin to answer requests, in a thread of its own, until ``stop``; may be called again after that."""
        listening = Listening(
            self._applications(),  # new ones: they count what they have taken, in one loop of events each
            [held.dup() for held in self._sockets],
            stop_seconds=self.settings.stop_seconds,
            patience_seconds=self.settings.receive_seconds,
            headers={VERSION_HEADER: self.service.model.version},
            handover=self._handover,
        )
        self._listening = [earlier for earlier in self._listening if not earlier.wait(0)]
        self._listening.append(listening)
        listening.start()
        if self._grpc_port is not None:
            self._listening.append(self._grpc_listening(self._grpc_port))
            self._listening[-1].start()

    def pause(self) -> None:
        """Accept no more connections, but keep the ports and the model, so that ``start`` can be called again."""
        for listening in self._listening:
            listening.stop()
        for listening in self._listening:
            listening.wait_closed()

    def stop(self) -> None:
        """Refuse new connections, and let ``wait`` return when all requests that were taken are answered."""
        self._close_sockets()
        self.pause()

    @property
    def accepting(self) -> bool:
        """Whether connections are accepted."""
        return any(not listening.closed for listening in self._listening)

    @property
    def health(self) -> tuple[str, str]:
        """What is known about the network, and why; see ``canary.Health``."""
        return self._canary.said if self._canary is not None else ("ready", "")

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it has ended; False after ``seconds``. A signal's handler may interrupt it and it be called again.

        Raises:
            ServerError: if it ended by itself.
        """
        begun = time.monotonic()
        while True:
            # Every one is asked: one that has ended by itself raises, also while another goes on.
            ended = [listening.wait(0) for listening in self._listening]
            if all(ended) or (seconds is not None and time.monotonic() - begun >= seconds):
                return all(ended)
            time.sleep(_LOOK_SECONDS)

    @property
    def grpc_address(self) -> str | None:
        """Where gRPC is answered, as ``HOST:PORT``."""
        return grpc_address(self._host, self._grpc_port)

    @property
    def name(self) -> str:
        """Of the model."""
        return self.service.model.name

    def describe(self) -> dict[str, Any]:
        """Say what is loaded, in the form in which TorchServe does."""
        model = self.service.model
        return {
            "modelName": model.name,
            "modelVersion": model.version,
            "minWorkers": 1,
            "workers": [{"id": "0", "pid": os.getpid(), "status": "READY"}],
            "customizedMetadata": self.service.describe(),
        }

    def metrics(self) -> str:
        """Say what was counted, in Prometheus' text format."""
        return exposition(self.service.metrics.values())

    def _applications(self) -> ASGIApp:
        apps: list[ASGIApp] = [inference_app(self.service, self.settings, self._canary, self.admission)]
        if self._inherited is None:
            apps.append(admin_app(self))
        if self._token is not None:
            apps = [Guarded(app, self._token, self.service.refuse) for app in apps]
        if len(apps) == 1:
            return apps[0]
        return ByPort({held.getsockname()[1]: app for held, app in zip(self._sockets, apps, strict=True)})

    def _grpc_listening(self, port: int) -> GrpcListening:
        from ivdr_deploy.serving.http.oip_grpc import GrpcListening

        return GrpcListening(
            TensorEndpoint(self.service, self.admission, self._canary),
            self._host,
            port,
            settings=self.settings,
            token=self._token,
        )

    def _close_sockets(self) -> None:
        for held in self._sockets:
            held.close()
        if self._reserved is not None:
            self._reserved.close()


def check_port(port: int) -> None:
    """Refuse a number that leaves none for the management port.

    Raises:
        ConfigError: if it is one.
    """
    if not 0 <= port < 65535:
        raise ConfigError(f"port must be between 0 and 65534, found {port}")


def open_ports(host: str, port: int) -> list[SharedSocket]:
    """Listen on the inference port of an address, and on the next one of this machine alone.

    Args:
        host: Address of the inference port.
        port: 0 takes two that are free.

    Raises:
        ServerError: if one is taken.
    """
    sockets = [_listen(host, port, "inference")]
    try:
        return [*sockets, _listen(LOOPBACK, port and port + 1, "management")]
    except BaseException:
        sockets[0].close()
        raise


def reserve_grpc_port(host: str, port: int) -> socket.socket:
    """Take a port for gRPC without listening on it: each worker does that by itself.

    Args:
        host: Its address.
        port: 0 takes one that is free.

    Raises:
        MissingDependencyError: if what gRPC needs is not installed.
        ServerError: if somebody has the port.
        ConfigError: if it is none.
    """
    for package in ("grpc", "grpc_health.v1", "tritonclient.grpc"):
        require(package, extra="grpc")
    if not 0 <= port <= 65535:
        raise ConfigError(f"grpc_port must be between 0 and 65535, found {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    reserved = socket.socket(family, socket.SOCK_STREAM)
    try:
        if port:  # sharing it with another server that shares its own would get half of each other's calls
            with socket.socket(family, socket.SOCK_STREAM) as alone:
                alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                alone.bind((host, port))
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind((host, port))
    except OSError as error:
        reserved.close()
        raise ServerError(
            f"port {port} (gRPC) of {host[:100]} cannot be used: {error.strerror}",
            hint="stop what listens there, or choose another one with --grpc-port",
        ) from error
    return reserved


def grpc_address(host: str, port: int | None) -> str | None:
    """Return where gRPC is answered, as ``HOST:PORT``; None where it is not."""
    if port is None:
        return None
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def client_of(model: str, host: str, inference: int, management: int) -> EndpointClient:
    """Return a client of a server on this machine."""
    address = f"http://{LOOPBACK}:{management}"
    return EndpointClient(
        model=model,
        inference_url=f"http://{f'[{host}]' if ':' in host else host}:{inference}",
        management_url=address,
        metrics_url=address,
    )


def _listen(host: str, port: int, purpose: str) -> SharedSocket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:  # also a name that nobody knows
        raise ServerError(
            f"port {port} ({purpose}) of {host[:100]} cannot be used: {error.strerror}",
            hint="stop what listens there, or choose two other ports in a row with --port FIRST",
        ) from error
    return SharedSocket(fileno=listening.detach())
