"""What the tests of the running endpoint share: its settings, and looking at its processes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psutil
import pytest

from ivdr_deploy.errors import ServerError
from ivdr_deploy.serving.client import EndpointClient
from ivdr_deploy.serving.core.settings import ENDPOINT_LIMITS, ServiceSettings
from ivdr_deploy.serving.http.server import HttpServer
from ivdr_deploy.serving.http.settings import HttpSettings
from ivdr_deploy.serving.torchserve.config import Ports
from ivdr_deploy.serving.torchserve.settings import EndpointSettings

SETTINGS = EndpointSettings(
    batch_size=4,
    max_batch_delay_ms=150,
    queue_size=8,
    service=ServiceSettings(
        threads=1, device="cpu", limits=replace(ENDPOINT_LIMITS, max_bytes=2_000_000, max_frames=100)
    ),
)


DEAD = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def wait_for(condition: Callable[[], Any], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits to be collected."""
    try:
        return psutil.Process(pid).status() in DEAD
    except psutil.NoSuchProcess:
        return True


def processes_using(run_dir: Path) -> list[psutil.Process]:
    """The processes that were started for this run folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("TMPDIR", "").startswith(
                str(run_dir)
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def unused_ports_in_a_row() -> Ports:
    """Find ports that nobody listens on. Several processes run tests: each looks in a range of its own.

    What is free now is bound seconds later, so that two which looked in one range could find the same.
    """
    lane = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    begin = os.getpid() % 300 * 5
    for first in (20_000 + 1_500 * lane + (begin + step) % 1_500 for step in range(0, 1_500, 5)):
        ports = Ports.starting_at(first)
        with suppress(ServerError):
            ports.check()
            return ports
    pytest.fail("no five unused ports in a row")


def ask(
    client: EndpointClient,
    method: str,
    query: str = "",
    body: bytes | None = None,
    *,
    path: str = "/predictions/tiny",
    **headers: str,
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Send any HTTP request; returns status, body and headers."""
    with closing(HTTPConnection(urlsplit(client.inference_url).netloc, timeout=60)) as connection:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, f"{path}{query}", body=body, headers=named)
        answer = connection.getresponse()
        text = answer.read()
        return (
            answer.status,
            json.loads(text) if text else {},
            {name.lower(): value for name, value in answer.getheaders()},
        )


@contextmanager
def running_http(
    bundle: Path, settings: HttpSettings, *, grpc_port: int | None = None, token: str | None = None
) -> Iterator[HttpServer]:
    """Run the HTTP server in this process, on ports that are free."""
    with HttpServer(bundle, settings, port=0, grpc_port=grpc_port, token=token) as running:
        running.start()
        yield running
        running.stop()
        assert running.wait(60)


def announced(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for `ivdr serve --json` to say that it is ready; return what it says."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        with suppress(ValueError):  # not all of it yet
            return dict(json.loads(text))
    pytest.fail("it ended without a word")


def client_of(process: subprocess.Popen[str]) -> EndpointClient:
    """Wait for `ivdr serve --json` to print its addresses; return a client of what it serves."""
    said = announced(process)
    return EndpointClient(
        model=said["name"],
        inference_url=said["url"].partition("/predictions")[0],
        management_url=said["management_url"],
        metrics_url=said["metrics_url"],
    )


@contextmanager
def serving_command(bundle: Path, run_dir: Path, *options: str) -> Iterator[ServingCommand]:
    """`ivdr serve --server http` in a process of its own, ready; killed when the block ends, if it still runs."""
    code = "from ivdr_deploy.cli import main; main()"
    command = [sys.executable, "-P", "-c", code, "serve", str(bundle), "--server", "http", "--json"]
    command += ["--port", "0", "--run-dir", str(run_dir), *options]
    log = run_dir.with_suffix(".log")
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            yield ServingCommand(process, client_of(process), run_dir, log)
        finally:
            process.kill()


@dataclass(frozen=True, slots=True)
class ServingCommand:
    """A running `ivdr serve --server http`."""

    process: subprocess.Popen[str]
    client: EndpointClient
    run_dir: Path
    log: Path

    @property
    def workers(self) -> list[psutil.Process]:
        """The processes that hold HTTP and the network, of all versions."""
        return psutil.Process(self.process.pid).children()

    @property
    def version(self) -> str:
        """The version that the management port says is served."""
        return str(self.client.describe()["modelVersion"])

    def order(self, *options: str | Path) -> subprocess.CompletedProcess[str]:
        """Run `ivdr serve` with `--update` or `--rollback` against it."""
        code = "from ivdr_deploy.cli import main; main()"
        command = [
            sys.executable,
            "-P",
            "-c",
            code,
            "serve",
            "--run-dir",
            str(self.run_dir),
            *map(str, options),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)


class Answered(NamedTuple):
    """A request that was answered."""

    begun: float
    ended: float
    status: int
    body: dict[str, Any]


class Senders:
    """Threads that send a video again and again, and note what came back. A context manager.

    Args:
        client: Of the server.
        video: What is sent.
        options: With it.
        threads: How many.
    """

    def __init__(
        self, client: EndpointClient, video: Path, *, threads: int, options: dict[str, Any] | None = None
    ) -> None:
        self._client, self._video, self._options = client, video.read_bytes(), options
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(threads)]
        self.answers: list[Answered] = []

        self.lost: list[str] = []
        """Of each that was not: why."""

    def __enter__(self) -> Senders:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def wait_for_more(self, count: int, *, seconds: float = 60.0) -> None:
        """Wait until so many more have been answered."""
        have = len(self.answers)
        wait_for(lambda: len(self.answers) >= have + count, seconds=seconds)

    def longest_gap(self) -> float:
        """The longest time in which nothing was answered 200."""
        times = sorted(each.ended for each in self.answers if each.status == 200)
        return max(after - before for before, after in itertools.pairwise(times))

    def _send(self) -> None:
        while not self._stopping.is_set():
            begun = time.monotonic()
            try:
                status, body = self._client.predict(self._video, options=self._options)
            except ServerError as error:
                self.lost.append(str(error))
            else:
                self.answers.append(Answered(begun, time.monotonic(), status, body))
