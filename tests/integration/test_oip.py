"""The Open Inference Protocol, asked by Triton's client over HTTP and gRPC, and by hand where that one never errs."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served import SETTINGS, announced, ask, running_http, wait_for
from tritonclient import grpc as triton_grpc
from tritonclient import http as triton_http
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, deserialize_bytes_tensor
from videos import numbered_video

from ivdr_deploy.errors import ConfigError, QueueFullError, ServerError
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.ort_runtime import OrtRuntime
from ivdr_deploy.serving.http.server import HttpServer
from ivdr_deploy.serving.http.settings import HttpSettings
from ivdr_deploy.video.decode import open_video
from ivdr_deploy.video.frame_array import pack_frames

pytestmark = pytest.mark.slow

MOST = 6
INFER = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def oip(tiny_bundle: Path) -> Iterator[HttpServer]:
    settings = HttpSettings(service=SETTINGS.service, max_requests=MOST, canary_seconds=0.1)
    with running_http(tiny_bundle, settings, grpc_port=0) as running:
        yield running


class Triton:
    """Triton's client, over one of the two ways."""

    def __init__(self, module: Any, url: str) -> None:
        self.module = module
        self.client = module.InferenceServerClient(url)

    def infer(
        self,
        files: Sequence[bytes],
        *,
        outputs: Sequence[str] | None = None,
        model: str = "tiny",
        **arguments: Any,
    ) -> Any:
        tensor = self.module.InferInput("video", [len(files)], "BYTES")
        tensor.set_data_from_numpy(np.array(files, dtype=np.object_))
        asked = None if outputs is None else [self.module.InferRequestedOutput(name) for name in outputs]
        return self.client.infer(model, [tensor], outputs=asked, **arguments)

    def said(self, answer: Any) -> dict[str, Any]:
        """What a call without tensors says, as JSON has it."""
        if isinstance(answer, dict):
            return answer
        from google.protobuf.json_format import MessageToDict

        return dict(MessageToDict(answer, preserving_proto_field_name=True))


@pytest.fixture(scope="module", params=["http", "grpc"])
def triton(request: pytest.FixtureRequest, oip: HttpServer) -> Iterator[Triton]:
    if request.param == "http":
        opened = Triton(triton_http, oip.client.inference_url.removeprefix("http://"))
    else:
        opened = Triton(triton_grpc, str(oip.grpc_address))
    yield opened
    opened.client.close()


def test_a_batch_of_videos_gets_for_each_what_the_predictor_says(
    triton: Triton, predictor: VideoPredictor, videos: list[Path]
) -> None:
    found = triton.infer([path.read_bytes() for path in videos], request_id="mine")
    for row, path in enumerate(videos):
        result = predictor.predict(path)
        top = result.top(5)
        assert [text.decode() for text in found.as_numpy("label")[row]] == [label for label, _ in top]
        np.testing.assert_allclose(found.as_numpy("score")[row], [score for _, score in top], atol=1e-6)
        expected = {
            "probabilities": result.probabilities,
            "logits": result.clip_logits,
            "feature": result.feature,
            "inter": result.inter,
            "intra": result.intra,
            "clip_seconds": result.clip_seconds,
        }
        for name, value in expected.items():
            np.testing.assert_allclose(found.as_numpy(name)[row], value, atol=1e-5, err_msg=name)
    assert found.as_numpy("status") is None, "what hides a failure must be asked for"
    said = triton.said(found.get_response())
    assert (said["model_name"], said["model_version"], said["id"]) == ("tiny", "1.0", "mine")


def test_what_it_says_about_itself_is_what_it_gives(triton: Triton, videos: list[Path]) -> None:
    assert triton.client.is_server_live()
    assert triton.client.is_server_ready()
    assert triton.client.is_model_ready("tiny")
    assert triton.client.is_model_ready("tiny", "1.0")
    assert triton.said(triton.client.get_server_metadata())["extensions"] == ["binary_tensor_data"]
    said = triton.said(triton.client.get_model_metadata("tiny"))
    assert (said["name"], said["versions"], said["platform"]) == ("tiny", ["1.0"], "ivdr_onnxruntime")
    assert [tensor["name"] for tensor in said["inputs"]] == ["video", "frames", "timestamps"]
    names = [tensor["name"] for tensor in said["outputs"]]
    found = triton.infer([videos[0].read_bytes()] * 2, outputs=names)
    for tensor in said["outputs"]:
        shape = found.as_numpy(tensor["name"]).shape
        declared = [int(extent) for extent in tensor["shape"]]
        assert len(shape) == len(declared), tensor
        assert all(want in (-1, have) for have, want in zip(shape, declared, strict=True)), tensor
        assert found.get_output(tensor["name"])
    assert shape == (2,)


