"""What the Open Inference Protocol is over gRPC alone: codes, calls that are begun or given up, its port, its token."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from oip_client import MOST, Triton, running_oip
from served import SETTINGS, announced, running_http, wait_for
from tritonclient import grpc as triton_grpc
from tritonclient import http as triton_http
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException
from videos import numbered_video

from ivdr_deploy.errors import ConfigError, QueueFullError, ServerError
from ivdr_deploy.runtimes.ort_runtime import OrtRuntime
from ivdr_deploy.serving.http import oip_grpc
from ivdr_deploy.serving.http.server import HttpServer
from ivdr_deploy.serving.http.settings import HttpSettings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def oip(tiny_bundle: Path) -> Iterator[HttpServer]:
    with running_oip(tiny_bundle) as running:
        yield running


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """What the log of requests says of calls."""
    found = [json.loads(each.message) for each in caplog.records if each.name == "ivdr_deploy.access"]
    return [line for line in found if line["path"].startswith("/inference.GRPCInferenceService/")]


def test_grpc_takes_the_fields_of_a_datatype_too_and_gives_codes(
    oip: HttpServer, videos: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ivdr_deploy.access")
    stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(str(oip.grpc_address)))
    request = service_pb2.ModelInferRequest(model_name="tiny")
    tensor = request.inputs.add(name="video", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(videos[0].read_bytes())
    answer, call = stub.ModelInfer.with_call(request, metadata=(("x-request-id", "mine-1"),))
    assert [output.name for output in answer.outputs][:2] == ["label", "score"]
    assert dict(call.initial_metadata())["x-request-id"] == "mine-1"

    def refused(code: grpc.StatusCode) -> dict[str, str]:
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(request)
        assert caught.value.code() == code, caught.value
        return dict(caught.value.trailing_metadata())

    with oip.admission.taking(MOST):
        said = refused(grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert (said["ivdr-code"], said["ivdr-status"], said["retry-after"]) == ("queue_full", "429", "1")
    tensor.contents.bytes_contents[0] = b"no video"
    said = refused(grpc.StatusCode.INVALID_ARGUMENT)
    assert (said["ivdr-code"], said["ivdr-item"]) == ("unreadable", "0")
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request, compression=grpc.Compression.Gzip)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED, "what a message unpacks to has no limit"
    request.outputs.extend([service_pb2.ModelInferRequest.InferRequestedOutputTensor(name="score")] * 2)
    assert refused(grpc.StatusCode.INVALID_ARGUMENT)["ivdr-code"] == "bad_option"
    del request.outputs[:]
    request.raw_input_contents.extend([b"", b""])
    assert refused(grpc.StatusCode.INVALID_ARGUMENT)["ivdr-code"] == "bad_request"
    request.model_name = "other"
    assert refused(grpc.StatusCode.NOT_FOUND)["ivdr-code"] == "not_found"
    assert oip.client.metrics()['ivdr_requests_total{outcome="not_found"}'] == 1
    codes = [line["code"] for line in lines(caplog)]
    assert codes == ["ok", "queue_full", "unreadable", "bad_option", "bad_request", "not_found"]
    with pytest.raises(grpc.RpcError) as caught:
        stub.RepositoryIndex(service_pb2.RepositoryIndexRequest())
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


CALLS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")


def test_what_is_no_message_is_refused_logged_and_counted(
    oip: HttpServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    name = 'ivdr_requests_total{outcome="bad_request"}'
    before = oip.client.metrics().get(name, 0.0)
    paths = [f"/inference.GRPCInferenceService/{call}" for call in CALLS] + ["/grpc.health.v1.Health/Check"]
    no_messages = (b"\xff\xff\xff", b"\x0a\x02\xff\xfe", b"\x0a\x05abc")
    with grpc.insecure_channel(str(oip.grpc_address)) as channel:
        for path in paths:
            for sent in no_messages:
                if sent == no_messages[1] and "Server" in path.rpartition("/")[2]:
                    continue  # its messages have no string: this is a field that nobody knows
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary(path)(sent)
                assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, (path, sent)
                assert str(caught.value.details()).startswith("the message is"), (path, sent)
                assert dict(caught.value.trailing_metadata())["ivdr-code"] == "bad_request"
    said = [json.loads(each.message) for each in caplog.records if each.name == "ivdr_deploy.access"]
    assert [(line["code"], line["status"]) for line in said] == [("bad_request", 400)] * (3 * len(paths) - 3)
    assert oip.client.metrics()[name] == before + len(said)
    assert not [each for each in caplog.records if each.levelno > logging.INFO]


def test_a_message_is_read_only_where_there_is_room_and_its_parts_are_counted_first(oip: HttpServer) -> None:
    many = b"\x2a\x00" * 200_000
    with grpc.insecure_channel(str(oip.grpc_address)) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for taken, code in ((MOST, "queue_full"), (0, "bad_request")):
            with oip.admission.taking(taken), pytest.raises(grpc.RpcError) as caught:
                infer(many)
            assert dict(caught.value.trailing_metadata())["ivdr-code"] == code
        assert "more than 100 inputs" in str(caught.value.details())


def test_calls_that_never_send_their_message_end_and_leave_room_for_others(tiny_bundle: Path) -> None:
    settings = HttpSettings(service=SETTINGS.service, max_requests=1, receive_seconds=1.0)
    token = "0123456789abcdef"
    with running_http(tiny_bundle, settings, grpc_port=0, token=token) as running:
        channel = grpc.insecure_channel(str(running.grpc_address))
        never = threading.Event()

        def silent() -> Iterator[bytes]:
            never.wait(60)
            yield from ()

        begin = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
        shown = (("authorization", f"Bearer {token}"),)
        begun = [begin.future(silent(), metadata=shown) for _ in range(12)]  # more than are taken at a time
        codes = Counter(call.exception(20).code() for call in begun)  # type: ignore[union-attr]
        assert set(codes) == {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}
        asked = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert asked.status == health_pb2.HealthCheckResponse.SERVING
        refused = begin.future(silent())
        assert refused.exception(20).code() == grpc.StatusCode.UNAUTHENTICATED, "nothing of it has been read"  # type: ignore[union-attr]
        with pytest.raises(grpc.RpcError) as caught:
            begin(iter(()), metadata=shown)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        never.set()
        channel.close()


def test_a_call_that_is_given_up_counts_until_its_work_is_done(
    oip: HttpServer,
    videos: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="ivdr_deploy.access")
    right, reached, go_on = OrtRuntime.infer, threading.Event(), threading.Event()

    def wait_and_infer(runtime: OrtRuntime, video: np.ndarray) -> dict[str, np.ndarray]:
        reached.set()
        assert go_on.wait(30)
        return right(runtime, video)

    def has_room() -> bool:
        try:
            with oip.admission.taking(MOST):
                return True
        except QueueFullError:
            return False

    stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(str(oip.grpc_address)))
    request = service_pb2.ModelInferRequest(model_name="tiny")
    tensor = request.inputs.add(name="video", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(videos[0].read_bytes())
    name = "ivdr_busy"
    with monkeypatch.context() as patch:
        patch.setattr(OrtRuntime, "infer", wait_and_infer)
        call = stub.ModelInfer.future(request)
        wait_for(lambda: oip.client.metrics()[name] == 1)
        assert reached.wait(30)
        call.cancel()
        with pytest.raises(grpc.FutureCancelledError):
            call.result()
        # A later call is answered, so the server has seen the end of this one.
        assert stub.ServerLive(service_pb2.ServerLiveRequest()).live
        assert not has_room()
        go_on.set()
    wait_for(has_room)
    wait_for(lambda: oip.client.metrics()[name] == 0)
    wait_for(lambda: "ModelInfer" in caplog.text)
    assert [line["code"] for line in lines(caplog)] == ["ok"], "the work that was done for it is in the log"


def test_a_connection_on_which_nothing_is_asked_is_ended(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oip_grpc, "_BESIDE_SECONDS", 0.5)
    settings = HttpSettings(service=SETTINGS.service, receive_seconds=0.5, canary_seconds=3600.0)
    with running_http(tiny_bundle, settings, grpc_port=0) as running:
        host, _, port = str(running.grpc_address).rpartition(":")
        for sent in (b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\4" + bytes(5)):  # its preface
            with socket.create_connection((host, int(port)), timeout=15) as client:
                client.sendall(sent)
                while client.recv(1 << 16):
                    pass


def test_who_shows_no_token_learns_no_more_than_whether_it_is_ready(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ivdr_deploy.access")
    token = "0123456789abcdef"
    settings = HttpSettings(service=SETTINGS.service, canary_seconds=3600.0)
    with running_http(tiny_bundle, settings, grpc_port=0, token=token) as running:
        http = Triton(triton_http, running.client.inference_url.removeprefix("http://"))
        rpc = Triton(triton_grpc, str(running.grpc_address))
        health = health_pb2_grpc.HealthStub(grpc.insecure_channel(str(running.grpc_address)))
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        for triton, name, status in (
            (http, "Authorization", "401"),
            (rpc, "authorization", "UNAUTHENTICATED"),
        ):
            assert triton.client.is_server_live()
            assert triton.client.is_server_ready()
            for headers in ({}, {name: "Bearer other"}, {name: token}):
                with pytest.raises(InferenceServerException, match="shows its token") as caught:
                    triton.infer([b"no video"], headers=headers)
                assert status in str(caught.value.status())
                with pytest.raises(InferenceServerException, match="shows its token"):
                    triton.client.get_model_metadata("tiny", headers=headers)
            with pytest.raises(InferenceServerException, match="not a video"):
                triton.infer([b"no video"], headers={name: f"Bearer {token}"})
            triton.client.close()
    assert [(line["code"], line["status"]) for line in lines(caplog)] == [("unauthorized", 401)] * 6 + [
        ("unreadable", 400)
    ]


@pytest.mark.parametrize("seconds", [0.0, 20.0, None])
def test_grpc_that_ends_by_itself_is_seen_while_http_goes_on(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, seconds: float | None
) -> None:
    monkeypatch.setattr("threading.excepthook", lambda given: None)
    with HttpServer(tiny_bundle, HttpSettings(service=SETTINGS.service), port=0, grpc_port=0) as running:
        running.start()
        assert not running.wait(0)
        _, ends = running._listening
        assert isinstance(ends, oip_grpc.GrpcListening)
        ends._loop.call_soon_threadsafe(ends._loop.stop)
        if seconds == 0.0:
            ends.wait_closed()
            wait_for(ends._loop.is_closed)
        with pytest.raises(ServerError, match="gRPC ended by itself"):
            running.wait(seconds)
        assert running.accepting, "HTTP goes on until somebody acts on it"
        running.stop()


def test_a_port_of_grpc_that_is_taken_is_named(oip: HttpServer, tiny_bundle: Path) -> None:
    port = int(str(oip.grpc_address).rpartition(":")[2])
    with pytest.raises(ServerError, match=f"port {port} \\(gRPC\\)"):
        HttpServer(tiny_bundle, HttpSettings(), port=0, grpc_port=port).__enter__()
    with pytest.raises(ConfigError, match="grpc_port must be"):
        HttpServer(tiny_bundle, HttpSettings(), port=0, grpc_port=65536).__enter__()


def test_calls_that_were_taken_are_answered_when_it_stops(tiny_bundle: Path, tmp_path: Path) -> None:
    slow = numbered_video(tmp_path / "slow.mp4", num_frames=250, size=(320, 240)).read_bytes()
    command = [sys.executable, "-P", "-c", "from ivdr_deploy.cli import main; main()", "serve"]
    command += [str(tiny_bundle), "--server", "http", "--json", "--port", "0", "--grpc-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        client = Triton(triton_grpc, announced(process)["grpc_address"])
        answers: list[int] = []
        lost: list[str] = []
        ended = threading.Event()

        def send_steadily() -> None:
            while not ended.is_set():
                try:
                    found = client.infer([slow], outputs=["status"], parameters={"num_clips": 40})
                    answers.append(int(found.as_numpy("status")[0]))
                except InferenceServerException as error:
                    lost.append(str(error.status()))
                    ended.set()

        with ThreadPoolExecutor(3) as pool:
            sending = [pool.submit(send_steadily) for _ in range(3)]
            wait_for(lambda: len(answers) >= 3)
            os.kill(process.pid, signal.SIGTERM)
            for future in sending:
                future.result(60)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0, errors
    assert set(answers) == {200}
    # What comes in the moment of the stop gRPC turns away by itself; of what the service took all was answered.
    assert set(lost) <= {"StatusCode.UNAVAILABLE", "StatusCode.CANCELLED"}, lost
    logged = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert [line["status"] for line in logged] == [200] * len(answers)
