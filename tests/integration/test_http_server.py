"""What only the HTTP server of its own does: admission, deadlines, request ids, its ports, its start and end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from served import SETTINGS, ask, client_of, running_http, wait_for
from starlette.datastructures import FormData
from starlette.formparsers import MultiPartParser
from videos import numbered_video

from ivdr_deploy.errors import ConfigError, ServerError
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.ort_runtime import OrtRuntime
from ivdr_deploy.serving.client import EndpointClient
from ivdr_deploy.serving.http import listening
from ivdr_deploy.serving.http.server import HttpServer
from ivdr_deploy.serving.http.settings import HttpSettings

pytestmark = pytest.mark.slow

FEW = 3
HTTP = HttpSettings(service=SETTINGS.service, max_requests=FEW, receive_seconds=1.0)


@pytest.fixture(scope="module")
def client(tiny_bundle: Path) -> Iterator[EndpointClient]:
    with running_http(tiny_bundle, HTTP) as running:
        yield running.client


def test_the_query_is_honoured_or_refused(client: EndpointClient, videos: list[Path]) -> None:
    video = videos[0].read_bytes()
    status, answer, _ = ask(client, "POST", "?top_k=1&timings=true", video)
    assert (status, len(answer["predictions"])) == (200, 1)
    assert answer["timings"]
    for query in ("?topk=1", "?top_k=x", "?top_k=", "?top_k=1&top_k=2"):
        status, answer, _ = ask(client, "POST", query, video)
        assert (status, answer["code"]) == (422, "bad_option"), query


def test_a_version_has_an_address_too(client: EndpointClient, videos: list[Path]) -> None:
    version = client.describe()["modelVersion"]
    for path, status in ((f"/predictions/tiny/{version}", 200), ("/predictions/tiny/9", 404)):
        found, answer, _ = ask(client, "POST", body=videos[0].read_bytes(), path=path)
        assert (found, answer.get("code")) == (status, None if status == 200 else "not_found")
        assert status == 200 or answer["hint"] == "videos are sent to /predictions/tiny"


@pytest.mark.parametrize("path", ["/ping", "/ready", "/v2/health/live", "/v2/health/ready"])
def test_what_balances_load_may_ask_for_the_head_alone(client: EndpointClient, path: str) -> None:
    status, body, headers = ask(client, "HEAD", path=path)
    assert (status, body, headers["content-type"]) == (200, {}, "application/json")
    assert ask(client, "OPTIONS", path=path)[0] == 405


@pytest.mark.parametrize("ends", [b"", b"Connection: close\r\n"], ids=["kept", "closed"])
@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_an_answer_leaves_in_one_piece(client: EndpointClient, method: bytes, ends: bytes) -> None:
    """Between two, the worker might be killed: half an answer is none, and nobody could give another one."""
    address = urlsplit(client.inference_url)
    for _ in range(40):
        with socket.create_connection((address.hostname, address.port or 0), timeout=60) as stream:
            stream.sendall(method + b" /ping HTTP/1.1\r\nHost: x\r\n" + ends + b"\r\n")
            head, end, body = stream.recv(1 << 16).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert end
            assert body == (b'{"status":"Healthy"}' if method == b"GET" else b"")
            assert not ends or stream.recv(1 << 16) == b"", "more comes than the answer"


def test_a_path_that_is_nearly_right_is_refused_and_leads_nowhere(client: EndpointClient) -> None:
    for path in ("/predictions/tiny/", "/ping/", "/v2/"):
        status, answer, headers = ask(client, "POST", path=path, body=b"x", Host="elsewhere.example")
        assert (status, answer["code"], "location" in headers) == (404, "not_found", False)


def test_what_no_route_takes_is_counted_by_its_code(client: EndpointClient) -> None:
    def counted() -> tuple[float, float]:
        found = client.metrics()
        codes = ("not_found", "bad_method")
        return tuple(found.get(f'ivdr_requests_total{{outcome="{code}"}}', 0.0) for code in codes)  # type: ignore[return-value]

    before = counted()
    for method, path in (
        ("POST", "/predictions/other"),
        ("GET", "/favicon.ico"),
        ("GET", "/predictions/tiny"),
    ):
        assert ask(client, method, path=path)[0] in (404, 405)
    assert ask(client, "POST", path="/v2")[1]["error"].startswith("'POST' '/v2': Method Not Allowed")
    assert counted() == (before[0] + 2, before[1] + 2)


def test_every_answer_bears_a_request_id_and_the_callers_own_if_it_can(
    client: EndpointClient, videos: list[Path]
) -> None:
    headers = ask(client, "POST", body=b"hello", X_Request_Id="mine-1")[2]
    assert headers["x-request-id"] == "mine-1"
    made = [
        ask(client, "POST", body=b"hello", X_Request_Id=wrong)[2]["x-request-id"]
        for wrong in ("", "two words", "x" * 129)
    ]
    assert all(re.fullmatch("[0-9a-f]{32}", name) for name in made)
    assert len(set(made)) == 3


def test_a_form_that_is_none_is_refused(client: EndpointClient) -> None:
    for content_type in ("multipart/form-data", "multipart/form-data; boundary=x"):
        status, answer = client.post(b"no form", content_type=content_type)
        assert (status, answer["code"]) == (400, "bad_request")
    many = "".join(f'--x\r\nContent-Disposition: form-data; name="{i}"\r\n\r\n1\r\n' for i in range(50))
    status, answer = client.post(
        (many + "--x--\r\n").encode(), content_type="multipart/form-data; boundary=x"
    )
    assert (status, answer["code"]) == (400, "bad_request")


def test_a_form_is_taken_apart_while_others_are_answered(
    client: EndpointClient, videos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in a form decides how long that takes."""
    begun, go_on, parse = threading.Event(), threading.Event(), MultiPartParser.parse

    async def slowly(parser: MultiPartParser) -> FormData:
        begun.set()
        assert go_on.wait(20)
        return await parse(parser)

    monkeypatch.setattr(MultiPartParser, "parse", slowly)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(client.predict, videos[0], options={"top_k": 1})
        try:
            assert begun.wait(20)
            assert ask(client, "GET", path="/ping")[0] == 200
        finally:
            go_on.set()
        assert sending.result(60)[0] == 200