def test_frames_that_somebody_else_decoded_are_sampled_by_their_times(
    triton: Triton, predictor: VideoPredictor, videos: list[Path]
) -> None:
    with open_video(videos[1]) as reader:
        frames, times = reader.read(range(reader.info.num_frames)), reader.pts_seconds

    def send(pixels: np.ndarray, seconds: np.ndarray) -> Any:
        tensors = [
            triton.module.InferInput("frames", pixels.shape, "UINT8"),
            triton.module.InferInput("timestamps", seconds.shape, "FP64"),
        ]
        for tensor, value in zip(tensors, (pixels, seconds), strict=True):
            tensor.set_data_from_numpy(value)
        return triton.client.infer("tiny", tensors)

    both = np.stack([frames, frames[::-1]]), np.stack([times, times * 2 + 1])
    found = send(*both)
    for row in range(2):
        expected = predictor.predict(pack_frames(both[0][row], both[1][row]))
        np.testing.assert_allclose(found.as_numpy("logits")[row], expected.clip_logits, atol=1e-5)
        np.testing.assert_allclose(found.as_numpy("clip_seconds")[row], expected.clip_seconds)
    ends = found.as_numpy("clip_seconds").max(axis=(1, 2))
    assert ends[1] == pytest.approx(2 * ends[0])
    for pixels, seconds, words in (
        (both[0], both[1][:, ::-1].copy(), "does not rise"),
        (both[0], both[1][:, 1:].copy(), "expected UINT8"),
        (both[0][..., :2].copy(), both[1], "expected uint8"),
    ):
        with pytest.raises(InferenceServerException, match=words):
            send(pixels, seconds)


def test_parameters_choose_and_wrong_ones_are_refused(triton: Triton, videos: list[Path]) -> None:
    video = videos[0].read_bytes()
    found = triton.infer([video], outputs=["label", "clip_seconds"], parameters={"top_k": 2, "num_clips": 3})
    assert found.as_numpy("label").shape == (1, 2)
    assert found.as_numpy("clip_seconds").shape == (1, 3, 2)
    assert found.as_numpy("score") is None
    for arguments, words in (
        ({"parameters": {"topk": 2}}, "unknown parameter 'topk'"),
        ({"parameters": {"num_clips": 10_000}}, "num_clips must be between 1 and 64"),
        ({"parameters": {"top_k": "x"}}, "top_k"),
        ({"outputs": ["labels"]}, "no output 'labels'. it has: label, score"),
        ({"model": "other"}, None),
        ({"model_version": "2"}, None),
    ):
        with pytest.raises(InferenceServerException, match=words):
            triton.infer([video], **arguments)  # type: ignore[arg-type]


def test_one_bad_video_fails_the_request_by_name_or_has_a_status_of_its_own(
    triton: Triton, predictor: VideoPredictor, videos: list[Path]
) -> None:
    files = [videos[0].read_bytes(), b"no video", videos[1].read_bytes()]
    with pytest.raises(InferenceServerException, match=r"video 1 of 3 \(counted from 0\): .*not a video"):
        triton.infer(files)
    found = triton.infer(files, outputs=["status", "error", "label", "score", "inter"])
    assert found.as_numpy("status").tolist() == [200, 400, 200]
    said = [json.loads(text or b"{}") for text in found.as_numpy("error")]
    assert [error.get("code") for error in said] == [None, "unreadable", None]
    for row, path in ((0, videos[0]), (2, videos[1])):
        result = predictor.predict(path)
        np.testing.assert_allclose(found.as_numpy("inter")[row], result.inter, atol=1e-5)
        assert found.as_numpy("label")[row][0].decode() == result.top(1)[0][0]
    assert np.isnan(found.as_numpy("inter")[1]).all()
    assert not any(found.as_numpy("label")[1])
    only_bad = triton.infer([b"no video"], outputs=["status", "score", "intra"])
    assert only_bad.as_numpy("status").tolist() == [400]


def test_videos_count_one_by_one_whatever_they_came_in(
    triton: Triton, oip: HttpServer, videos: list[Path]
) -> None:
    with pytest.raises(InferenceServerException, match=f"{MOST + 1} videos, more than the {MOST}"):
        triton.infer([videos[0].read_bytes()] * (MOST + 1))
    with oip.admission.taking(MOST - 1):
        with pytest.raises(InferenceServerException, match="there is no room for 2 more"):
            triton.infer([videos[0].read_bytes()] * 2)
        assert triton.infer([videos[0].read_bytes()], outputs=["status"]).as_numpy("status") == [200]
        assert triton.client.is_server_ready(), "a busy server is ready"
    name = 'ivdr_requests_total{outcome="ok"}'
    before = oip.client.metrics()[name]
    triton.infer([videos[0].read_bytes()] * MOST)
    assert oip.client.metrics()[name] == before + MOST


