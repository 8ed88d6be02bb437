"""What `ivdr serve --server http` runs: the ports, the workers behind them, and changing from one version to another.

This process opens the port and answers on it only for workers that have died: they accept from its socket. It restarts
them, adds up what they count for the management port, and takes orders at the control socket of its run folder.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

from starlette.types import ASGIApp

from ivdr_deploy._text import as_text
from ivdr_deploy.environment import engine_threads
from ivdr_deploy.errors import IvdrError, ServerError
from ivdr_deploy.serving.core.answers import refusal
from ivdr_deploy.serving.core.metrics import METRICS, exposition
from ivdr_deploy.serving.http.app import admin_app
from ivdr_deploy.serving.http.auth import Guarded, find_token
from ivdr_deploy.serving.http.channel import Message
from ivdr_deploy.serving.http.generation import Generation
from ivdr_deploy.serving.http.listening import Listening
from ivdr_deploy.serving.http.run_folder import Record, RunFolder, Say
from ivdr_deploy.serving.http.server import check_port, client_of, grpc_address, open_ports, reserve_grpc_port
from ivdr_deploy.serving.http.settings import HttpSettings
from ivdr_deploy.serving.http.standby import most_connections
from ivdr_deploy.serving.http.versions import RESTARTS, WORKERS, Versions
from ivdr_deploy.serving.http.worker_process import Launch

_MANAGEMENT_STOP_SECONDS = 5


class Deployment:
    """Serves one bundle with workers that are looked after. A context manager: it serves from entry to exit.

    Args:
        bundle: Its folder. When the run folder says that an update has replaced it, what replaced it is served.
        settings: What to do with it.
        host: Address of the inference port.
        port: Of inference; management and metrics have the next one, on this machine alone. 0 takes two that are free.
        run_dir: Folder of this server alone; made when absent.
        auth: Whether whoever asks must show the token.
        grpc_port: Of the Open Inference Protocol over gRPC; 0 takes a free one, None is none.
    """

    def __init__(
        self,
        bundle: Path,
        settings: HttpSettings,
        *,
        host: str,
        port: int,
        run_dir: Path,
        auth: bool,
        grpc_port: int | None = None,
    ) -> None:
        check_port(port)
        if settings.service.threads is None:  # the workers share the cores
            service = replace(settings.service, threads=engine_threads(settings.workers))
            settings = replace(settings, service=service)
        self._started_with, self._settings = bundle.resolve(), settings
        self._host, self._port, self._auth = host, port, auth
        self._grpc_port = grpc_port
        self.folder = RunFolder(run_dir)
        self._failed: SimpleQueue[str] = SimpleQueue()
        self.token_source: str | None = None
        """Where the token is from; None when nobody is asked for one."""

        self.moved = False
        """Whether an earlier update is why another bundle is served than the one that was named."""

    def __enter__(self) -> Self:
        """Open the ports and start the workers: it serves when this returns.

        Raises:
            FolderError: if another server uses the run folder.
            ServerError: if a port is taken.
            ArtifactError: as ``InferenceService.open``, and its other errors.
        """
        with ExitStack() as opened:
            opened.enter_context(self.folder)
            token = None
            if self._auth:
                token, self.token_source = find_token(self.folder.token_file)
            self._sockets = open_ports(self._host, self._port)
            opened.callback(self._close_ports)
            if self._grpc_port is not None:
                reserved = opened.enter_context(reserve_grpc_port(self._host, self._grpc_port))
                self._grpc_port = reserved.getsockname()[1]
            self.grpc_address = grpc_address(self._host, self._grpc_port)
            record = self._record()
            launch = Launch(
                bundle=Path(record.serving),
                settings=self._settings,
                token=token,
                listening=self._sockets[0],
                host=self._host,
                grpc_port=self._grpc_port,
                kept_connections=most_connections(self._settings.workers),
            )
            self._versions = Versions(launch, self.folder, record, on_failed=self._failed.put)
            opened.callback(self._close)
            self._begin(record)
            self.folder.write(record)
            ports = [held.getsockname()[1] for held in self._sockets]
            self.client = client_of(self.name, self._host, *ports)
            app: ASGIApp = admin_app(self)
            if token is not None:
                app = Guarded(app, token, refusal)
            management = Listening(
                app,
                [self._sockets[1].dup()],
                stop_seconds=_MANAGEMENT_STOP_SECONDS,
                patience_seconds=self._settings.receive_seconds,
            )
            management.start()
            opened.callback(management.wait)
            opened.callback(management.stop)
            self.folder.listen(self._obey)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        """Refuse new connections, answer what was taken, and end everything that was started."""
        self._close()
        self._opened.close()

    def wait(self) -> None:
        """Block while it serves.

        Raises:
            ServerError: when no worker can be kept running.
        """
        raise ServerError(self._failed.get(), hint="the log says what happened to each worker")

    @property
    def current(self) -> Generation:
        """The version that answers."""
        return self._versions.current

    @property
    def name(self) -> str:
        """Of the model."""
        name: str = self.current.facts["name"]
        return name

    def describe(self) -> dict[str, Any]:
        """Say what is loaded, in the form in which TorchServe does, and what ``--rollback`` would go back to."""
        previous = self._versions.previous
        return {
            **self.current.describe(),
            "bundle": as_text(str(self.current.bundle)),
            "previousVersion": previous.facts["version"] if previous is not None else None,
        }

    def metrics(self) -> str:
        """Say what all workers have counted, those that are gone included, in Prometheus' text format."""
        return exposition(self._versions.counted(), metrics=(*METRICS, WORKERS, RESTARTS))

    def _begin(self, record: Record) -> None:
        """Let the first version answer; where it is another than was named, an error says why it was taken."""
        try:
            self._versions.begin()
        except IvdrError as error:
            if self.moved:
                why = (
                    f"an update is why {record.serving} is taken: remove {self.folder.record_file} to serve "
                )
                error.hint = as_text(
                    f"{why}{record.started_with}" + (f"; {error.hint}" if error.hint else "")
                )
            raise

    def _obey(self, order: Message, say: Say) -> Message:
        """Do what was asked for at the control socket."""
        if order["do"] == "rollback":
            return self._versions.rollback(say)
        videos = [Path(name) for name in order["videos"]]
        return self._versions.update(
            Path(order["bundle"]), videos, min_agreement=order["min_agreement"], say=say
        )

    def _record(self) -> Record:
        """Return what to serve: what was named, unless a server with the same name was updated here."""
        found, named = self.folder.read(), str(self._started_with)
        if found is None or found.started_with != named:
            return Record(started_with=named, serving=named)
        self.moved = found.serving != named
        return found

    def _close(self) -> None:
        """Refuse connections and end all versions, each when it has answered what it had taken; once or twice."""
        self._versions.close()
        self._sockets[0].close()
        self._versions.join()

    def _close_ports(self) -> None:
        for held in self._sockets:
            held.close()
