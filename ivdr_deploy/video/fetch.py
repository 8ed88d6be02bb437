"""Fetches a video by URL: from the address that was checked, within a size and a time, and from nowhere else."""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import closing, contextmanager, suppress
from urllib.parse import urljoin

from ivdr_deploy import __version__
from ivdr_deploy.errors import FetchError, UrlError, VideoLimitError
from ivdr_deploy.video.urls import Target, UrlSettings, check_url, is_public

Resolve = Callable[[str, int], Sequence[str]]
"""Host and port -> its addresses."""

_REDIRECTS = (301, 302, 303, 307, 308)
_PIECE_BYTES = 1 << 16
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]+)[ \t]*(?:;[^\n]*)?\r?\n")
"""The line before a chunk, as RFC 9112 has it; what follows the ``;`` is passed over."""

_AGAIN = "check the URL, or send the video itself"


class Fetcher:
    """Fetches what URLs name. Safe to use from many threads.

    Every address of a host is checked, and the connection is made to one of those that were: what the name stands for a
    moment later does not matter. A redirect is checked like a URL of a request. No message holds a path or query.

    Args:
        settings: Which URLs.
        max_bytes: Size of a video.
        resolve: Looks up a host.
        may_connect: Whether an address may be asked.
    """

    def __init__(
        self,
        settings: UrlSettings,
        *,
        max_bytes: int,
        resolve: Resolve | None = None,
        may_connect: Callable[[str], bool] = is_public,
    ) -> None:
        self._settings, self._max_bytes = settings, max_bytes
        self._resolve = resolve or _resolve
        self._may_connect = may_connect

    def fetch(self, url: str) -> bytes:
        """Return what a URL names.

        Raises:
            UrlError: if it, or a redirect, is not one that may be asked.
            FetchError: if its server does not give it whole and in time.
            VideoLimitError: if it is larger than ``max_bytes``.
        """
        target = check_url(url, self._settings)
        deadline = time.monotonic() + self._settings.seconds
        for _ in range(self._settings.max_redirects + 1):
            found = self._ask(target, deadline)
            if isinstance(found, bytes):
                return found
            target = check_url(_followed(target, found), self._settings)
        raise UrlError(
            f"{target.shown[:100]}: there are more than {self._settings.max_redirects} redirects", hint=_AGAIN
        )

    def _ask(self, target: Target, deadline: float) -> bytes | str:
        """Return the body, or where it is said to be instead."""
        addresses = self._addresses(target, deadline)
        with _failing(target, deadline, self._settings.seconds), _Wire(deadline) as wire:
            wire.connect(addresses, target)
            with closing(http.client.HTTPConnection(target.host, target.port)) as connection:
                connection.sock = wire.sock
                connection.auto_open = 0  # it would look the host up again
                connection.response_class = _Answer
                connection.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
                for name, value in (
                    ("Host", target.authority),
                    ("User-Agent", f"ivdr_deploy/{__version__}"),
                    ("Accept-Encoding", "identity"),
                    ("Connection", "close"),
                ):
                    connection.putheader(name, value)
                connection.endheaders()
                with closing(connection.getresponse()) as answer:
                    location = answer.headers.get("location")
                    if answer.status in _REDIRECTS and location:
                        return location
                    body = self._body(answer, target)
            _check_time(deadline)  # a body without a length looks whole when the wire is cut
        return body

    def _addresses(self, target: Target, deadline: float) -> Sequence[str]:
        """Look a host up, and refuse it when any of its addresses may not be asked."""
        if target.address is not None:
            addresses: Sequence[str] = [target.address]
        else:
            with _failing(target, deadline, self._settings.seconds):
                addresses = _within(deadline, lambda: self._resolve(target.host, target.port))
        if not addresses or not all(map(self._may_connect, addresses)):
            # Which address it is stays here: it would tell what names inside this network stand for.
            raise UrlError(
                f"the host of {target.shown[:100]} has no address, or one that is not public", hint=_AGAIN
            )
        return addresses

    def _body(self, answer: http.client.HTTPResponse, target: Target) -> bytes:
        if answer.status != 200:
            raise FetchError(f"{target.shown[:100]} answered with status {answer.status}", hint=_AGAIN)
        if answer.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise FetchError(f"{target.shown[:100]} answered with an encoded body", hint=_AGAIN)
        declared = answer.length
        if declared is None and not answer.chunked and "content-length" in answer.headers:
            # Passed over, it would leave nothing to tell a body that was cut from a whole one.
            raise FetchError(f"{target.shown[:100]} answered with a length that is none", hint=_AGAIN)
        body, piece = bytearray(), memoryview(bytearray(_PIECE_BYTES))
        while (declared or 0) <= self._max_bytes and len(body) <= self._max_bytes:
            count = answer.readinto(piece)  # which holds no more than fits, whatever sizes the answer tells
            body += piece[:count]
            if not count:
                break
        if max(len(body), declared or 0) > self._max_bytes:
            raise VideoLimitError(
                f"the video at {target.shown[:100]} has more than {self._max_bytes} bytes, the limit",
                hint="send a smaller video, or raise max_bytes",
            )
        if declared is not None and len(body) < declared:
            raise FetchError(
                f"{target.shown[:100]} gave {len(body)} of {declared} bytes and ended", hint=_AGAIN
            )
        return bytes(body)


