"""The typed client against the HTTP server, and against answers that a server gives when it is in trouble."""

from __future__ import annotations

import asyncio
import gzip
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from served import SETTINGS, running_http, wait_for

import ivdr_deploy as ivdr
from ivdr_deploy.errors import (
    ConfigError,
    DrainingError,
    OptionError,
    QueueFullError,
    ServerError,
    VideoOpenError,
)
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.serving.http.server import HttpServer
from ivdr_deploy.serving.http.settings import HttpSettings

pytestmark = pytest.mark.slow

MOST = 4


@pytest.fixture(scope="module")
def running(tiny_bundle: Path) -> Iterator[HttpServer]:
    settings = HttpSettings(service=SETTINGS.service, max_requests=MOST, canary_seconds=3600.0)
    with running_http(tiny_bundle, settings) as opened:
        yield opened


Predict = Callable[..., ivdr.RemoteResult]


@pytest.fixture(params=["sync", "async"])
def predict(request: pytest.FixtureRequest) -> Callable[..., Predict]:
    """Makes what sends one video with each of the two clients."""

    def sync_client(url: str, **settings: Any) -> Predict:
        def send(video: Any, **options: Any) -> ivdr.RemoteResult:
            with ivdr.Client(url, "tiny", **settings) as client:
                return client.predict(video, **options)

        return send

    def async_client(url: str, **settings: Any) -> Predict:
        async def send(video: Any, **options: Any) -> ivdr.RemoteResult:
            async with ivdr.AsyncClient(url, "tiny", **settings) as client:
                return await client.predict(video, **options)

        return lambda video, **options: asyncio.run(send(video, **options))

    return sync_client if request.param == "sync" else async_client


def test_a_result_is_what_the_predictor_says(
    predict: Callable[..., Predict], running: HttpServer, predictor: VideoPredictor, videos: list[Path]
) -> None:
    send = predict(running.client.inference_url)
    expected = predictor.predict(videos[1])
    bare = send(videos[1])
    assert [label for label, _ in bare.top(5)] == [label for label, _ in expected.top(5)]
    assert (bare.inter, bare.clip_seconds, dict(bare.timings_ms)) == (None, None, {})
    found = send(
        videos[1].read_bytes(), top_k=2, outputs=["labels", "feature", "inter", "intra"], timings=True
    )
    assert [score for _, score in found.predictions] == pytest.approx([s for _, s in expected.top(2)])
    for name in ("feature", "inter", "intra", "clip_seconds"):
        value, wanted = getattr(found, name), getattr(expected, name)
        assert (value.dtype, value.shape) == (wanted.dtype, wanted.shape), name
        np.testing.assert_allclose(value, wanted, atol=1e-5, err_msg=name)
    assert set(found.timings_ms) == {"decode_ms", "preprocess_ms", "infer_ms"}
    assert (found.info.num_frames, found.view_plan) == (expected.info.num_frames, expected.view_plan)
    assert found.model.contract_hash == predictor.model.contract_hash
    assert found.request_id
    assert found.body["model"]["name"] == "tiny"
    assert send(videos[1], num_clips=3, outputs=["intra"]).intra.shape[0] == 3


def test_what_is_wrong_with_a_video_or_request_is_raised_at_once(
    predict: Callable[..., Predict], running: HttpServer, videos: list[Path], tmp_path: Path
) -> None:
    send = predict(running.client.inference_url)
    before = counted(running)
    with pytest.raises(VideoOpenError, match="not a video"):
        send(b"no video")
    with pytest.raises(OptionError, match="num_clips must be between 1 and 64"):
        send(videos[0], num_clips=65)
    assert counted(running) == before + 2, "what is wrong stays wrong: it is sent once"
    with pytest.raises(VideoOpenError, match="cannot be read"):
        send(tmp_path / "absent.mp4")
    with pytest.raises(ConfigError, match="expected a list"):
        send(videos[0], outputs="inter")
    with pytest.raises(ConfigError, match="expected http://"):
        predict("127.0.0.1:8080")(videos[0])
    assert counted(running) == before + 2


def counted(running: HttpServer, outcome: str = "") -> float:
    return sum(
        value
        for name, value in running.client.metrics().items()
        if name.startswith(f'ivdr_requests_total{{outcome="{outcome}')
    )


def test_a_full_queue_is_waited_for_until_the_deadline(
    predict: Callable[..., Predict], running: HttpServer, videos: list[Path]
) -> None:
    url = running.client.inference_url
    before = counted(running, "queue_full")
    with ThreadPoolExecutor(1) as pool:
        with running.admission.taking(MOST):
            sending = pool.submit(predict(url), videos[0])
            wait_for(lambda: counted(running, "queue_full") > before)
            assert not sending.done()
        start = time.monotonic()
        assert sending.result(30).top(1)
    assert time.monotonic() - start < 20
    full = b'{"code": "queue_full", "message": "there is no room", "hint": ""}'
    with troubled(http_answer(429, full, Retry_After="60")) as (url, _):
        start = time.monotonic()
        with pytest.raises(QueueFullError):
            predict(url, retry=ivdr.Retry(deadline_seconds=50.0))(videos[0])
        assert time.monotonic() - start < 40, "the server asks for a minute, which is too late"


def test_a_server_that_is_about_to_stop_is_named(
    predict: Callable[..., Predict], running: HttpServer, videos: list[Path]
) -> None:
    running.service.drain()
    try:
        with pytest.raises(DrainingError):
            predict(running.client.inference_url, retry=ivdr.Retry(attempts=1))(videos[0])
    finally:
        running.service._draining = False