def test_a_network_that_answers_wrong_is_not_ready(
    triton: Triton, oip: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = OrtRuntime.infer

    def wrong(runtime: OrtRuntime, video: np.ndarray) -> dict[str, np.ndarray]:
        return {name: value + 1 for name, value in right(runtime, video).items()}

    health = health_pb2_grpc.HealthStub(grpc.insecure_channel(str(oip.grpc_address)))
    with monkeypatch.context() as patch:
        patch.setattr(OrtRuntime, "infer", wrong)
        wait_for(lambda: not triton.client.is_server_ready())
        assert not triton.client.is_model_ready("tiny")
        assert triton.client.is_server_live()
        asked = health.Check(health_pb2.HealthCheckRequest())
        assert asked.status == health_pb2.HealthCheckResponse.NOT_SERVING
    wait_for(triton.client.is_server_ready)
    assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING


def test_json_alone_carries_a_video_in_base64(
    oip: HttpServer, predictor: VideoPredictor, videos: list[Path]
) -> None:
    video = base64.b64encode(videos[0].read_bytes()).decode()
    body = {"id": "7", "inputs": [{"name": "video", "datatype": "BYTES", "shape": [1, 1], "data": [[video]]}]}
    status, answer, headers = ask(oip.client, "POST", body=json.dumps(body).encode(), path=INFER)
    assert (status, answer["id"], answer["model_version"]) == (200, "7", "1.0")
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"]
    assert answer["parameters"]["contract_hash"] == predictor.model.contract_hash
    outputs = {tensor["name"]: tensor for tensor in answer["outputs"]}
    top = predictor.predict(videos[0]).top(5)
    assert outputs["label"]["data"] == [label for label, _ in top]
    assert outputs["score"]["data"] == pytest.approx([score for _, score in top], abs=1e-6)
    bad = {
        **body,
        "inputs": [{**body["inputs"][0], "data": ["AAAA"]}],
        "outputs": [{"name": "status"}, {"name": "score"}],
    }  # type: ignore[index, dict-item]
    status, answer, _ = ask(oip.client, "POST", body=json.dumps(bad).encode(), path=INFER)
    assert (status, [tensor["data"] for tensor in answer["outputs"]]) == (200, [[400], [None] * 0])


def test_tensors_behind_the_json_are_answered_in_kind(oip: HttpServer, videos: list[Path]) -> None:
    video = videos[0].read_bytes()
    raw = len(video).to_bytes(4, "little") + video
    said: dict[str, Any] = {"name": "video", "datatype": "BYTES", "shape": [1]}
    said["parameters"] = {"binary_data_size": len(raw)}
    outputs = [{"name": "label", "parameters": {"binary_data": True}}, {"name": "score"}]
    text = json.dumps({"inputs": [said], "outputs": outputs}).encode()
    status, body, headers = ask_raw(oip, text + raw, Inference_Header_Content_Length=str(len(text)))
    assert status == 200
    length = int(headers["inference-header-content-length"])
    label, score = json.loads(body[:length])["outputs"]
    assert label["parameters"]["binary_data_size"] == len(body) - length
    assert len(deserialize_bytes_tensor(body[length:])) == len(score["data"]) == 5


def ask_raw(oip: HttpServer, body: bytes, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    import httpx

    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = httpx.post(oip.client.inference_url + INFER, content=body, headers=named, timeout=60)
    return answer.status_code, answer.content, dict(answer.headers)


GOOD = {"name": "video", "datatype": "BYTES", "shape": [1], "data": ["AAAA"]}


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        (b"", {}, 400, "not JSON"),
        (b"[]", {}, 400, "expected a table"),
        (b"[" * 100_000, {}, 400, "not JSON"),
        ({"inputs": []}, {}, 400, "the inputs none, expected video"),
        ({"inputs": [GOOD], "more": 1}, {}, 400, "unknown key 'more'"),
        ({"inputs": [GOOD, GOOD]}, {}, 400, "expected video"),
        ({"inputs": [{**GOOD, "name": "x" * 500}]}, {}, 400, "expected video"),
        ({"inputs": [{**GOOD, "datatype": "INT8"}]}, {}, 400, "the datatype 'INT8'"),
        ({"inputs": [{**GOOD, "datatype": "FP32", "data": [1.0]}]}, {}, 400, "is FP32, expected BYTES"),
        ({"inputs": [{**GOOD, "shape": [2]}]}, {}, 400, "has 1 elements as data"),
        ({"inputs": [{**GOOD, "shape": [1, 1, 1]}]}, {}, 400, r"expected \[N\]"),
        ({"inputs": [{**GOOD, "shape": [0], "data": []}]}, {}, 400, "N of at least 1"),
        ({"inputs": [{**GOOD, "shape": [-1]}]}, {}, 400, "extents from 0 on"),
        ({"inputs": [{**GOOD, "shape": [10**30]}]}, {}, 400, "which is more than 4096 elements"),
        ({"inputs": [{**GOOD, "data": ["*"]}]}, {}, 400, "not base64"),
        ({"inputs": [{**GOOD, "data": [1]}]}, {}, 400, "expected base64"),
        ({"inputs": [{**GOOD, "parameters": {"x": 1}}]}, {}, 422, "unknown parameter 'x'"),
        ({"inputs": [{**GOOD, "parameters": {"binary_data_size": 9}}]}, {}, 400, "0 bytes are left"),
        ({"inputs": [GOOD], "parameters": {"binary_data_output": 1}}, {}, 422, "expected true or false"),
        (b"{}", {"Inference_Header_Content_Length": "3"}, 400, "the body has 2 bytes"),
        (b"{}", {"Inference_Header_Content_Length": "9" * 5000}, 400, "the body has 2 bytes"),
        ({"inputs": [GOOD]}, {"Content_Encoding": "gzip"}, 415, "Content-Encoding"),
        (b"\0" * 5_000_000, {}, 413, "more than the limit"),
    ],
)
def test_what_is_wrong_is_named(
    oip: HttpServer, body: Any, headers: dict[str, str], status: int, words: str
) -> None:
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    found, content, _ = ask_raw(oip, sent, **headers)
    answer = json.loads(content)
    assert (found, answer["code"] != "internal") == (status, True), answer
    assert answer["error"].startswith(answer["message"])
    assert len(content) < 1500
    assert re.search(words, answer["error"]), answer["error"]


