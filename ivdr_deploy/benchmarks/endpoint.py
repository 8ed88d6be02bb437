"""Measures an endpoint: alone, under rates that are given, and up to the rate at which a bound on its p99 breaks."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import sqrt

from ivdr_deploy._text import quoted
from ivdr_deploy.benchmarks.http_client import Address, Request
from ivdr_deploy.benchmarks.load import LoadGenerator, Step
from ivdr_deploy.errors import ServerError

_LIMIT_CLIENTS = 16
_LIMIT_SECONDS = 0.3
_SHARE_OF_LIMIT = 0.5
"""Of what the generator itself reaches, up to which it is believed: beyond that it is a queue of its own."""

_CLOSE_ENOUGH = 1.1
"""A sweep ends when the rate that breaks is at most this many times the one that holds."""

_LEAST_REQUESTS = 100
"""Of each load of a sweep: of fewer the 99th percentile is the worst one."""

_BOUNDS = 20
"""Times the bound that a load of a sweep lasts: at 5 % more than an endpoint can do, its queue exceeds it then."""

_LEAST_SHARE = 1 / 16
"""Of the first rate of a sweep, below which it gives up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnLimit:
    """What the generator reaches by itself on this machine: against a server that answers at once, over loopback.

    That server shares the cores with it, as the one that is measured does where it is on this machine.
    """

    requests_per_s: float
    """With 16 clients."""

    alone: Step
    """One client."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """The rates that were tried, in their order, and what they showed."""

    steps: tuple[Step, ...]
    holds: Step | None
    """The highest rate that held the bound; None: not even the lowest did."""

    breaks: Step | None
    """The lowest rate that did not; None: the generator was at its limit before."""


@dataclass(kw_only=True, slots=True)
class EndpointSamples:
    """Everything that was measured."""

    url: str
    videos: int
    mean_bytes: float
    own: OwnLimit
    closed: Step
    steps: list[Step] = field(default_factory=list)
    """At rates that were given, or those of the sweep."""

    sweep: Sweep | None = None


def video_requests(url: str, videos: Sequence[bytes], *, token: str = "") -> list[Request]:
    """Make the requests that ask an endpoint for a label and for the time of its stages.

    They are the videos as they are, with ``timings`` in the query, where the endpoint takes that; TorchServe drops the
    query, and gets forms.

    Args:
        url: Where videos are sent.
        videos: The encoded bytes, at least one.
        token: That the endpoint asks for.

    Raises:
        ConfigError: if ``url`` is not an address.
        ServerError: if nobody answers, or the first video is refused.
    """
    address = Address.of(url)
    raw = [
        address.request(video, content_type="application/octet-stream", query="timings=true", token=token)
        for video in videos
    ]
    answer = LoadGenerator(address, raw).ask_once(raw[0])
    if answer.status != 200:
        raise ServerError(
            f"{url} answers {answer.status} to the first video: {quoted(answer.body[:200])}",
            hint="give videos that it answers with 200, and the address that `ivdr serve` prints",
        )
    with suppress(ValueError):
        if json.loads(answer.body).get("timings"):
            return raw
    border = secrets.token_hex(16)
    return [
        address.request(
            _form(video, border), content_type=f"multipart/form-data; boundary={border}", token=token
        )
        for video in videos
    ]


def own_limit(requests: Sequence[Request]) -> OwnLimit:
    """Measure the generator with the same requests.

    Raises:
        ServerError: if the server that answers at once does not start.
    """
    command = [sys.executable, "-P", "-m", "ivdr_deploy.benchmarks.echo_process"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as echo:
        assert echo.stdin is not None
        assert echo.stdout is not None
        try:
            port = echo.stdout.readline()
            if not port:
                raise ServerError("the server that the generator is measured with did not start")
            generator = LoadGenerator(Address(host="127.0.0.1", port=int(port), path="/echo"), requests)
            alone = generator.closed_loop(1, _LIMIT_SECONDS)
            many = generator.closed_loop(_LIMIT_CLIENTS, _LIMIT_SECONDS)
        finally:
            echo.stdin.close()
    return OwnLimit(requests_per_s=len(many.ok) / many.seconds, alone=alone)


def sweep(measure: Callable[[float], Step], *, first: float, most: float, p99_ms: float) -> Sweep:
    """Look for the highest rate that holds a bound: up by doubling until it breaks, then between the two.

    Args:
        measure: Puts a rate on the endpoint.
        first: Requests a second to begin with.
        most: That the generator can be believed up to.
        p99_ms: The bound; see ``Step.holds``.
    """
    steps: list[Step] = []
    holds: Step | None = None
    breaks: Step | None = None
    rate = min(first, most)
    while True:
        step = measure(rate)
        steps.append(step)
        if step.holds(p99_ms):
            holds = step
            if breaks is None and rate >= most:
                break
        else:
            breaks = step
        if breaks is None:
            rate = min(2 * rate, most)
        elif holds is None:
            rate /= 4
        else:
            assert breaks.rate is not None
            assert holds.rate is not None
            if breaks.rate / holds.rate <= _CLOSE_ENOUGH:
                break
            rate = sqrt(holds.rate * breaks.rate)
        if rate < first * _LEAST_SHARE:
            break
    return Sweep(steps=tuple(steps), holds=holds, breaks=breaks)


def measure_endpoint(
    url: str,
    videos: Sequence[bytes],
    *,
    rates: Sequence[float] = (),
    clients: int = 1,
    seconds: float = 10.0,
    p99_ms: float = 1000.0,
    token: str = "",
    tell: Callable[[str], None] = lambda said: None,
) -> EndpointSamples:
    """Measure an endpoint.

    Args:
        url: Where videos are sent.
        videos: The encoded bytes; they are sent in turns.
        rates: Requests a second of open loops; empty: a sweep looks for the one that the bound allows.
        clients: Of the closed loop that comes first.
        seconds: For which each load is put on. One of a sweep lasts longer where that is fewer than 100 requests or 20
            times the bound, and ends early when it has shown that the bound does not hold.
        p99_ms: The bound of the sweep.
        token: That the endpoint asks for.
        tell: Gets a line before each load, for a person who waits.

    Raises:
        ConfigError, ServerError: as ``video_requests``.
    """
    requests = video_requests(url, videos, token=token)
    generator = LoadGenerator(Address.of(url), requests)
    tell("the generator itself")
    own = own_limit(requests)
    tell(f"closed loop, {clients} clients")
    generator.closed_loop(
        clients, seconds, most=max(clients, len(requests))
    )  # caches and decoders are warm then
    found = EndpointSamples(
        url=url,
        videos=len(videos),
        mean_bytes=sum(map(len, videos)) / len(videos),
        own=own,
        closed=generator.closed_loop(clients, seconds),
    )

    def at(rate: float) -> Step:
        tell(f"open loop, {rate:.3g} requests/s")
        if rates:
            return generator.open_loop(rate, seconds)
        lasting = max(seconds, _LEAST_REQUESTS / rate, _BOUNDS * p99_ms / 1000.0)
        return generator.open_loop(rate, lasting, bound_ms=p99_ms)

    if rates:
        found.steps = [at(rate) for rate in rates]
        return found
    reached = len(found.closed.ok) / found.closed.seconds
    found.sweep = sweep(
        at,
        first=max(reached, 1 / found.closed.seconds) / 4,
        most=own.requests_per_s * _SHARE_OF_LIMIT,
        p99_ms=p99_ms,
    )
    found.steps = list(found.sweep.steps)
    return found


def _form(video: bytes, border: str) -> bytes:
    head = f'--{border}\r\nContent-Disposition: form-data; name="timings"\r\n\r\ntrue\r\n'
    head += f'--{border}\r\nContent-Disposition: form-data; name="video"; filename="video"\r\n'
    head += "Content-Type: application/octet-stream\r\n\r\n"
    return head.encode() + video + f"\r\n--{border}--\r\n".encode()