@contextmanager
def troubled(*answers: bytes | None) -> Iterator[tuple[str, list[float]]]:
    """A port that gives each connection the next answer; None resets it. Yields its address and when it was asked."""
    times: list[float] = []

    def serve(listening: socket.socket) -> None:
        for answer in answers:
            connection, _ = listening.accept()
            with connection:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(65536)
                times.append(time.monotonic())
                if answer is None:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    continue
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                body = head.split(b"\r\n\r\n", 1)[1]
                while len(body) < length:
                    body += connection.recv(65536)
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", times
        thread.join(10)
        assert not thread.is_alive(), "not every answer was asked for"


@contextmanager
def nobody() -> Iterator[str]:
    """An address at which nobody listens, nor can anybody begin to."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


def http_answer(status: int, body: bytes, **headers: str) -> bytes:
    named = {"Content-Length": str(len(body)), "Connection": "close", **headers}
    lines = [f"HTTP/1.1 {status} X", *(f"{name.replace('_', '-')}: {value}" for name, value in named.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


DIED = b'{"code": 507, "type": "InternalServerException", "message": "Worker died."}'


def test_connections_that_break_and_workers_that_die_cost_time_and_no_video(
    predict: Callable[..., Predict], running: HttpServer, videos: list[Path]
) -> None:
    real = httpx.post(running.client.predict_url, content=videos[0].read_bytes()).content
    trouble = (
        None,
        http_answer(507, DIED),
        http_answer(500, DIED),
        http_answer(503, b"", Retry_After="1"),
        http_answer(200, real),
    )
    with troubled(*trouble) as (url, times):
        found = predict(url, retry=ivdr.Retry(first_seconds=0.01))(videos[0])
    assert found.model.name == "tiny"
    assert times[4] - times[3] >= 1.0, "what a server asks for is waited"


def test_a_failure_that_does_not_pass_is_not_sent_again(
    predict: Callable[..., Predict], videos: list[Path]
) -> None:
    body = b'{"code": "inference_failed", "message": "it gives NaN", "hint": ""}'
    with troubled(http_answer(500, body)) as (url, _), pytest.raises(ivdr.InferenceError, match="NaN"):
        predict(url)(videos[0])


def test_who_never_answers_and_who_is_not_there_end_at_the_deadline(
    predict: Callable[..., Predict], videos: list[Path]
) -> None:
    retry = ivdr.Retry(deadline_seconds=0.6)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(ServerError, match="ReadTimeout"):
            predict(url, retry=retry)(videos[0])
        assert 0.5 < time.monotonic() - start < 20
    with nobody() as url:
        start = time.monotonic()
        with pytest.raises(ServerError, match="ConnectError"):
            predict(url, retry=retry)(videos[0])
        assert time.monotonic() - start < 20


def trickle(listening: socket.socket) -> None:
    """Send a byte now and then, for most of a minute: no single wait of a client takes long."""
    connection, _ = listening.accept()
    with connection, suppress(OSError):
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(1000):
            connection.sendall(b" ")
            time.sleep(0.05)


def test_an_answer_that_trickles_ends_at_the_deadline(
    predict: Callable[..., Predict], videos: list[Path]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=trickle, args=(listening,), daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(ServerError, match="ReadTimeout"):
            predict(url, retry=ivdr.Retry(deadline_seconds=0.5))(videos[0])
        assert time.monotonic() - start < 20


def endless(listening: socket.socket) -> None:
    """Answer without an end."""
    connection, _ = listening.accept()
    with connection, suppress(OSError):
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while True:
            connection.sendall(b" " * (1 << 20))


def packed(listening: socket.socket) -> None:
    """Answer with what unpacks to a thousand times its size."""
    connection, _ = listening.accept()
    with connection:
        head = connection.recv(1 << 16).lower()
        assert b"accept-encoding: identity" in head
        body = gzip.compress(bytes(1 << 20))
        connection.sendall(http_answer(200, body, Content_Encoding="gzip"))


@pytest.mark.parametrize(("serve", "words"), [(endless, "more than 32 MiB"), (packed, "packed with 'gzip'")])
def test_an_answer_without_an_end_or_packed_is_given_up(
    predict: Callable[..., Predict], serve: Callable[[socket.socket], None], words: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        with pytest.raises(ServerError, match=words):
            predict(f"http://127.0.0.1:{listening.getsockname()[1]}")(b"video")


def test_a_request_that_is_taken_slowly_ends_at_the_deadline(predict: Callable[..., Predict]) -> None:
    """No single wait takes long."""
    done = threading.Event()

    def sip(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, suppress(OSError):
            while connection.recv(1 << 14) and not done.wait(0.05):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 15)
        threading.Thread(target=sip, args=(listening,), daemon=True).start()
        start = time.monotonic()
        with pytest.raises(ServerError, match=r"(Read|Write)Timeout"):
            predict(f"http://127.0.0.1:{listening.getsockname()[1]}", retry=ivdr.Retry(deadline_seconds=1.0))(
                bytes(48 << 20)
            )
        assert time.monotonic() - start < 15
        done.set()


def test_it_says_whether_the_endpoint_is_ready(running: HttpServer) -> None:
    async def both(url: str) -> tuple[bool, bool]:
        async with ivdr.AsyncClient(url, "tiny") as client:
            with ivdr.Client(url, "tiny") as other:
                return other.ready(), await client.ready()

    assert asyncio.run(both(running.client.inference_url)) == (True, True)
    with nobody() as url:
        assert asyncio.run(both(url)) == (False, False)