def test_a_body_in_chunks_is_read_and_one_that_is_too_large_refused(
    client: EndpointClient, videos: list[Path]
) -> None:
    for parts, status in (([videos[0].read_bytes()], 200), ([b"\0" * 100_000] * 60, 413)):
        with closing(HTTPConnection(urlsplit(client.inference_url).netloc, timeout=60)) as connection:
            connection.request("POST", "/predictions/tiny", body=iter(parts), encode_chunked=True)
            assert connection.getresponse().status == status


def test_a_request_that_does_not_come_whole_is_given_up(client: EndpointClient, videos: list[Path]) -> None:
    head = b"POST /predictions/tiny HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf"
    address = urlsplit(client.inference_url)
    with socket.create_connection((str(address.hostname), address.port or 0), timeout=30) as connection:
        connection.sendall(head)
        answer = connection.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 408 ")
    with socket.create_connection((str(address.hostname), address.port or 0), timeout=30) as connection:
        connection.sendall(head)  # and goes away
    assert client.predict(videos[0])[0] == 200


def test_more_requests_than_are_taken_are_told_to_come_back(
    client: EndpointClient, videos: list[Path]
) -> None:
    body, query = videos[2].read_bytes(), "?num_clips=64"
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: ask(client, "POST", query, body), range(16)))
    found = {status for status, _, _ in answers}
    assert found == {200, 429}
    assert sum(status == 200 for status, _, _ in answers) >= FEW
    for status, answer, headers in answers:
        if status == 429:
            assert (answer["code"], headers["retry-after"]) == ("queue_full", "1")
    assert client.predict(videos[0])[0] == 200
    assert client.metrics()['ivdr_requests_total{outcome="queue_full"}'] == sum(
        status == 429 for status, _, _ in answers
    )


def test_management_and_metrics_are_on_a_port_of_their_own(client: EndpointClient) -> None:
    assert ask(client, "GET", path="/ping")[:2] == (200, {"status": "Healthy"})
    assert ask(client, "GET", path="/ready")[0] == 200
    assert "/predictions/tiny" in ask(client, "GET", path="/openapi.json")[1]["paths"]
    for path in ("/metrics", "/models/tiny"):
        assert ask(client, "GET", path=path)[0] == 404
    described = client.describe()
    assert described["workers"][0]["status"] == "READY"
    assert described["customizedMetadata"]["variant"] == "onnx-fp32"


