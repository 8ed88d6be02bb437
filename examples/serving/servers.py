"""The two servers, each started by its command as anybody starts it, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from ivdr_deploy._files import scratch_folder
from ivdr_deploy.errors import ServerError
from ivdr_deploy.serving.client import EndpointClient
from ivdr_deploy.serving.core.settings import ServiceSettings
from ivdr_deploy.serving.torchserve.archive import build_archive
from ivdr_deploy.serving.torchserve.config import Ports
from ivdr_deploy.serving.torchserve.settings import EndpointSettings

ServerName = Literal["torchserve", "http"]
SERVERS: tuple[ServerName, ...] = ("torchserve", "http")

IVDR = (sys.executable, "-P", "-c", "from ivdr_deploy.cli import main; main()")
"""The command, as this environment has it."""

_STOP_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Served:
    """A server that is ready."""

    name: ServerName
    run_dir: Path
    client: EndpointClient
    process: subprocess.Popen[str]
    """Of ``ivdr serve``."""

    def processes(self) -> list[psutil.Process]:
        """Return all processes of it."""
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def workers(self) -> set[int]:
        """Return the process ids of those that hold the network; one that is being started is left out."""
        workers = self.client.describe()["workers"]
        return {int(worker["pid"]) for worker in workers if worker["status"] == "READY"}

    def memory(self) -> dict[int, tuple[str, int]]:
        """Return name and resident bytes of each process, by its id."""
        found = {}
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                found[process.pid] = (_spoken_name(process), process.memory_info().rss)
        return found


@contextmanager
def serving(
    name: ServerName,
    bundle: Path,
    scratch: Path,
    *,
    settings: EndpointSettings | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Served]:
    """Start a server and wait until it is ready; it is stopped at the end, if it still runs.

    Args:
        name: Which one.
        bundle: What it serves.
        scratch: Folder for archive, settings and log; a new one for each server.
        settings: Of TorchServe; both get its ``service`` and the number of workers.
        environment: Variables besides those of this process.

    Raises:
        ServerError: if it does not become ready, or does not end when it is told to.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    settings = settings or EndpointSettings(service=ServiceSettings(threads=1, device="cpu"))
    log = scratch / "server.log"
    # The sockets of both servers lie in their run folders, whose paths must be short.
    with ExitStack() as opened:
        run_dir = opened.enter_context(scratch_folder("ivdr-run-"))
        process = opened.enter_context(
            subprocess.Popen(
                [
                    *IVDR,
                    "serve",
                    "--json",
                    "--run-dir",
                    str(run_dir),
                    *_arguments(name, bundle, scratch, settings),
                ],
                stdout=subprocess.PIPE,
                stderr=opened.enter_context(log.open("w")),
                text=True,
                env={**os.environ, **(environment or {})},
            )
        )
        try:
            yield Served(name, run_dir, _client(process, log), process)
        finally:
            stop(process)


def _arguments(name: ServerName, bundle: Path, scratch: Path, settings: EndpointSettings) -> list[str]:
    if name == "torchserve":
        archive = build_archive(bundle, model_store=scratch / "store", settings=settings).path
        return [str(archive), "--port", str(_five_ports())]
    config, service = scratch / "serve.toml", settings.service
    config.write_text(f'[service]\nthreads = {service.threads}\ndevice = "{service.device}"\n')
    workers = ["--workers", str(settings.workers)]
    return [str(bundle), "--server", "http", "--port", "0", "--config", str(config), *workers]


def stop(process: subprocess.Popen[str]) -> int:
    """Tell a server to end, wait until it has, and return its exit code.

    Raises:
        ServerError: if it has to be killed.
    """
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired as error:
        process.kill()
        raise ServerError(f"the server did not end within {_STOP_SECONDS:g} s") from error


def _client(process: subprocess.Popen[str], log: Path) -> EndpointClient:
    """Wait until it prints its addresses."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        with suppress(ValueError):  # not all of it yet
            said = json.loads(text)
            return EndpointClient(
                model=said["name"],
                inference_url=said["url"].partition("/predictions")[0],
                management_url=said["management_url"],
                metrics_url=said["metrics_url"],
            )
    raise ServerError(f"the server did not start: {log.read_text(errors='replace')[-500:]}")


def _five_ports() -> int:
    """Return the first of five unused ports in a row; each process begins to look at another place."""
    begin = os.getpid() % 2_500 * 5
    for first in (20_000 + (begin + step) % 12_500 for step in range(0, 12_500, 5)):
        with suppress(ServerError):
            Ports.starting_at(first).check()
            return first
    raise ServerError("there are no five unused ports in a row")


def _spoken_name(process: psutil.Process) -> str:
    words = " ".join(process.cmdline())
    known = {
        "ModelServer": "java",
        "serving.http.worker": "worker",
        "model_service_worker": "worker",
        "forkserver": "decoder",
        "guard.py": "guard",
    }
    return next((name for part, name in known.items() if part in words), "serve")
