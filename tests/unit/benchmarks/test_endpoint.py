"""The sweep, and what a measured endpoint is reported as."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from known_server import known_server
from rich.console import Console

from ivdr_deploy.benchmarks import endpoint
from ivdr_deploy.benchmarks.endpoint import (
    EndpointSamples,
    OwnLimit,
    measure_endpoint,
    own_limit,
    sweep,
    video_requests,
)
from ivdr_deploy.benchmarks.endpoint_report import endpoint_report, render_endpoint, verdict
from ivdr_deploy.benchmarks.http_client import Address
from ivdr_deploy.benchmarks.load import LoadGenerator, Sample, Step
from ivdr_deploy.benchmarks.report import write_report
from ivdr_deploy.errors import ServerError


def step_of(rate: float, capacity: float) -> Step:
    """What a server shows that holds 100 ms up to a rate."""
    seconds = 0.05 if rate <= capacity else 0.5
    sample = Sample(due=0.0, sent=0.0, done=seconds, outcome="200", stages={})
    return Step(rate=rate, clients=None, began=0.0, samples=(sample,))


@pytest.mark.parametrize("capacity", [2.0, 7.0, 100.0])
@pytest.mark.parametrize("first", [1.0, 20.0])
def test_a_sweep_finds_the_rate_at_which_the_bound_breaks(capacity: float, first: float) -> None:
    found = sweep(lambda rate: step_of(rate, capacity), first=first, most=1000.0, p99_ms=100.0)
    assert found.holds is not None
    assert found.breaks is not None
    assert found.holds.rate is not None
    assert found.breaks.rate is not None
    assert capacity / 1.1 <= found.holds.rate <= capacity < found.breaks.rate <= capacity * 1.1
    assert len(found.steps) <= 14
    assert found.holds in found.steps
    assert found.breaks in found.steps


def test_a_sweep_ends_at_the_generators_own_limit_and_where_nothing_holds() -> None:
    at_limit = sweep(lambda rate: step_of(rate, 1e9), first=1.0, most=50.0, p99_ms=100.0)
    assert at_limit.holds is not None
    assert (at_limit.holds.rate, at_limit.breaks) == (50.0, None)
    nothing = sweep(lambda rate: step_of(rate, 0.0), first=1.0, most=50.0, p99_ms=100.0)
    assert nothing.holds is None
    assert nothing.breaks is not None
    assert len(nothing.steps) <= 4


def test_a_sweep_is_believed_up_to_half_the_own_limit_and_its_loads_last_long_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of fewer than 100 requests the p99 is the worst one, and a queue needs 20 times the bound to show."""
    closed, asked = step_of(1.0, 1.0), []  # one client had an answer in 0.05 s: 20 a second
    own = OwnLimit(requests_per_s=100.0, alone=closed)

    def open_loop(self: LoadGenerator, rate: float, seconds: float, *, bound_ms: float) -> Step:
        asked.append((rate, seconds, bound_ms))
        return step_of(rate, 1e9)

    monkeypatch.setattr(endpoint, "video_requests", lambda url, videos, token: [])
    monkeypatch.setattr(endpoint, "own_limit", lambda requests: own)
    monkeypatch.setattr(LoadGenerator, "closed_loop", lambda *_, **__: closed)
    monkeypatch.setattr(LoadGenerator, "open_loop", open_loop)
    found = measure_endpoint("http://127.0.0.1:1/p", [b"x"], seconds=1.0, p99_ms=200.0)
    assert asked == [
        (pytest.approx(rate), pytest.approx(seconds), 200.0)
        for rate, seconds in ((5, 20), (10, 10), (20, 5), (40, 4), (50, 4))
    ]
    assert found.sweep is not None
    assert found.sweep.breaks is None


def test_the_own_limit_is_that_of_a_server_that_answers_at_once() -> None:
    address = Address(host="127.0.0.1", port=1, path="/x")
    own = own_limit([address.request(b"x" * 1000, content_type="text/plain")])
    assert own.requests_per_s > 50
    assert own.alone.outcomes == {"200": len(own.alone.samples)}
    assert min(sample.latency_ms for sample in own.alone.samples) < 20


