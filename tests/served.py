"""What the tests of the running endpoint share: its settings, and looking at its processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from ivdr_deploy.errors import ServerError
from ivdr_deploy.serving.core.settings import ENDPOINT_LIMITS, ServiceSettings
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
