"""Puts load on an endpoint: requests at times that do not depend on the answers, or clients that wait for theirs.

Open loop: requests are due at random times of a given rate (Poisson arrivals), as those of many independent callers
are, and a latency begins when its request was due, whatever kept it from being sent. A server that falls behind is seen
to: no coordinated omission. Closed loop: each of N clients sends its next request when it has its answer. That is what
most tools do, and it hides the queue: a server that is slow is asked less often.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ivdr_deploy._text import reason_of
from ivdr_deploy.benchmarks.http_client import (
    MOST_CONNECTIONS,
    Address,
    Answer,
    BrokenAnswerError,
    Connections,
    Request,
)
from ivdr_deploy.benchmarks.timing import percentile
from ivdr_deploy.errors import ServerError

TIMEOUT_SECONDS = 60.0
"""For one request, from when it is sent."""

SEED = 0
"""Of the arrivals: the same ones in every run, so that two servers can be compared."""

STAGES = ("decode_ms", "preprocess_ms", "infer_ms")
"""What an answer says about itself when it is asked for ``timings``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One request and what became of it. Times are seconds of the event loop's clock."""

    due: float
    sent: float
    done: float
    outcome: str
    """The status of the answer, or why there is none: ``timeout``, ``no_connection``, ``cut_off``."""

    stages: Mapping[str, float]
    """Milliseconds by name, as the server measured them; empty where it does not say."""

    @property
    def ok(self) -> bool:
        """Whether it was answered with a 2xx."""
        return self.outcome.startswith("2")

    @property
    def latency_ms(self) -> float:
        """From when it was due to the end of its answer."""
        return (self.done - self.due) * 1000.0

    @property
    def lag_ms(self) -> float:
        """How late the generator itself was."""
        return (self.sent - self.due) * 1000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """All requests of one load."""

    rate: float | None
    """Requests a second that were due, in an open loop."""

    clients: int | None
    """Of a closed loop."""

    began: float
    """On the clock of the samples."""

    samples: tuple[Sample, ...]
    resent: int = 0
    """Requests that had to be sent twice; see ``Connections.resent``."""

    @property
    def ok(self) -> list[Sample]:
        """Those answered with a 2xx."""
        return [sample for sample in self.samples if sample.ok]

    @property
    def outcomes(self) -> dict[str, int]:
        """How many there are of each outcome."""
        return dict(sorted(Counter(sample.outcome for sample in self.samples).items()))

    @property
    def seconds(self) -> float:
        """From its beginning to the last answer."""
        return max(sample.done for sample in self.samples) - self.began

    def latency_ms(self, percent: float) -> float:
        """Return a percentile over all requests; one that was not answered with a 2xx counts as infinitely late."""
        return percentile([sample.latency_ms if sample.ok else math.inf for sample in self.samples], percent)

    def holds(self, p99_ms: float) -> bool:
        """Say whether 99 % of all requests were answered with a 2xx within a time."""
        return self.latency_ms(99) <= p99_ms


def poisson_arrivals(rate: float, seconds: float, *, seed: int = SEED) -> list[float]:
    """Return the times, from 0, at which requests of many independent callers are due.

    Args:
        rate: Requests a second.
        seconds: Until when; there is at least one.
        seed: The same gives the same.
    """
    random = np.random.default_rng(seed)
    times = itertools.accumulate(random.exponential(1.0 / rate) for _ in itertools.count())
    first = next(times)
    return [first, *itertools.takewhile(lambda time: time < seconds, times)]