def test_an_endpoint_is_measured_and_reported(tmp_path: Path) -> None:
    said: list[str] = []
    with known_server(2.0) as address:
        url = f"http://127.0.0.1:{address.port}{address.path}"
        for _ in range(
            5
        ):  # until the machine was not busy with something else when the lowest rates were tried
            said.clear()
            samples = measure_endpoint(
                url, [b"x", b"yyy"], seconds=0.4, p99_ms=60.0, clients=2, tell=said.append
            )
            if samples.sweep is not None and samples.sweep.holds is not None:
                break
    report = endpoint_report(samples, seconds=0.4, p99_ms=60.0)
    write_report(report, tmp_path / "report.json")
    assert (report["endpoint"], report["videos"], report["mean_bytes"]) == (url, 2, 2.0)
    assert report["environment"]["cpu"]
    assert report["closed_ms_p50"] > 2.0
    assert 0 < report["closed_answered_per_s"] <= 510  # one worker that takes 2 ms
    assert report["closed_infer_ms_p50"] == 2.0
    assert 0 < report["closed_wait_ms_p50"] < report["closed_ms_p50"] - 1.9
    assert 0 < report["holds_requests_per_s"] < 530
    assert report["holds_ms_p99"] <= 60.0
    assert report["limited_by"] == "the endpoint"
    for step in report["steps"]:  # what broke the bound ended early
        assert step["requests"] >= 80 or step["all_ms_p99"] > 60.0
    assert len(said) == 2 + len(report["steps"])
    assert "holds" in verdict(report)
    assert "p99 <= 60 ms" in verdict(report)

    console = Console(width=160, record=True)
    console.print(render_endpoint(report))
    text = console.export_text()
    assert "2 clients" in text
    assert "requests/s, p50" in text


def test_what_is_refused_is_seen_in_report_and_table() -> None:
    with known_server(1.0) as address:
        url = f"http://127.0.0.1:{address.port}{address.path}"
        samples = measure_endpoint(url, [b"x", b"refuse"], rates=[50.0, 80.0], seconds=0.4)
        with pytest.raises(ServerError, match="answers 503 to the first video"):
            video_requests(url, [b"refuse"])
    report = endpoint_report(samples, seconds=0.4, p99_ms=60.0)
    assert [step["rate"] for step in report["steps"]] == [50.0, 80.0]
    assert "bound_ms" not in report
    assert verdict(report) == ""
    step, _ = report["steps"]
    assert step["outcomes"]["503"] == pytest.approx(step["requests"] / 2, abs=1)
    assert step["all_ms_p99"] is None
    assert step["ms_p99"] < 1000
    console = Console(width=160, record=True)
    console.print(render_endpoint(report))
    assert f"503: {step['outcomes']['503']}" in console.export_text()


def test_a_rate_at_which_nothing_was_answered_is_a_failure() -> None:
    step = step_of(5.0, 10.0)
    refused = replace(step, rate=7.0, samples=(replace(step.samples[0], outcome="503"),))
    samples = EndpointSamples(
        url="http://x/y", videos=1, mean_bytes=1.0, own=OwnLimit(requests_per_s=1.0, alone=step), closed=step
    )
    samples.steps = [step, refused]
    assert verdict(endpoint_report(samples, seconds=1.0, p99_ms=1.0)) == (
        "FAIL: no request was answered with a 2xx at 7 requests/s"
    )


def test_videos_are_sent_as_they_are_where_the_query_is_taken() -> None:
    with known_server(1.0) as address:
        (request,) = video_requests(f"http://127.0.0.1:{address.port}/p", [b"video"])
        answer = LoadGenerator(address, [request]).ask_once(request)
    assert request.body == b"video"
    assert b"/p?timings=true " in request.head
    assert answer.status == 200
