"""Clients that send one video after another while something happens to the server, and keep a record of each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

RETRIED = frozenset({0, 429, 500, 503, 507})
"""What a client sends again after a while: no answer, a full queue, and what the servers say when a worker has died."""

_PAUSE_SECONDS, _LONGEST_PAUSE = 0.05, 1.0
_PATIENCE_SECONDS = 60.0
_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """One request over a connection of its own. Times are those of ``time.monotonic``."""

    sent: float | None
    """When all of it was handed to the system; None: there was no connection."""

    ended: float
    status: int
    """0: no whole answer."""

    version: str = ""
    """Of the model that answered, where the server says so."""


@dataclass(frozen=True, slots=True)
class Errand:
    """One video, with everything that was tried until it was answered or given up."""

    tries: tuple[Exchange, ...]

    @property
    def answered(self) -> bool:
        """Whether the last try was answered with 200."""
        return self.tries[-1].status == 200


def exchange(url: str, body: bytes) -> Exchange:
    """Send one video."""
    parts = urlsplit(url)
    sent, status, version = None, 0, ""
    try:
        with closing(HTTPConnection(parts.netloc, timeout=_TIMEOUT_SECONDS)) as connection:
            connection.request("POST", parts.path, body=body, headers={"Content-Type": "video/mp4"})
            sent = time.monotonic()
            answer = connection.getresponse()
            answer.read()
            status, version = answer.status, answer.headers.get("X-Model-Version", "")
    except (OSError, HTTPException):
        status = 0
    return Exchange(sent=sent, ended=time.monotonic(), status=status, version=version)


def run_errand(url: str, body: bytes, *, retry: bool) -> Errand:
    """Send a video, and again with longer and longer pauses where that may help."""
    tries, pause, begin = [exchange(url, body)], _PAUSE_SECONDS, time.monotonic()
    while retry and tries[-1].status in RETRIED and time.monotonic() - begin < _PATIENCE_SECONDS:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
        tries.append(exchange(url, body))
    return Errand(tuple(tries))


@contextmanager
def steady_traffic(
    url: str, body: bytes, *, clients: int, retry: bool, until_refused: bool = False
) -> Iterator[list[Errand]]:
    """Send steadily while the block runs; the list is complete when it has ended.

    Args:
        url: Where to.
        body: The video.
        clients: How many send at a time.
        retry: As in ``run_errand``.
        until_refused: A client that is not answered with 200 sends no more.
    """
    ending, done = threading.Event(), list[Errand]()

    def send() -> None:
        while not ending.is_set():
            errand = run_errand(url, body, retry=retry)
            done.append(errand)
            if until_refused and not errand.answered:
                return

    threads = [threading.Thread(target=send) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        ending.set()
        for thread in threads:
            thread.join()


def wait_until(condition: Callable[[], bool], *, seconds: float = 120.0) -> bool:
    """Wait for something; False if it does not happen in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
