"""The Open Inference Protocol, asked by Triton's client over HTTP and gRPC, and by hand where that one never errs."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from oip_client import MOST, Triton, running_oip
from served import ask, wait_for
from tritonclient import grpc as triton_grpc
from tritonclient import http as triton_http
from tritonclient.utils import InferenceServerException, deserialize_bytes_tensor

from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.ort_runtime import OrtRuntime
from ivdr_deploy.serving.http.server import HttpServer
from ivdr_deploy.video.decode import open_video
from ivdr_deploy.video.frame_array import pack_frames

pytestmark = pytest.mark.slow

INFER = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def oip(tiny_bundle: Path) -> Iterator[HttpServer]:
    with running_oip(tiny_bundle) as running:
        yield running


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
    found = triton.infer([video], outputs=["label"], request_id="\u20ac" * 255)
    assert triton.said(found.get_response())["id"] == "\u20ac" * 255
    for arguments, words in (
        ({"parameters": {"topk": 2}}, "unknown parameter 'topk'"),
        ({"parameters": {"num_clips": 10_000}}, "num_clips must be between 1 and 64"),
        ({"parameters": {"top_k": "x"}}, "top_k"),
        ({"outputs": ["labels"]}, "no output 'labels'. it has: label, score"),
        ({"request_id": "x" * 256}, "the id has 256 characters, expected at most 255"),
        ({"request_id": "\u20ac" * 100_000}, "the id has 100000 characters"),
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


def test_too_many_videos_of_frames_are_refused_before_one_is_put_into_a_file(
    triton: Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bytes] = []

    def pack_and_note(*arguments: Any) -> bytes:
        made.append(pack_frames(*arguments))
        return made[-1]

    monkeypatch.setattr("ivdr_deploy.serving.core.oip.pack_frames", pack_and_note)
    for shape in ((MOST + 1, 1, 1, 1, 3), (1000, 1, 1, 1, 3), (10**9, 0, 1, 1, 3)):
        tensors = [
            triton.module.InferInput("frames", shape, "UINT8"),
            triton.module.InferInput("timestamps", shape[:2], "FP64"),
        ]
        for tensor, dtype in zip(tensors, (np.uint8, np.float64), strict=True):
            tensor.set_data_from_numpy(np.zeros(tensor.shape(), dtype))
        with pytest.raises(InferenceServerException, match=f"{shape[0]} videos, more than the {MOST}"):
            triton.client.infer("tiny", tensors)
    assert not made


def test_the_videos_of_a_request_share_the_bound_of_an_answer(
    triton: Triton, videos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    video = videos[0].read_bytes()
    found = triton.infer([video], outputs=["logits", "intra"])
    size = found.as_numpy("logits").nbytes + found.as_numpy("intra").nbytes
    monkeypatch.setattr("ivdr_deploy.serving.core.oip.MAX_ANSWER_BYTES", 2 * size)
    for files in ([video] * 2, [video, b"no video"]):
        triton.infer(files, outputs=["logits", "intra", "status"])
    for files in ([video] * 3, [video, b"no video", b"no video"]):
        with pytest.raises(InferenceServerException, match=f"more than the limit of {2 * size}"):
            triton.infer(files, outputs=["logits", "intra", "status"])


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
MANY = dict.fromkeys(map(str, range(101)), 1)


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
        ({"inputs": [{**GOOD, "datatype": "UINT8", "shape": [0, 10**30], "data": []}]}, {}, 400, "more than"),
        ({"inputs": [{**GOOD, "datatype": "FP64", "data": [[[1]]]}]}, {}, 400, "is no number"),
        ({"inputs": [GOOD], "outputs": [{"name": "score"}] * 2}, {}, 422, "'score' is asked for twice"),
        ({"inputs": [{**GOOD, "data": ["*"]}]}, {}, 400, "not base64"),
        ({"inputs": [{**GOOD, "data": [1]}]}, {}, 400, "expected base64"),
        ({"inputs": [{**GOOD, "parameters": {"x": 1}}]}, {}, 422, "unknown parameter 'x'"),
        (
            {"inputs": [{**GOOD, "data": None, "parameters": {"binary_data_size": 9}}]},
            {},
            400,
            "0 bytes are left",
        ),
        (
            {"inputs": [{**GOOD, "parameters": {"binary_data_size": 0}}]},
            {},
            400,
            "data and a binary_data_size",
        ),
        ({"inputs": [GOOD] * 101}, {}, 400, "101 inputs, expected at most 100"),
        (
            {"inputs": [], "outputs": [{"name": f"{place}"} for place in range(20_000)]},
            {},
            400,
            "20000 outputs, expected at most 100",
        ),
        ({"inputs": [GOOD], "parameters": MANY}, {}, 400, "101 parameters, expected"),
        ({"inputs": [{**GOOD, "parameters": MANY}]}, {}, 400, "101 parameters, expected"),
        (
            {"inputs": [GOOD], "outputs": [{"name": "score", "parameters": MANY}]},
            {},
            400,
            "101 parameters, expected",
        ),
        ({"inputs": [{**GOOD, "shape": [1] * 101}]}, {}, 400, "101 extents in a shape, expected"),
        (b'{"id": "1", "id": "2", "inputs": []}', {}, 400, "'id' is given twice"),
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


def test_json_of_more_values_than_any_request_has_is_refused(
    oip: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ivdr_deploy.serving.http.oip_wire._MOST_VALUES", 100)
    body = json.dumps({"inputs": [{**GOOD, "data": [[]] * 100}]}).encode()
    status, content, _ = ask_raw(oip, body)
    assert (status, json.loads(content)["message"]) == (400, "the request holds more than 100 values")


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
