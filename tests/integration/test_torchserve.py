"""What the endpoint answers over HTTP: one real TorchServe for all tests here."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest
from served import SETTINGS, wait_for
from videos import numbered_video

from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.records import to_dict
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.serving.torchserve.process import TorchServeProcess

pytestmark = [pytest.mark.torchserve, pytest.mark.slow]


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Iterator[VideoPredictor]:
    model = open_model(tiny_bundle, threads=1)
    with model.runtime, VideoPredictor(model) as opened:
        yield opened


def test_each_form_of_request_gets_the_answer_of_the_predictor(
    server: TorchServeProcess, predictor: VideoPredictor, videos: list[Path]
) -> None:
    model = predictor.model
    for path in videos:
        result = predictor.predict(path)
        body = {
            "video": base64.b64encode(path.read_bytes()).decode(),
            "options": {"outputs": ["labels", "inter"]},
        }
        answers = [
            server.client.predict(path),
            server.client.post(json.dumps(body).encode(), content_type="application/json"),
            server.client.predict(path, options={"outputs": ["labels", "inter"], "timings": True}),
        ]
        for status, answer in answers:
            assert status == 200
            assert answer["predictions"] == [
                {"label": n, "score": pytest.approx(s, abs=1e-6)} for n, s in result.top(5)
            ]
            assert answer["model"]["variant"] == "onnx-fp32"
            assert answer["model"]["contract_hash"] == model.contract_hash
            assert answer["view_plan"] == to_dict(model.view_plan)
            assert answer["video"]["num_frames"] == result.info.num_frames
        assert result.inter is not None
        assert (
            answers[1][1]["inter"] == answers[2][1]["inter"] == pytest.approx(result.inter.tolist(), abs=1e-6)
        )
        assert set(answers[2][1]["timings"]) == {"decode_ms", "preprocess_ms", "infer_ms"}


def test_batch_with_bad_items_answers_each_by_itself(server: TorchServeProcess, videos: list[Path]) -> None:
    expected = [server.client.predict(path)[1]["predictions"][0]["label"] for path in videos]
    sent = [videos[0].read_bytes(), b"hello", videos[1].read_bytes(), videos[2].read_bytes()]

    def value(name: str) -> float:
        return sum(value for key, value in server.client.metrics().items() if key.startswith(name))

    before = value("ivdr_clips_total"), value('ivdr_requests_total{outcome="unreadable"')
    with ThreadPoolExecutor(len(sent)) as pool:
        answers = list(pool.map(server.client.predict, sent))
    assert [status for status, _ in answers] == [200, 400, 200, 200]
    assert [answers[i][1]["predictions"][0]["label"] for i in (0, 2, 3)] == expected
    assert answers[1][1]["code"] == "unreadable"
    wait_for(lambda: value("ivdr_clips_total") == before[0] + 3 * answers[0][1]["view_plan"]["num_clips"])
    assert value('ivdr_requests_total{outcome="unreadable"') == before[1] + 1
    busy = re.findall(r"ivdr_busy\.Count:([\d.]+)", (server.config.logs / "ts_log.log").read_text())
    assert max(map(float, busy)) > 1, "the requests did not share a batch"


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        (b"", "application/octet-stream", 400, "bad_request"),
        (b"hello", "text/plain", 400, "bad_request"),
        (b'{"video": "x', "application/json", 400, "bad_request"),
        (b'{"video": "", "options": {"topk": 1}}', "application/json", 422, "bad_option"),
        (b"\0" * 2_100_000, "video/mp4", 413, "too_large"),
        (b"\0" * 5_000_000, "video/mp4", 413, "server"),
    ],
    ids=["empty", "text", "broken-json", "option", "over-our-limit", "over-the-servers-limit"],
)
def test_error_statuses_reach_the_client(
    server: TorchServeProcess, body: bytes, content_type: str, status: int, code: str
) -> None:
    got, answer = server.client.post(body, content_type=content_type)
    assert (got, answer["code"]) == (status, code)
    assert answer["message"]


def test_large_wrong_requests_cost_their_own_answer_alone(
    server: TorchServeProcess, videos: list[Path]
) -> None:
    (worker,) = server.client.describe()["workers"]
    long = "A" * 3_000_000
    wrong = [[{"video": long}], {"video": "AAAA", "options": long}, {"video": "AAAA", long: 1}]
    bodies = [json.dumps(value).encode() for value in wrong] + [b'{"video": ' + b"[" * 100_000]
    with ThreadPoolExecutor(8) as pool:
        bad = [pool.submit(server.client.post, body, content_type="application/json") for body in bodies]
        good = [pool.submit(server.client.predict, videos[i % 3]) for i in range(4)]
    assert [(status, answer["code"]) for status, answer in (future.result() for future in bad)] == [
        (400, "bad_request"),
        (400, "bad_request"),
        (400, "bad_request"),
        (400, "bad_request"),
    ]
    assert all(len(json.dumps(future.result()[1])) < 1000 for future in bad)
    assert [future.result()[0] for future in good] == [200] * 4
    assert server.client.describe()["workers"][0]["pid"] == worker["pid"], "the worker was killed"


def ask(
    server: TorchServeProcess,
    method: str,
    query: str = "",
    body: bytes | None = None,
    *,
    path: str = "/predictions/tiny",
    **headers: str,
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Send any HTTP request; returns status, body and headers."""
    ports = server.config.ports
    with closing(HTTPConnection("127.0.0.1", ports.inference, timeout=60)) as connection:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, f"{path}{query}", body=body, headers=named)
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text else {}, dict(answer.getheaders())


