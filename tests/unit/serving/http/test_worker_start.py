"""Starting a worker where the system has nothing left to give."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ivdr_deploy.errors import ServerError
from ivdr_deploy.serving.http.settings import HttpSettings
from ivdr_deploy.serving.http.worker_process import Launch, WorkerProcess


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Let this process open so many files more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    try:
        with suppress(OSError):
            while True:
                held.append(os.dup(0))
        for _ in range(count):
            os.close(held.pop())
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("count", [0, 2, 4, 6])
def test_without_descriptors_no_worker_starts_and_that_may_pass(tmp_path: Path, count: int) -> None:
    """What looks after workers tries again after a ``ServerError``; anything else would end all of them."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        launch = Launch(bundle=tmp_path, settings=HttpSettings(), token=None, listening=listening)
        with descriptors_left(count), pytest.raises(ServerError, match=r"cannot be made|can be started"):
            WorkerProcess(launch, "worker 1", on_news=lambda: None)
