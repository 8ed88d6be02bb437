"""The load generator, held against queueing theory and servers that are known."""

from __future__ import annotations

import statistics

import pytest
from known_server import known_server

from ivdr_deploy.benchmarks.http_client import Address, Request
from ivdr_deploy.benchmarks.load import LoadGenerator, Sample, Step, poisson_arrivals
from ivdr_deploy.errors import ConfigError, ServerError

SERVICE_MS, LOAD = 40.0, 0.8
RATE = LOAD / SERVICE_MS * 1000.0
WAIT_MS = LOAD * SERVICE_MS / (2 * (1 - LOAD))
"""Mean time in the queue of an M/D/1 server: Poisson arrivals, one worker, a service time that is always the same."""

SECONDS, SEED = 12.0, 30
"""Arrivals whose own mean wait is near that of infinitely many: the mean of 240 alone would scatter by 40 %."""


def generator(address: Address, *bodies: bytes, **options: float) -> LoadGenerator:
    requests = [address.request(body, content_type="text/plain") for body in bodies or (b"x",)]
    return LoadGenerator(address, requests, **options)  # type: ignore[arg-type]


def mean_wait_ms(arrivals: list[float]) -> float:
    """What one worker makes of arrivals, by arithmetic."""
    free, waits = 0.0, []
    for arrival in arrivals:
        begin = max(arrival, free)
        waits.append((begin - arrival) * 1000.0)
        free = begin + SERVICE_MS / 1000.0
    return statistics.fmean(waits)


def test_arrivals_are_those_of_many_independent_callers() -> None:
    waits = [mean_wait_ms(poisson_arrivals(RATE, 100.0, seed=seed)) for seed in range(100)]
    assert statistics.fmean(waits) == pytest.approx(WAIT_MS, rel=0.05)
    assert mean_wait_ms([k / RATE for k in range(1000)]) == 0  # what regular arrivals would show
    assert mean_wait_ms(poisson_arrivals(RATE, SECONDS, seed=SEED)) == pytest.approx(WAIT_MS, rel=0.03)
    assert poisson_arrivals(RATE, 1.0) == poisson_arrivals(RATE, 1.0)
    assert len(poisson_arrivals(0.001, 1.0)) == 1


def test_the_open_loop_shows_the_queue_that_the_closed_loop_hides() -> None:
    """At 80 % load, against the formula.

    Where the machine was too late for it, which the samples tell, everything is done again more slowly; only then.
    """
    for slower in (1, 2, 4):
        service_ms, formula_ms = slower * SERVICE_MS, slower * WAIT_MS
        with known_server(service_ms) as address:
            step = generator(address).open_loop(RATE / slower, SECONDS * slower, seed=SEED)
            closed = generator(address).closed_loop(1, slower)
        assert step.outcomes == {"200": len(step.samples)}
        late_ms = statistics.fmean(sample.lag_ms + sample.stages["preprocess_ms"] for sample in step.samples)
        if late_ms < 0.08 * formula_ms:
            break
    else:
        pytest.fail(f"this machine is too busy: it wakes up {late_ms:.1f} ms late")
    wait_ms = statistics.fmean(sample.latency_ms for sample in step.samples) - service_ms
    assert wait_ms == pytest.approx(formula_ms, rel=0.15), f"late by {late_ms:.1f} ms"
    # One client after another finds nobody before it, though the server is busy all the time.
    hidden_ms = statistics.fmean(sample.latency_ms for sample in closed.samples) - service_ms
    assert hidden_ms < 0.2 * formula_ms
    assert len(closed.samples) / closed.seconds > RATE / slower


def test_a_request_that_cannot_be_sent_in_time_is_late_all_the_same() -> None:
    """Here for want of a connection: no coordinated omission."""
    with known_server(SERVICE_MS) as address:
        step = generator(address, most_connections=1).open_loop(2000 / SERVICE_MS, 0.6)
    count = len(step.samples)
    assert step.latency_ms(100) > 0.5 * (count * SERVICE_MS - 600.0) > 2 * SERVICE_MS


def test_what_is_not_answered_well_is_counted_and_counts_as_late() -> None:
    with known_server(1.0) as address:
        one_in_ten = [b"x"] * 9
        for bad, outcome in ((b"refuse", "503"), (b"hang up", "cut_off")):
            step = generator(address, *one_in_ten, bad).closed_loop(2, 30.0, most=100)
            assert step.outcomes == {"200": 90, outcome: 10}
            assert len(step.ok) == 90
            assert step.latency_ms(90) < 10_000
            assert not step.holds(10_000)
    step = generator(address).open_loop(50.0, 0.2)
    assert set(step.outcomes) == {"no_connection"}
    with pytest.raises(ServerError, match=f"no answer from 127.0.0.1:{address.port}"):
        generator(address).ask_once(address.request(b"x", content_type="text/plain"))


def test_a_request_without_an_answer_ends() -> None:
    with known_server(5000.0) as address:
        step = generator(address, timeout_seconds=0.2).closed_loop(1, 0.1)
    assert step.outcomes == {"timeout": 1}
    assert 200 <= step.samples[0].latency_ms < 5000


def test_a_connection_that_was_closed_while_it_was_kept_costs_no_request() -> None:
    with known_server(1.0) as address:
        step = generator(address, b"x", b"hang up").closed_loop(1, 30.0, most=4)
    # To the client it looks as if the kept connection had been closed before: it sends once more, on a new one.
    assert step.outcomes == {"200": 2, "cut_off": 2}
    assert step.resent == 2


def test_a_latency_begins_when_the_request_was_due() -> None:
    sample = Sample(due=1.0, sent=1.5, done=2.0, outcome="200", stages={})
    assert (sample.latency_ms, sample.lag_ms) == (1000.0, 500.0)


def test_a_bound_is_for_99_of_100_requests() -> None:
    def step(outcomes: list[str], slow: int) -> Step:
        samples = [
            Sample(due=0.0, sent=0.0, done=2.0 if k < slow else 0.1, outcome=outcome, stages={})
            for k, outcome in enumerate(outcomes)
        ]
        return Step(rate=1.0, clients=None, began=0.0, samples=tuple(samples))

    assert step(["200"] * 100, slow=1).holds(150)
    assert not step(["200"] * 100, slow=2).holds(150)
    assert step(["200"] * 99 + ["429"], slow=0).holds(150)
    assert not step(["200"] * 98 + ["429"] * 2, slow=0).holds(150)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8080/predictions/a", ("127.0.0.1", 8080, "/predictions/a", False)),
        ("https://[::1]/p?x=1", ("::1", 443, "/p?x=1", True)),
    ],
)
def test_an_address_is_taken_apart(url: str, expected: tuple[object, ...]) -> None:
    address = Address.of(url)
    assert (address.host, address.port, address.path, address.tls) == expected
    request = address.request(b"body", content_type="text/plain", query="timings=true")
    assert isinstance(request, Request)
    path = request.head.split()[1].decode()
    assert path == expected[2] + ("&" if "?" in expected[2] else "?") + "timings=true"  # type: ignore[operator]
    assert b"Content-Length: 4\r\n" in request.head


@pytest.mark.parametrize("url", ["", "127.0.0.1:8080", "ftp://x/y", "http://x", "http://x/", "http://x:y/z"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is not the address of an endpoint"):
        Address.of(url)