def test_tensors_that_are_cut_off_or_too_long_are_named(oip: HttpServer) -> None:
    for raw, words in (
        (b"\1\0", "cut off in its element 0"),
        (b"\1\0\0\0a\xff\xff\xff\xffb", "cut off in its element 1"),
        (b"\1\0\0\0a\1\0\0\0b", "has 2 elements, its shape says 1"),
    ):
        said = {
            "name": "video",
            "datatype": "BYTES",
            "shape": [1],
            "parameters": {"binary_data_size": len(raw)},
        }
        text = json.dumps({"inputs": [said]}).encode()
        status, content, _ = ask_raw(oip, text + raw, Inference_Header_Content_Length=str(len(text)))
        assert (status, words in json.loads(content)["error"]) == (400, True), content
        status, content, _ = ask_raw(oip, text + raw + b"x", Inference_Header_Content_Length=str(len(text)))
        assert "bytes more" in json.loads(content)["error"] or words in json.loads(content)["error"]


def test_grpc_takes_the_fields_of_a_datatype_too_and_gives_codes(oip: HttpServer, videos: list[Path]) -> None:
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
    request.raw_input_contents.extend([b"", b""])
    assert refused(grpc.StatusCode.INVALID_ARGUMENT)["ivdr-code"] == "bad_request"
    request.model_name = "other"
    refused(grpc.StatusCode.NOT_FOUND)
    with pytest.raises(grpc.RpcError) as caught:
        stub.RepositoryIndex(service_pb2.RepositoryIndexRequest())
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


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
    assert oip.client.metrics()[name] == 0
    lines = [json.loads(each.message) for each in caplog.records if each.name == "ivdr_deploy.access"]
    assert [line["code"] for line in lines if line["path"].endswith("/ModelInfer")] == ["ok"], (
        "the work that was done for it is in the log"
    )


def test_who_shows_no_token_learns_no_more_than_whether_it_is_ready(tiny_bundle: Path) -> None:
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


def test_a_port_of_grpc_that_is_taken_is_named(oip: HttpServer, tiny_bundle: Path) -> None:
    port = int(str(oip.grpc_address).rpartition(":")[2])
    with pytest.raises(ServerError, match=f"port {port} \\(gRPC\\)"):
        HttpServer(tiny_bundle, HttpSettings(), port=0, grpc_port=port).__enter__()
    with pytest.raises(ConfigError, match="grpc_port must be"):
        HttpServer(tiny_bundle, HttpSettings(), port=0, grpc_port=65536).__enter__()


def test_calls_that_were_taken_are_answered_when_it_stops(tiny_bundle: Path, tmp_path: Path) -> None:
    slow = numbered_video(tmp_path / "long.mp4", num_frames=900, size=(320, 240)).read_bytes()
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
    assert set(lost) <= {"StatusCode.UNAVAILABLE"}, lost
    logged = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert [line["status"] for line in logged] == [200] * len(answers)