def test_a_network_that_begins_to_answer_wrong_is_not_ready_and_lives(
    tiny_bundle: Path, videos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = HttpSettings(service=SETTINGS.service, canary_seconds=0.05)
    with running_http(tiny_bundle, settings) as running:
        right = OrtRuntime.infer

        def wrong(runtime: OrtRuntime, video: np.ndarray) -> dict[str, np.ndarray]:
            return {name: value + 1 for name, value in right(runtime, video).items()}

        with monkeypatch.context() as patch:
            patch.setattr(OrtRuntime, "infer", wrong)
            # A machine that is slow for a moment has its network called stuck, until it answers.
            wait_for(lambda: ask(running.client, "GET", path="/ready")[1].get("code") == "network_wrong")
            assert ask(running.client, "GET", path="/ready")[0] == 503
            assert ask(running.client, "GET", path="/ping")[0] == 200
        wait_for(lambda: ask(running.client, "GET", path="/ready")[0] == 200)


def test_32_at_a_time_get_each_its_own_answer(
    tiny_bundle: Path, predictor: VideoPredictor, videos: list[Path]
) -> None:
    expected = [dict(predictor.predict(path).top(5)) for path in videos]
    settings = HttpSettings(service=SETTINGS.service)
    with running_http(tiny_bundle, settings) as running, ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda i: running.client.predict(videos[i % 3]), range(32)))
    for i, (status, answer) in enumerate(answers):
        assert status == 200
        scores = {entry["label"]: entry["score"] for entry in answer["predictions"]}
        assert scores == pytest.approx(expected[i % 3], abs=1e-6)


def test_a_connection_that_is_kept_may_send_once_more_and_is_told_that_it_ends(
    tiny_bundle: Path, videos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "_LINGER_SECONDS", 60.0)
    body = videos[0].read_bytes()
    with running_http(tiny_bundle, HTTP) as running:
        address = urlsplit(running.client.inference_url)
        with closing(HTTPConnection(address.netloc, timeout=60)) as connection:
            for leaving in (False, True):
                if leaving:
                    running.pause()  # no connections are accepted when this returns
                    begun = time.monotonic()
                connection.request("POST", "/predictions/tiny", body=body)
                answer = connection.getresponse()
                answer.read()
                assert (answer.status, answer.will_close) == (200, leaving)
        assert running.wait(60)
        assert time.monotonic() - begun < 30, "it waited although nobody was there"
        running.start()  # the port and the model are still there
        assert running.client.predict(videos[0])[0] == 200


def test_a_port_that_is_taken_is_named(tiny_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} ") as caught:
            HttpServer(tiny_bundle, HTTP, port=port).__enter__()
    assert "--port" in str(caught.value)
    with pytest.raises(ConfigError, match="port must be"):
        HttpServer(tiny_bundle, HTTP, port=65535)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video that takes a while, so that with steady traffic some request is always being answered."""
    return numbered_video(tmp_path_factory.mktemp("slow") / "slow.mp4", num_frames=250, size=(320, 240))


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGHUP, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)]
)
def test_a_signal_lets_requests_that_were_taken_be_answered_and_leaves_nothing(
    tiny_bundle: Path, slow: Path, number: signal.Signals
) -> None:
    command = [
        sys.executable,
        "-P",
        "-c",
        "from ivdr_deploy.cli import main; main()",
        "serve",
        str(tiny_bundle),
    ]
    with subprocess.Popen(
        [*command, "--server", "http", "--json", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        client = client_of(process)
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        answers: list[int] = []
        lost: list[str] = []
        refused = threading.Event()

        def send_steadily() -> None:
            while not refused.is_set():
                try:
                    answers.append(client.predict(slow, options={"num_clips": 40})[0])
                except ServerError as error:
                    lost.append(str(error))
                    refused.set()

        with ThreadPoolExecutor(4) as pool:
            sending = [pool.submit(send_steadily) for _ in range(4)]
            wait_for(lambda: len(answers) >= 4)
            os.kill(process.pid, number)
            for future in sending:
                future.result(60)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0, errors
    assert set(answers) == {200}, errors
    # Refused at the door; an accepted request that is cut off would say something else.
    assert all("refused" in error or "reset" in error for error in lost), lost
    assert "stopped" in errors
    logged = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert [line["status"] for line in logged] == [200] * len(answers)
    assert not psutil.wait_procs(children, timeout=20)[1]


def test_a_kept_connection_is_answered_at_once(client: EndpointClient) -> None:
    """Head and body of an answer leave at once, and the second does not wait 40 ms for the first to be acknowledged.

    It would every time, once a connection is a few answers old. On a machine that is busy with other things some are
    answered at once all the same.
    """
    with closing(HTTPConnection(urlsplit(client.inference_url).netloc, timeout=60)) as connection:
        seconds = []
        for _ in range(40):
            begin = time.perf_counter()
            connection.request("POST", "/predictions/tiny", body=b"no video")
            assert connection.getresponse().read()
            seconds.append(time.perf_counter() - begin)
    assert min(seconds[20:]) < 0.03
