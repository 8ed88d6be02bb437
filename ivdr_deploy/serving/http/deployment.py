"""What `ivdr serve --server http` runs: the ports, the workers behind them, and changing from one version to another.

This process opens the port and never answers on it: the workers accept from its socket. It restarts those that die,
adds up what they count for the management port, and takes orders at the control socket of its run folder.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from starlette.types import ASGIApp

from ivdr_deploy.environment import engine_threads
from ivdr_deploy.errors import ConfigError, ServerError
from ivdr_deploy.serving.core.answers import refusal
from ivdr_deploy.serving.core.metrics import METRICS, Metric, Series, added, exposition
from ivdr_deploy.serving.http.app import admin_app
from ivdr_deploy.serving.http.auth import Guarded, find_token
from ivdr_deploy.serving.http.channel import Message
from ivdr_deploy.serving.http.generation import Generation
from ivdr_deploy.serving.http.listening import Listening
from ivdr_deploy.serving.http.run_folder import Record, RunFolder, Say
from ivdr_deploy.serving.http.server import check_port, client_of, grpc_address, open_ports, reserve_grpc_port
from ivdr_deploy.serving.http.settings import HttpSettings
from ivdr_deploy.serving.http.shadow import check_replacement, compare_answers, described
from ivdr_deploy.serving.http.standby import most_connections
from ivdr_deploy.serving.http.worker_process import Launch

logger = logging.getLogger(__name__)

WORKERS = Metric(name="ivdr_workers", kind="gauge", unit="count", help="workers whose network answers right")
RESTARTS = Metric(
    name="ivdr_worker_restarts_total",
    kind="counter",
    unit="count",
    help="workers that followed one which had died, was stuck or answered wrong",
)

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
        self._lock = threading.Lock()
        self._changing = threading.Lock()
        self._closing = threading.Event()
        self._failed = threading.Event()
        self._failure = ""
        self._generations: list[Generation] = []
        self._current: Generation | None = None
        self._previous: Generation | None = None
        self._retired: dict[Series, float] = {}
        self._restarts = 0
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
            opened.callback(self._close)
            if self._grpc_port is not None:
                reserved = opened.enter_context(reserve_grpc_port(self._host, self._grpc_port))
                self._grpc_port = reserved.getsockname()[1]
            self.grpc_address = grpc_address(self._host, self._grpc_port)
            record = self._record()
            self._launch = Launch(
                bundle=Path(record.serving),
                settings=self._settings,
                token=token,
                listening=self._sockets[0],
                host=self._host,
                grpc_port=self._grpc_port,
                kept_connections=most_connections(self._settings.workers),
            )
            self._current = self._start(self._launch.bundle)
            self._current.serve()
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
        self._failed.wait()
        raise ServerError(self._failure, hint="the log says what happened to each worker")

    @property
    def current(self) -> Generation:
        """The version that answers."""
        assert self._current is not None
        return self._current

    @property
    def name(self) -> str:
        """Of the model."""
        name: str = self.current.facts["name"]
        return name

    def describe(self) -> dict[str, Any]:
        """Say what is loaded, in the form in which TorchServe does, and what ``--rollback`` would go back to."""
        previous = self._previous
        return {
            **self.current.describe(),
            "bundle": str(self.current.bundle),
            "previousVersion": previous.facts["version"] if previous is not None else None,
        }

    def metrics(self) -> str:
        """Say what all workers have counted, those that are gone included, in Prometheus' text format."""
        with self._lock:
            generations, retired, restarts = list(self._generations), self._retired, self._restarts
        found = added(retired, *(generation.counted() for generation in generations))
        restarts += sum(generation.restarts for generation in generations)
        found[Series(WORKERS.name, WORKERS)] = float(len(self.current.ready))
        found[Series(RESTARTS.name, RESTARTS)] = float(restarts)
        return exposition(found, metrics=(*METRICS, WORKERS, RESTARTS))

    def update(self, bundle: Path, videos: list[Path], *, min_agreement: float, say: Say) -> Message:
        """Bring up another bundle beside the one that serves, hold their answers against each other, and change over.

        Args:
            bundle: The other one.
            videos: What both answer for.
            min_agreement: Share of equal labels that is needed.
            say: Told how far it is; what it raises gives the update up.

        Returns:
            ``shadow``, the report, and ``switched``: whether the other one answers now.

        Raises:
            ServerError: if another change is under way.
            IvdrError: if it cannot be loaded, or is no replacement; the one that serves goes on.
        """
        if not videos:
            raise ConfigError(
                "there is no video to compare the two versions on", hint="name some with --videos"
            )
        with self._change():
            check_replacement(self.current.facts, described(bundle))
            say({"say": f"loading {bundle} beside {self.current.label}"})
            candidate = self._start(bundle)
            try:
                say({"say": f"comparing {candidate.label} with {self.current.label}"})
                seconds = float(self._settings.stop_seconds)
                shadow = compare_answers(
                    lambda video: self.current.predict(video, seconds=seconds),
                    lambda video: candidate.predict(video, seconds=seconds),
                    videos,
                    min_agreement=min_agreement,
                    on_done=lambda done: say({"done": done, "of": len(videos)}),
                )
                if shadow.passed:
                    self._switch(candidate)
            finally:
                if candidate is not self._current:
                    self._retire(candidate)
            return {"shadow": shadow.to_dict(), "switched": shadow.passed, "serving": self.current.label}

    def rollback(self, say: Say) -> Message:
        """Let the version before the last change answer again.

        Raises:
            ServerError: if there is none, or another change is under way.
            IvdrError: if it has to be loaded again, which it has to after a restart, and cannot be.
        """
        with self._change():
            previous = self._previous
            if previous is None:
                record = self.folder.read()
                if record is None or record.previous is None:
                    raise ServerError("there is no earlier version to go back to", hint="")
                say({"say": f"loading {record.previous}"})
                previous = self._start(Path(record.previous))
            try:
                self._switch(previous)
            finally:
                if previous is not self._current and previous is not self._previous:
                    self._retire(previous)
            return {"switched": True, "serving": self.current.label}

    def _obey(self, order: Message, say: Say) -> Message:
        """Do what was asked for at the control socket."""
        if order["do"] == "rollback":
            return self.rollback(say)
        videos = [Path(name) for name in order["videos"]]
        return self.update(Path(order["bundle"]), videos, min_agreement=order["min_agreement"], say=say)

    @contextmanager
    def _change(self) -> Iterator[None]:
        if not self._changing.acquire(blocking=False):
            raise ServerError("another change of version is under way", hint="wait for its end")
        try:
            yield
        finally:
            self._changing.release()

    def _record(self) -> Record:
        """Return what to serve: what was named, unless a server with the same name was updated here."""
        found, named = self.folder.read(), str(self._started_with)
        if found is None or found.started_with != named:
            return Record(started_with=named, serving=named)
        self.moved = found.serving != named
        return found

    def _start(self, bundle: Path) -> Generation:
        generation = Generation(replace(self._launch, bundle=bundle), on_given_up=self._given_up)
        with self._lock:
            if self._closing.is_set():
                raise ServerError("the server is stopping")
            self._generations.append(generation)
        try:
            generation.start()
        except BaseException:
            with self._lock:
                self._generations.remove(generation)
            raise
        return generation

    def _switch(self, new: Generation) -> None:
        """Let another version answer; the one before stays, loaded, for the way back."""
        old, before = self.current, self._previous
        new.serve()
        try:
            self.folder.write(
                Record(
                    started_with=str(self._started_with), serving=str(new.bundle), previous=str(old.bundle)
                )
            )
        except OSError:
            new.pause()
            raise
        self._current, self._previous = new, old
        old.pause()
        logger.warning("%s answers now, %s is kept", new.label, old.label)
        if before is not None and before is not new:
            self._retire(before)

    def _retire(self, generation: Generation) -> None:
        """End a version when it has answered what it had taken; what it counted stays."""

        def end() -> None:
            generation.close()
            generation.join()
            counted = generation.counted()
            with self._lock:
                if generation not in self._generations:  # it failed while it was being left
                    return
                self._generations.remove(generation)
                self._restarts += generation.restarts
                self._retired = added(self._retired, counted)

        threading.Thread(target=end, name="retire", daemon=True).start()

    def _given_up(self, generation: Generation, reason: str) -> None:
        """Hear that a version has no worker left; runs in the thread of one of its slots."""
        if generation is self._current:
            self._failure = reason
            self._failed.set()
        elif generation is self._previous:
            logger.error("%s is not kept any longer: %s", generation.label, reason)
            self._previous = None
            self._retire(generation)

    def _close(self) -> None:
        """Refuse connections and end all versions, each when it has answered what it had taken; once or twice."""
        with self._lock:
            self._closing.set()
            generations = list(self._generations)
        for generation in generations:
            generation.close()
        self._sockets[0].close()
        for generation in generations:
            generation.join()
        self._sockets[1].close()
