"""Timelines and videos by URL through the real HTTP server."""

from __future__ import annotations

import http.server
import itertools
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from served import SETTINGS, ask, running_http, wait_for
from videos import numbered_video

from ivdr_deploy.serving.core.settings import ENDPOINT_LIMITS
from ivdr_deploy.serving.http.server import HttpServer
from ivdr_deploy.serving.http.settings import HttpSettings
from ivdr_deploy.video.fetch import Fetcher
from ivdr_deploy.video.urls import UrlSettings

SERVICE = replace(SETTINGS.service, limits=ENDPOINT_LIMITS, decode_workers=1, max_timelines=1)


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[HttpServer]:
    with running_http(tiny_bundle, HttpSettings(service=SERVICE, max_requests=2)) as running:
        yield running


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("long") / "a.mp4"
    return numbered_video(path, num_frames=1500, size=(64, 48), bframes=0).read_bytes()


@contextmanager
def begin(
    server: HttpServer, video: bytes, query: str = "?timeline=true", **headers: str
) -> Iterator[HTTPResponse]:
    """Ask for a stream of events; leaving the block goes away."""
    with closing(HTTPConnection(urlsplit(server.client.inference_url).netloc, timeout=60)) as connection:
        accept = {"Accept": "text/event-stream", **headers}
        connection.request("POST", f"/predictions/tiny{query}", body=video, headers=accept)
        with closing(connection.getresponse()) as answer:
            yield answer


def events_of(answer: HTTPResponse) -> Iterator[tuple[str, dict[str, Any]]]:
    """Take a stream apart, an event at a time as it comes."""
    lines: list[str] = []
    for line in answer:
        text = line.decode().rstrip("\n")
        if text:
            lines.append(text)
            continue
        kind, data = lines
        lines = []
        yield kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


@pytest.fixture
def go_on(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The network waits at its third call until this is set."""
    runtime = server.service.model.runtime._runtime  # type: ignore[attr-defined]
    infer, event, calls = runtime.infer, threading.Event(), itertools.count(1)

    def infers(video: np.ndarray) -> Any:
        assert next(calls) < 3 or event.wait(60)
        return infer(video)

    monkeypatch.setattr(runtime, "infer", infers)
    yield event
    event.set()


def counted(server: HttpServer, outcome: str) -> float:
    return server.client.metrics().get(f'ivdr_requests_total{{outcome="{outcome}"}}', 0.0)


def test_events_come_while_the_work_goes_on_and_a_summary_ends_them(
    server: HttpServer, long: bytes, caplog: pytest.LogCaptureFixture, go_on: threading.Event
) -> None:
    caplog.set_level(logging.INFO, "ivdr_deploy.access")
    with begin(server, long, "?timeline=true&top_k=2", **{"X-Request-Id": "mine"}) as answer:
        assert (answer.status, answer.getheader("content-type")) == (200, "text/event-stream; charset=utf-8")
        assert answer.getheader("x-request-id") == "mine"
        stream = events_of(answer)
        first = next(stream)
        assert (first[0], len(first[1]["predictions"])) == ("window", 2)
        assert server.client.metrics()["ivdr_busy"] == 1
        go_on.set()
        found = [first, *stream]
    assert found[-1][0] == "summary"
    assert found[-1][1]["video"]["num_frames"] == 1500
    assert found[-1][1]["windows"] == sum(kind == "window" for kind, _ in found) == 374
    status, whole, _ = ask(server.client, "POST", "?timeline=true", long)
    assert status == 200
    assert [w["start_seconds"] for w in whole["windows"]] == [
        v["start_seconds"] for k, v in found if k == "window"
    ]
    wait_for(lambda: "mine" in caplog.text)  # it is written when the last event is sent
    (line,) = [json.loads(record.message) for record in caplog.records if "mine" in record.message]
    assert (line["status"], line["code"]) == (200, "ok")


def test_what_fails_before_anything_was_found_has_a_status(server: HttpServer, long: bytes) -> None:
    for video, query, status, code in (
        (b"no video", "?timeline=true", 400, "unreadable"),
        (b"", "?timeline=true", 400, "bad_request"),
        (long, "?timeline=true&num_clips=3", 422, "bad_option"),
        (long, "?top_k=3", 422, "bad_option"),
    ):
        with begin(server, video, query) as answer:
            assert (answer.status, json.load(answer)["code"]) == (status, code)
            assert answer.getheader("content-type") == "application/json"


def test_an_error_in_the_middle_is_an_event(server: HttpServer, long: bytes) -> None:
    damaged = long[: len(long) // 2] + bytes(len(long) // 4) + long[len(long) * 3 // 4 :]
    with begin(server, damaged) as answer:
        found = list(events_of(answer))
    assert answer.status == 200
    assert found[0][0] == "window"
    kind, values = found[-1]
    assert (kind, values["code"], set(values)) == ("error", "decode_failed", {"code", "message", "hint"})


def test_a_client_that_goes_away_ends_the_work_and_frees_its_places(
    server: HttpServer, long: bytes, go_on: threading.Event
) -> None:
    before = counted(server, "client_gone")
    with begin(server, long, "?timeline=%7B%22hop%22:1%7D") as answer:
        assert next(events_of(answer))[0] == "window"
        with begin(server, long) as refused:  # of timelines one is taken, of requests two
            assert (refused.status, json.load(refused)["code"]) == (429, "queue_full")
            assert refused.getheader("retry-after") == "1"
    go_on.set()
    wait_for(lambda: counted(server, "client_gone") == before + 1, seconds=20)
    wait_for(lambda: server.client.metrics()["ivdr_busy"] == 0, seconds=20)
    with begin(server, long) as again:  # both places are free again
        stream = events_of(again)
        assert next(stream)[0] == "window"
        assert ask(server.client, "POST", body=long)[0] == 200
        assert [kind for kind, _ in stream][-1] == "summary"


def test_a_request_may_name_its_video_by_url_where_hosts_are_allowed(
    server: HttpServer, tiny_bundle: Path, long: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(long)

        def log_message(self, *_: object) -> None:
            pass

    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    port = site.server_address[1]
    settings = UrlSettings(hosts=(f"videos.example:{port}",), schemes=("http",))
    fetcher = Fetcher(
        settings,
        max_bytes=ENDPOINT_LIMITS.max_bytes,
        resolve=lambda host, port: ["127.0.0.1"],
        may_connect=lambda address: address == "127.0.0.1",
    )
    body = json.dumps({"video_url": f"http://videos.example:{port}/a.mp4?token=x"}).encode()
    headers = {"Content_Type": "application/json"}
    refused = ask(server.client, "POST", body=body, **headers)
    assert (refused[0], refused[1]["code"]) == (422, "bad_url")
    monkeypatch.setattr(server.service, "_fetcher", fetcher)
    try:
        assert ask(server.client, "POST", body=body, **headers)[0] == 200
        with begin(server, body, **{"Content-Type": "application/json"}) as answer:
            assert list(events_of(answer))[-1][0] == "summary"
        inside = json.dumps({"video_url": "http://127.0.0.1:8081/metrics"}).encode()
        assert ask(server.client, "POST", body=inside, **headers)[1]["code"] == "bad_url"
    finally:
        site.shutdown()
        site.server_close()