class LoadGenerator:
    """Sends videos to one endpoint.

    Args:
        address: Where videos are sent.
        requests: What is sent, one after the other and again.
        timeout_seconds: For one request.
        most_connections: Open at a time.
    """

    def __init__(
        self,
        address: Address,
        requests: Sequence[Request],
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        most_connections: int = MOST_CONNECTIONS,
    ) -> None:
        self.address = address
        self._requests = requests
        self._timeout, self._most = timeout_seconds, most_connections

    def open_loop(
        self, rate: float, seconds: float, *, bound_ms: float | None = None, seed: int = SEED
    ) -> Step:
        """Send at Poisson arrivals, whatever the answers do; returns when all are answered.

        Args:
            rate: Requests a second.
            seconds: For which they come.
            bound_ms: As soon as more than 1 % of them are known to exceed it, no further ones are sent: see ``holds``.
            seed: Of the arrivals.
        """
        arrivals = poisson_arrivals(rate, seconds, seed=seed)
        within = math.inf if bound_ms is None else bound_ms

        async def run(connections: Connections) -> list[Sample]:
            clock = asyncio.get_running_loop().time
            start = clock()
            exceeding: list[Sample] = []
            samples: list[Sample] = []

            async def ask(request: Request, due: float) -> None:
                sample = await self._ask(connections, request, due=due)
                samples.append(sample)
                if not (sample.ok and sample.latency_ms <= within):
                    exceeding.append(sample)

            async with asyncio.TaskGroup() as group:
                for arrival, request in zip(arrivals, itertools.cycle(self._requests), strict=False):
                    await asyncio.sleep(max(0.0, start + arrival - clock()))
                    if bound_ms is not None and len(exceeding) > len(arrivals) // 100:
                        break
                    group.create_task(ask(request, start + arrival))
            return samples

        return self._step(run, rate=rate)

    def closed_loop(self, clients: int, seconds: float, *, most: int | None = None) -> Step:
        """Let each client send, wait for its answer, and send again.

        Args:
            clients: How many.
            seconds: After which no client sends again; each has sent at least once.
            most: Requests after which none is sent again, if that is earlier.
        """

        async def run(connections: Connections) -> list[Sample]:
            clock = asyncio.get_running_loop().time
            end = clock() + seconds
            left: Iterator[int] = iter(range(most)) if most is not None else itertools.count()
            samples: list[Sample] = []

            async def client() -> None:
                for number in left:
                    request = self._requests[number % len(self._requests)]
                    samples.append(await self._ask(connections, request, due=clock()))
                    if clock() >= end:
                        break

            async with asyncio.TaskGroup() as group:
                for _ in range(clients):
                    group.create_task(client())
            return samples

        return self._step(run, clients=clients)

    def ask_once(self, request: Request) -> Answer:
        """Send one request, as a try.

        Raises:
            ServerError: if there is no answer.
        """

        async def once() -> Answer:
            async with Connections(self.address) as connections, asyncio.timeout(self._timeout):
                return await connections.ask(request)

        try:
            return asyncio.run(once())
        except OSError as error:  # also TimeoutError and BrokenAnswerError
            where = f"{self.address.host}:{self.address.port}"
            raise ServerError(
                f"no answer from {where} ({reason_of(error) if str(error) else 'in time'})",
                hint="is the server running?",
            ) from error

    def _step(
        self,
        run: Callable[[Connections], Coroutine[Any, Any, list[Sample]]],
        *,
        rate: float | None = None,
        clients: int | None = None,
    ) -> Step:
        async def whole() -> Step:
            async with Connections(self.address, most=self._most) as connections:
                began = asyncio.get_running_loop().time()
                samples = tuple(await run(connections))
            return Step(rate=rate, clients=clients, began=began, samples=samples, resent=connections.resent)

        return asyncio.run(whole())

    async def _ask(self, connections: Connections, request: Request, *, due: float) -> Sample:
        clock = asyncio.get_running_loop().time
        sent = clock()
        stages: Mapping[str, float] = {}
        try:
            async with asyncio.timeout(self._timeout):
                answer = await connections.ask(request)
        except TimeoutError:
            outcome = "timeout"
        except BrokenAnswerError:
            outcome = "cut_off"
        except OSError:
            outcome = "no_connection"
        else:
            outcome, stages = str(answer.status), _stages(answer)
        return Sample(due=due, sent=sent, done=clock(), outcome=outcome, stages=stages)


def _stages(answer: Answer) -> Mapping[str, float]:
    if answer.status != 200:
        return {}
    try:
        found = json.loads(answer.body)["timings"]
        return {name: float(found[name]) for name in STAGES}
    except (ValueError, KeyError, TypeError):  # another server, or one that was not asked
        return {}