class _Answer(http.client.HTTPResponse):
    """An answer whose chunks have the sizes that are allowed: ``int`` would take ``-1`` and ``0x_1`` for one, too."""

    def _read_next_chunk_size(self) -> int:
        found = _CHUNK_SIZE.fullmatch(self.fp.readline(_PIECE_BYTES))
        if found is None:
            raise ValueError("no size of a chunk")
        return int(found[1], 16)


class _Wire:
    """One connection, which ends at the deadline whatever it is waiting for."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._timer = threading.Timer(max(0.0, deadline - time.monotonic()), self._end)
        self._timer.daemon = True
        self.sock: socket.socket | None = None

    def __enter__(self) -> _Wire:
        self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()
        if self.sock is not None:
            self.sock.close()

    def connect(self, addresses: Sequence[str], target: Target) -> None:
        """Connect to the first address that answers.

        Raises:
            OSError: if none does, or its certificate is not that of the host.
        """
        for place, address in enumerate(addresses, start=1):
            try:
                # An address, not a name: nothing is looked up.
                self.sock = socket.create_connection((address, target.port), timeout=_left(self._deadline))
                break
            except OSError:
                if place == len(addresses):
                    raise
        assert self.sock is not None
        _check_time(self._deadline)
        if target.scheme == "https":
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(
                self.sock, server_hostname=target.host, do_handshake_on_connect=False
            )
            _check_time(self._deadline)  # while it changed hands nobody could have ended it
            self.sock.do_handshake()

    def _end(self) -> None:
        """Wake whoever reads or writes: a server that sends a byte now and then would never run into a timeout."""
        if self.sock is not None:
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)


@contextmanager
def _failing(target: Target, deadline: float, seconds: float) -> Iterator[None]:
    """Turn what goes wrong on the way into an error that shows nothing of the URL but its host."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError, FutureTimeoutError) as error:
        if time.monotonic() >= deadline or isinstance(error, TimeoutError | FutureTimeoutError):
            raise FetchError(
                f"{target.shown[:100]} did not give the video within {seconds:g} s", hint=_AGAIN
            ) from None
        raise FetchError(
            f"{target.shown[:100]} cannot be asked ({type(error).__name__})", hint=_AGAIN
        ) from None  # its own words may hold the path


def _followed(target: Target, location: str) -> str:
    """Return where a redirect leads."""
    try:
        return urljoin(f"{target.shown}{target.path}", location)
    except ValueError:
        # Its words may be shown.
        raise UrlError(f"{target.shown[:100]} redirects to what is no URL", hint=_AGAIN) from None


def _check_time(deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise TimeoutError


def _left(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())


def _within(deadline: float, job: Callable[[], Sequence[str]]) -> Sequence[str]:
    """Do a job that cannot be interrupted, and wait no longer than allowed."""
    done: Future[Sequence[str]] = Future()

    def run() -> None:
        try:
            done.set_result(job())
        except BaseException as error:  # noqa: BLE001  # whoever waits gets it
            done.set_exception(error)

    threading.Thread(target=run, name="resolve", daemon=True).start()
    return done.result(_left(deadline))


def _resolve(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))
