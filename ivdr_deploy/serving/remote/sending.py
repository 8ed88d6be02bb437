"""What the client sends and gets, over httpx: an address that is one, an end to every wait, a bound to every answer."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ivdr_deploy._text import quoted
from ivdr_deploy.errors import ConfigError, ServerError

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 5.0

_LONGEST_WAIT_SECONDS = 1e6
"""Of one wait for the network: systems do not take any number."""

_PORTS = range(1, 65536)

_PIECE_BYTES = 1 << 16
"""Of a request that are sent before the clock is looked at again."""

_MOST_ANSWER_BYTES = 32 << 20
"""Of an answer. An endpoint gives half as many at most."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class Arriving:
    """An answer on its way.

    Args:
        answer: Its head is there.

    Raises:
        ServerError: if it is packed, or larger than any answer of an endpoint; also ``take``.
    """

    def __init__(self, answer: httpx.Response) -> None:
        packed = answer.headers.get("Content-Encoding", "identity").strip().lower()
        if packed != "identity":
            raise ServerError(f"the answer is packed with {quoted(packed)}, which was not asked for")
        self._answer = answer
        self._pieces: list[bytes] = []
        self._size = 0

    def take(self, piece: bytes) -> None:
        """Take some of its body."""
        self._size += len(piece)
        if self._size > _MOST_ANSWER_BYTES:
            raise ServerError(
                f"the answer has more than {_MOST_ANSWER_BYTES >> 20} MiB", hint="is it that of an endpoint?"
            )
        self._pieces.append(piece)

    def whole(self) -> Answer:
        """Return all of it."""
        return Answer(self._answer.status_code, self._answer.headers, b"".join(self._pieces))


class TimeLeft(dict[str, float]):
    """How long each kind of wait for the network may take, reckoned when it is asked for: until the deadline.

    httpx hands it through, and what is below takes from it as it goes from one step of a request to the next.
    """

    def __init__(self, end: float) -> None:
        super().__init__()
        self._end = end

    def get(self, kind: str, default: Any = None) -> float:
        """Return the seconds for a wait; connecting is quick or never."""
        left = wait_of(self._end - time.monotonic())
        return min(left, CONNECT_SECONDS) if kind == "connect" else left


def wait_of(seconds: float) -> float:
    """Return how long a wait for the network may take of which so much is left."""
    return min(max(seconds, 0.001), _LONGEST_WAIT_SECONDS)  # 0 would be: do not wait at all


def in_pieces(stream: Iterable[bytes], end: float) -> Iterator[bytes]:
    """Hand a request out piece by piece, until the deadline: a line that is slow takes each of them in time."""
    import httpx

    for part in stream:
        for start in range(0, len(part), _PIECE_BYTES):
            if time.monotonic() >= end:
                raise httpx.WriteTimeout("the request was not taken in time")
            yield part[start : start + _PIECE_BYTES]


def check_url(url: str) -> None:
    """Refuse what is no address of an endpoint, before anything is sent there or shown.

    Raises:
        ConfigError: if it is none.
    """
    import httpx

    try:
        urlsplit(url)  # httpx takes a bracket that is never closed
        found = httpx.URL(url)
        found.host.encode("idna")  # as it is looked up
    except (httpx.InvalidURL, ValueError):
        found = httpx.URL("")
    if found.userinfo:
        raise ConfigError(
            "the address of an endpoint holds a user name or password", hint='show a token with token="..."'
        )
    right = found.scheme in ("http", "https") and found.host and (found.port is None or found.port in _PORTS)
    if not right or found.query or found.fragment:
        raise ConfigError(
            f"the address of an endpoint is {quoted(url)}, expected http:// or https:// with a host and perhaps a port",
            hint="for example http://127.0.0.1:8080",
        )


def authorization(token: str | None) -> dict[str, str]:
    """Return the header that shows a token, if there is one.

    Raises:
        ConfigError: if it cannot be one. Refused here: what sends it would show it.
    """
    if token is None:
        return {}
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ConfigError(
            "the token is empty, or holds a blank, a line end or something else that is not visible ASCII",
            hint="strip what was read from a file",
        )
    return {"Authorization": f"Bearer {token}"}


def chosen_options(
    top_k: int | None, num_clips: int | None, outputs: Sequence[str] | None, timings: bool | None
) -> dict[str, Any]:
    """Return the options of a request as JSON has them, None for what was not chosen.

    Raises:
        ConfigError: if ``outputs`` is no list.
    """
    if isinstance(outputs, str):  # a sequence of letters otherwise
        raise ConfigError(
            f"outputs is {quoted(outputs)}, expected a list", hint=f"outputs=[{quoted(outputs)}]"
        )
    return {
        "top_k": top_k,
        "num_clips": num_clips,
        "outputs": None if outputs is None else list(outputs),
        "timings": timings,
    }