def test_query_is_honoured_or_refused_where_torchserve_passes_it_on(
    server: TorchServeProcess, videos: list[Path]
) -> None:
    video, path = videos[0].read_bytes(), "/models/tiny/invoke"
    status, answer, _ = ask(server, "POST", "?top_k=1&timings=true", video, path=path)
    assert (status, len(answer["predictions"])) == (200, 1)
    assert answer["timings"]
    body = json.dumps({"video": base64.encodebytes(video).decode()}).encode()
    json_type = {"Content_Type": "application/json"}
    status, answer, _ = ask(server, "PUT", "?outputs=inter,intra", body, path=path, **json_type)
    assert (status, set(answer) & {"predictions", "inter", "intra"}) == (200, {"inter", "intra"})
    for query in ("?topk=1", "?top_k=x", "?top_k=", "?x=1"):
        status, answer, _ = ask(server, "POST", query, video, path=path)
        assert (status, answer["code"]) == (422, "bad_option"), query


def test_query_of_the_predictions_address_is_dropped_by_torchserve(
    server: TorchServeProcess, videos: list[Path]
) -> None:
    # docs/serving.md says so. When this fails, TorchServe passes it on and the sentence there can go.
    status, answer, _ = ask(server, "POST", "?top_k=1", videos[0].read_bytes())
    assert (status, len(answer["predictions"])) == (200, 5)


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
def test_other_methods_are_told_from_empty_requests(server: TorchServeProcess, method: str) -> None:
    status, answer, headers = ask(server, method, "?top_k=1")
    assert (status, headers["Allow"]) == (405, "POST, PUT")
    assert method == "HEAD" or answer["code"] == "bad_method"
    status, answer, _ = ask(server, "POST")
    assert (status, answer["code"]) == (400, "bad_request")


def test_options_is_answered_by_torchserve_itself(server: TorchServeProcess) -> None:
    status, answer, _ = ask(server, "OPTIONS")
    assert (status, "openapi" in answer) == (200, True)


def test_compressed_body_is_refused_by_name(server: TorchServeProcess, videos: list[Path]) -> None:
    body = gzip.compress(videos[0].read_bytes())
    status, answer, _ = ask(server, "POST", body=body, Content_Encoding="gzip")
    assert (status, answer["code"]) == (415, "bad_encoding")
    assert "gzip" in answer["message"]


