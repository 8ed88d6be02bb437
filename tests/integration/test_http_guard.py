"""What a client cannot do to the HTTP server: keep it waiting, fill its memory, or be left without a word."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from served import SETTINGS, ask, running_http, wait_for

from ivdr_deploy.errors import QueueFullError
from ivdr_deploy.serving.core import service as service_module
from ivdr_deploy.serving.http import connection, streaming
from ivdr_deploy.serving.http.channel import Channel, Questions
from ivdr_deploy.serving.http.server import HttpServer
from ivdr_deploy.serving.http.settings import HttpSettings
from ivdr_deploy.serving.http.worker import Worker

pytestmark = pytest.mark.slow

TOKEN = "sixteen-letters-"
PATIENCE = 1.0
"""For a client to ask, or to take its answer; uvicorn itself would close after 5 s."""


@pytest.fixture(scope="module")
def running(tiny_bundle: Path) -> Iterator[HttpServer]:
    limits = replace(SETTINGS.service.limits, max_bytes=100_000)
    settings = HttpSettings(
        service=replace(SETTINGS.service, limits=limits), receive_seconds=PATIENCE / 2, canary_seconds=3600.0
    )
    with pytest.MonkeyPatch.context() as patch, running_http(tiny_bundle, settings, token=TOKEN) as opened:
        patch.setattr(connection, "_BESIDE_SECONDS", PATIENCE / 2)
        yield opened


def connected(running: HttpServer) -> socket.socket:
    at = urlsplit(running.client.inference_url)
    return socket.create_connection((at.hostname, at.port or 0), timeout=20)


def until_the_end(client: socket.socket) -> bytes:
    found = b""
    try:
        while piece := client.recv(1 << 16):
            found += piece
    except ConnectionResetError:
        pass
    return found


def takes(client: socket.socket, sent: bytes) -> bool:
    """Whether the server still listens."""
    try:
        client.sendall(sent)
    except OSError:  # reset, or closed
        return False
    return True


def lines_taken(client: socket.socket) -> int:
    """How many of a thousand lines of a head, of 10 KB each, the server takes."""
    line = b"X: " + b"x" * 10_000 + b"\r\n"
    return sum(takes(client, line) for _ in range(1000))


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /predictions/tiny HTTP/1.1\r\nHost: x\r\nX-Much:",
        b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\nGET",
    ],
    ids=["nothing", "half-a-head", "half-a-second-head"],
)
def test_who_does_not_ask_in_time_is_cut_off(running: HttpServer, sent: bytes) -> None:
    begin = time.monotonic()
    with connected(running) as client:
        client.sendall(sent)
        said = until_the_end(client)
        assert PATIENCE - 0.05 < time.monotonic() - begin < 4.5
    assert said.startswith(b"HTTP/1.1 200") == sent.startswith(b"GET")


def test_a_body_that_trickles_after_its_refusal_is_cut_off(running: HttpServer) -> None:
    with connected(running) as client:
        client.sendall(b"POST /predictions/tiny HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 401")
        begin = time.monotonic()
        while takes(client, b"x"):
            assert time.monotonic() < begin + 4.5
            time.sleep(0.05)


@pytest.mark.parametrize("asks_again", [False, True], ids=["one", "and-sends-another-request"])
def test_who_does_not_take_its_answer_is_cut_off(
    running: HttpServer, videos: list[Path], monkeypatch: pytest.MonkeyPatch, asks_again: bool
) -> None:
    head = f"POST /predictions/tiny HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    bounded, answered = service_module.bounded, threading.Event()

    def much(body: dict[str, object]) -> object:
        answered.set()
        return bounded({**body, "more": "x" * (12 << 20)})

    monkeypatch.setattr(service_module, "bounded", much)
    video = videos[0].read_bytes()
    request = head.encode() + f"Content-Length: {len(video)}\r\n\r\n".encode() + video
    begin = time.monotonic()
    with connected(running) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(request)
        own = client.getsockname()

        def is_open() -> bool:
            held = psutil.Process().net_connections("tcp")
            return any(each.raddr == own and each.status == psutil.CONN_ESTABLISHED for each in held)

        assert answered.wait(15)  # before that there may be no connection yet
        if asks_again:
            wait_for(lambda: has_room(running), seconds=15)  # the first has been answered
            takes(client, request)
        wait_for(lambda: not is_open(), seconds=15)
        assert time.monotonic() - begin > PATIENCE / 2


def test_a_head_without_an_end_is_refused(running: HttpServer) -> None:
    with connected(running) as client:
        client.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n")
        assert lines_taken(client) < 700, "more than lies in the buffers of two sockets was taken"


def test_what_follows_a_body_without_an_end_is_not_kept(running: HttpServer) -> None:
    """Lines like those of a head may follow a body in chunks."""
    head = f"POST /predictions/tiny HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    with connected(running) as client:
        client.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n")
        assert lines_taken(client) < 700, "more than lies in the buffers of two sockets was taken"


def test_who_does_not_read_a_stream_of_events_loses_its_place(
    running: HttpServer, videos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    event, sent = streaming._event, threading.Event()

    def long_event(kind: str, values: dict[str, Any]) -> bytes:
        sent.set()
        return event(kind, {**values, "more": "x" * (4 << 20)})

    monkeypatch.setattr(streaming, "_event", long_event)
    video = videos[2].read_bytes()
    head = f"POST /predictions/tiny?timeline=true HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += f"Accept: text/event-stream\r\nContent-Length: {len(video)}\r\n\r\n"
    with connected(running) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(head.encode() + video)
        assert sent.wait(20)
        wait_for(lambda: has_room(running), seconds=20)


def has_room(running: HttpServer) -> bool:
    """Whether no request is being answered."""
    try:
        with running.admission.taking(running.settings.max_requests):
            return True
    except QueueFullError:
        return False


def test_every_answer_bears_the_name_of_its_request(running: HttpServer) -> None:
    for method, path, status in (
        ("GET", "/ping", 200),
        ("GET", "/v2/health/live", 200),
        ("POST", "/predictions/tiny", 401),
    ):
        found, _, headers = ask(running.client, method, path=path, X_Request_Id="mine")
        assert (found, headers["x-request-id"]) == (status, "mine")
    found, body, headers = ask(running.client, "POST", path="/nowhere%0a", Authorization=f"Bearer {TOKEN}")
    assert (found, body["code"], len(headers["x-request-id"])) == (404, "not_found", 32)
    assert "'/nowhere\\n'" in body["message"], "what came from outside is quoted"


def test_a_defect_of_ours_is_an_answer_and_is_counted(
    running: HttpServer, videos: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("SECRET")

    monkeypatch.setattr(running.service, "submit", broken)
    monkeypatch.setattr("ivdr_deploy.serving.http.oip.read_tensors", broken)
    with caplog.at_level(logging.INFO, logger="ivdr_deploy.access"):
        for path in ("/predictions/tiny", "/v2/models/tiny/infer"):
            status, body, _ = ask(
                running.client, "POST", body=b"x", path=path, Authorization=f"Bearer {TOKEN}"
            )
            assert (status, body["code"]) == (500, "internal")
            assert "SECRET" not in json.dumps(body)
    lines = [json.loads(each.message) for each in caplog.records if each.name == "ivdr_deploy.access"]
    assert [line["code"] for line in lines] == ["internal", "internal"]
    counted = {series.labels: value for series, value in running.service.metrics.values().items()}
    assert counted[("outcome", "internal"),] == 2


def test_a_worker_that_reads_from_a_disk_that_hangs_says_how_it_is(
    running: HttpServer, tmp_path: Path, videos: list[Path]
) -> None:
    hangs = tmp_path / "hangs"
    os.mkfifo(hangs)
    large = tmp_path / "large"
    large.write_bytes(bytes(200_000))
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    questions: SimpleQueue[dict[str, object]] = SimpleQueue()

    def take() -> None:
        while (question := channel.receive()) is not None:
            questions.put(question)

    with ExitStack() as opened:
        opened.callback(channel.close)
        own = Channel(ours)
        opened.callback(own.close)
        threading.Thread(target=take, daemon=True).start()
        threading.Thread(target=Worker(running, channel).run, args=(questions,), daemon=True).start()
        asking = Questions(own, "worker", on_gone=lambda: None)
        waiting = threading.Thread(
            target=asking.ask, args=("predict",), kwargs={"seconds": 30, "path": str(hangs)}
        )
        waiting.start()
        writer = opened_for_writing(hangs)
        assert asking.ask("status", seconds=10)["health"] == "ready"
        said = asking.ask("predict", seconds=30, path=str(large))
        assert (said["status"], said["body"]["code"]) == (413, "too_large")
        assert waiting.is_alive()
        os.set_blocking(writer, True)
        with os.fdopen(os.dup(writer), "wb") as pipe:
            pipe.write(videos[0].read_bytes())
        os.close(writer)
        waiting.join(30)
        assert not waiting.is_alive()


def opened_for_writing(pipe: Path) -> int:
    """Open a pipe when somebody reads from it."""
    found: list[int] = []

    def is_read() -> bool:
        with suppress(OSError):  # nobody is there yet
            found.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return bool(found)

    wait_for(is_read)
    return found[0]
