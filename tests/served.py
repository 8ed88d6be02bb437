"""What the tests of the running endpoint share: its settings, and looking at its processes."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
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


def wait_for(condition: Callable[[], Any], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


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
    """Find ports that nobody listens on. Several processes run tests: each begins to look at another place."""
    begin = os.getpid() % 2_500 * 5
    for first in (20_000 + (begin + step) % 12_500 for step in range(0, 12_500, 5)):
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
def running_http(bundle: Path, settings: HttpSettings) -> Iterator[HttpServer]:
    """Run the HTTP server in this process, on ports that are free."""
    with HttpServer(bundle, settings, port=0) as running:
        running.start()
        yield running
        running.stop()
        assert running.wait(60)


def client_of(process: subprocess.Popen[str]) -> EndpointClient:
    """Wait for `ivdr serve --json` to print its addresses; return a client of what it serves."""
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
    pytest.fail("it ended without a word")
