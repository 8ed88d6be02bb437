"""The real TorchServe, started, watched and stopped."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from ivdr_deploy.errors import FolderError, ServerError
from ivdr_deploy.serving.client import EndpointClient
from ivdr_deploy.serving.torchserve import guard
from ivdr_deploy.serving.torchserve.archive import build_archive, open_archive
from ivdr_deploy.serving.torchserve.config import Ports, ServerConfig, take_run_folder
from ivdr_deploy.serving.torchserve.guard import POLL_SECONDS, end_group
from ivdr_deploy.serving.torchserve.logs import front_end_failure, last_words, read_log, worker_failure
from ivdr_deploy.serving.torchserve.settings import EndpointSettings

logger = logging.getLogger(__name__)

_SERVER_START_SECONDS = 60.0
"""For TorchServe itself, on top of the time its settings give a worker."""


class TorchServeProcess:
    """One TorchServe in a process group of its own. A context manager: started on entry, stopped on exit."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.client = EndpointClient(
            model=config.archive.manifest.name,
            inference_url=config.ports.url("inference"),
            management_url=config.ports.url("management"),
            metrics_url=config.ports.url("metrics"),
        )
        self.worker_facts: dict[str, Any] = {}
        """What a worker said about itself when it was ready; see ``InferenceService.describe``."""
        self._process: subprocess.Popen[bytes] | None = None
        self._held: int | None = None
        """Keeps other servers out of the run folder."""

    @property
    def url(self) -> str:
        """Where videos are sent."""
        return self.client.predict_url

    @property
    def command_line(self) -> str:
        """The line that starts the same server from a shell."""
        return self.config.shell_line(self.config.start_command())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until every worker is READY, which each is only when golden clips and videos agree.

        A worker is then asked what it has loaded.

        Raises:
            FolderError: if another TorchServe uses the run folder.
            ServerError: if a port is taken, TorchServe ends, or a worker cannot load the model; says why, as
                soon as it is known. Nothing is left running.
        """
        config = self.config
        if (pid := _running_server(config.temporary)) is not None:
            raise FolderError(
                f"a TorchServe (process {pid}) already uses the run folder {config.run_dir}",
                hint=f"stop it with: {config.shell_line(config.stop_command())}",
            )
        config.ports.check()
        self._held = take_run_folder(config.run_dir)
        try:
            self._start(config)
        except BaseException:
            self._end_group()
            raise

    def _start(self, config: ServerConfig) -> None:
        for folder in (config.temporary, config.logs):
            shutil.rmtree(folder, ignore_errors=True)
        config.write()
        environment = {**os.environ, **config.environment()}
        environment.pop("TS_CONFIG_FILE", None)  # it would take the place of the settings written here
        # What it prints is in its own rotated logs as well; only what Java says when it cannot go on is not.
        with (config.logs / "stderr.log").open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", guard.__file__, *config.start_command()],
                cwd=config.run_dir,
                env=environment,
                stdin=subprocess.PIPE,  # closed by the system when this process dies: the guard ends the others then
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # Ctrl-C must reach us alone, so that requests can be finished first
            )
        self._wait_until_ready(self._process)
        self._ask_worker()

    def watch(self) -> None:
        """Block while it runs.

        Raises:
            ServerError: when it ends without ``stop``.
        """
        assert self._process is not None
        self._process.wait()
        raise ServerError(
            f"TorchServe ended by itself: {self._last_words()}", hint=f"logs: {self.config.logs}"
        )

    def stop(self) -> None:
        """Let the requests that wait or run be answered, then stop it and everything it started.

        Raises:
            ServerError: if something had to be killed.
        """
        if self._process is None:
            return
        try:
            if self._process.poll() is None:
                self._drain(self._process)
                environment = {**os.environ, **self.config.environment()}
                subprocess.run(
                    self.config.stop_command(), env=environment, cwd=self.config.run_dir, capture_output=True
                )
        finally:
            killed = self._end_group()
        if killed:
            raise ServerError(f"{killed} processes of TorchServe did not end and were killed")

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _SERVER_START_SECONDS + self.config.archive.settings.startup_seconds
        where = f"logs: {self.config.logs}"
        while not self.client.ready():
            if process.poll() is not None:
                raise ServerError(f"TorchServe ended while it started: {self._last_words()}", hint=where)
            if self.client.lacks_model():
                reason = front_end_failure(read_log(self.config.logs / "ts_log.log"))
                raise ServerError(f"TorchServe cannot load {self.config.archive.path}: {reason}", hint=where)
            if "Retry worker:" in read_log(
                self.config.logs / "ts_log.log"
            ):  # it would go on trying for minutes
                self._end_group()  # all of the log is written once everything has ended
                cause = worker_failure(read_log(self.config.logs / "model_log.log"))
                raise ServerError(f"a worker could not load {self.client.model}: {cause}", hint=where)
            if time.monotonic() > deadline:
                raise ServerError(f"no worker of {self.client.model} was ready in time", hint=where)
            _wait(process, POLL_SECONDS)

    def _ask_worker(self) -> None:
        """Ask a worker what it has loaded, and hold it against what was packed; it must be one that was started here.

        A port that was free when it was looked at may be taken when TorchServe gets to it, by another one with the same
        model.
        """
        strangers = [
            worker["pid"] for worker in self.client.describe()["workers"] if not self._is_ours(worker)
        ]
        if strangers:
            raise ServerError(
                f"another server answers at {self.client.management_url}: it has the worker {str(strangers[0])[:20]}",
                hint="stop it, or choose five other ports in a row with --port FIRST",
            )
        facts = self.client.describe(ask_worker=True).get("customizedMetadata")
        archive = self.config.archive
        expected = {
            "contract_hash": archive.manifest.contract_hash,
            "variant": archive.settings.service.variant,
        }
        if not isinstance(facts, dict) or any(facts.get(name) != value for name, value in expected.items()):
            raise ServerError(f"the worker says {str(facts)[:200]}, expected {expected}")
        self.worker_facts = facts

    def _is_ours(self, worker: dict[str, Any]) -> bool:
        assert self._process is not None
        try:
            return os.getpgid(int(worker["pid"])) == self._process.pid
        except (KeyError, ValueError, OSError):
            return False

    def _drain(self, process: subprocess.Popen[bytes]) -> None:
        """Have every request answered that was accepted before now, which TorchServe would cut off.

        It accepts requests to its end; the workers refuse them: a question to a worker goes through the same queue, and
        when it is answered, all that waited before it has reached a worker; then admission is closed.
        """
        settings = self.config.archive.settings
        deadline = time.monotonic() + settings.response_timeout_seconds
        # Twice, further apart than a batch is collected: between queue and worker a request is not seen.
        pause, quiet = max(POLL_SECONDS, 2 * settings.max_batch_delay_ms / 1000.0), 0
        while not self._queue_passed() and time.monotonic() < deadline and process.poll() is None:
            _wait(process, POLL_SECONDS)
        self.config.drain_file.touch()
        while quiet < 2 and time.monotonic() < deadline and process.poll() is None:
            _wait(process, pause)
            try:
                quiet = quiet + 1 if self._is_idle() else 0
            except ServerError:  # it is ending already
                return
        if quiet < 2:
            logger.warning("stopping TorchServe although not every request has been answered")

    def _queue_passed(self) -> bool:
        """Wait at the end of the queue; False where it is full."""
        try:
            self.client.describe(ask_worker=True)
        except ServerError:
            return False
        return True

    def _is_idle(self) -> bool:
        described, metrics = self.client.describe(), self.client.metrics()
        workers = [f'ivdr_busy{{worker="{worker["pid"]}"' for worker in described["workers"]]
        return not any(value and name.startswith(tuple(workers)) for name, value in metrics.items())

    def _end_group(self) -> int:
        """End what is left of the process group; return how many processes had to be killed."""
        process, killed = self._process, 0
        if process is not None:
            killed = end_group(process.pid)
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
            self._process = None
            shutil.rmtree(self.config.temporary, ignore_errors=True)
            self.config.temporary.mkdir()  # the line for a shell needs it
        if self._held is not None:
            os.close(self._held)
            self._held = None
        return killed

    def _last_words(self) -> str:
        return last_words(read_log(self.config.logs / "stderr.log"))


def serve(source: Path, *, run_dir: Path, ports: Ports | None = None) -> TorchServeProcess:
    """Prepare a TorchServe for one archive or bundle; use the result in a ``with`` statement.

    Args:
        source: An archive (``.mar``), or a bundle, which is packed into ``run_dir`` first.
        run_dir: Folder for settings, logs and temporary files; made when absent.
        ports: Five that are unused when None.

    Raises:
        ArtifactError: if the archive or bundle cannot be used.
        ConfigError: if the run folder's path is too long.
        FolderError: if the run folder holds something else, or a bundle is to be packed into it while a server uses it.
    """
    source, run_dir = source.resolve(), run_dir.resolve()
    if source.is_dir():
        held = take_run_folder(run_dir)
        try:
            archive = build_archive(source, model_store=run_dir / "model_store", settings=EndpointSettings())
        finally:
            os.close(held)
    else:
        archive = open_archive(source)
    return TorchServeProcess(ServerConfig(archive=archive, run_dir=run_dir, ports=ports or Ports.unused()))


def _running_server(temporary: Path) -> int | None:
    """Return the process id of the TorchServe that uses this temporary folder, if it is alive."""
    try:
        pid = int((temporary / ".model_server.pid").read_text())
        return pid if "org.pytorch.serve.ModelServer" in psutil.Process(pid).cmdline() else None
    except (OSError, ValueError, psutil.Error):
        return None


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait for the next look, or until the process ends."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