def test_files_without_pictures_and_with_too_many_are_told_apart(
    server: TorchServeProcess, shared_data: Path, tmp_path: Path
) -> None:
    status, answer = server.client.predict(shared_data / "odd" / "audio_only.m4a")
    assert (status, answer["code"]) == (415, "no_video_stream")
    status, answer = server.client.predict(
        numbered_video(tmp_path / "long.mp4", num_frames=150, size=(64, 48))
    )
    assert (status, answer["code"]) == (413, "too_large")


def test_metrics_endpoint_counts_requests_and_stages(server: TorchServeProcess, videos: list[Path]) -> None:
    def value(prefix: str) -> float:
        return sum(v for name, v in server.client.metrics().items() if name.startswith(prefix))

    before = {
        name: value(name)
        for name in (
            'ivdr_requests_total{outcome="ok"',
            "ivdr_clips_total",
            "ivdr_decode_seconds_count",
            'ivdr_batch_clips_bucket{le="8"',
            'ivdr_batch_clips_bucket{le="4"',
        )
    }
    assert server.client.predict(videos[0], options={"num_clips": 5})[0] == 200
    wait_for(lambda: value("ivdr_clips_total") == before["ivdr_clips_total"] + 5)
    added = dict.fromkeys(before, 1) | {"ivdr_clips_total": 5, 'ivdr_batch_clips_bucket{le="4"': 0}
    for name, more in added.items():
        wait_for(lambda name=name, more=more: value(name) == before[name] + more)  # type: ignore[misc]
    assert value("ivdr_infer_seconds_sum") > 0
    assert value("ivdr_busy") == 0


def test_ready_worker_has_replayed_the_golden_clips(
    server: TorchServeProcess, predictor: VideoPredictor
) -> None:
    assert server.worker_facts["contract_hash"] == predictor.model.contract_hash
    assert server.worker_facts["variant"] == "onnx-fp32"
    assert max(server.worker_facts["decode_mean_diff"].values()) < 2.5
    assert 0 <= max(server.worker_facts["golden_max_abs_diff"].values()) < 1e-4
    assert server.client.ready()


def test_questions_of_the_management_port_do_not_disturb_predictions(
    server: TorchServeProcess, videos: list[Path]
) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(server.client.predict, videos[0]) for _ in range(4)]
        questions = [pool.submit(server.client.describe, ask_worker=True) for _ in range(4)]
    assert [answer.result()[0] for answer in answers] == [200] * 4
    assert all(question.result()["customizedMetadata"]["name"] == "tiny" for question in questions)


def test_requests_beyond_the_queue_are_refused_and_the_others_answered(
    server: TorchServeProcess, videos: list[Path]
) -> None:
    def send(_: int) -> int:
        return server.client.predict(videos[2], options={"num_clips": 64})[0]

    with ThreadPoolExecutor(60) as pool:
        statuses = list(pool.map(send, range(60)))
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= SETTINGS.queue_size
    assert server.client.predict(videos[0])[0] == 200


def test_decode_workers_are_small_and_end_with_their_worker(
    server: TorchServeProcess, videos: list[Path]
) -> None:
    def workers() -> list[psutil.Process]:
        (described,) = server.client.describe()["workers"]
        return psutil.Process(int(described["pid"])).children(recursive=True)

    before = workers()
    assert len(before) == SETTINGS.service.decode_workers + 2
    for process in before:
        assert process.memory_info().rss < 100 << 20
        assert not any("libtorch" in mapped.path for mapped in process.memory_maps())
    (described,) = server.client.describe()["workers"]
    os.kill(int(described["pid"]), signal.SIGKILL)
    _, alive = psutil.wait_procs(before, timeout=20)
    assert not alive
    wait_for(server.client.ready)  # TorchServe starts another one
    assert server.client.predict(videos[0])[0] == 200
    assert not set(before) & set(workers())
