"""What the endpoint answers over HTTP, the same behind TorchServe and behind the HTTP server of its own."""

from __future__ import annotations

import base64
import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served import ask, wait_for
from videos import numbered_video

from ivdr_deploy.benchmarks.endpoint import measure_endpoint
from ivdr_deploy.events import TimelinePlan
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.records import to_dict
from ivdr_deploy.serving.client import EndpointClient
from ivdr_deploy.timeline import describe_found, look_through

pytestmark = pytest.mark.slow


def test_each_form_of_request_gets_the_answer_of_the_predictor(
    endpoint: EndpointClient, predictor: VideoPredictor, videos: list[Path]
) -> None:
    model = predictor.model
    for path in videos:
        result = predictor.predict(path)
        body = {
            "video": base64.b64encode(path.read_bytes()).decode(),
            "options": {"outputs": ["labels", "inter"]},
        }
        answers = [
            endpoint.predict(path),
            endpoint.post(json.dumps(body).encode(), content_type="application/json"),
            endpoint.predict(path, options={"outputs": ["labels", "inter"], "timings": True}),
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


def test_a_timeline_in_one_piece_is_what_the_library_says(
    endpoint: EndpointClient, predictor: VideoPredictor, videos: list[Path]
) -> None:
    options = {"hop": 2, "enter": 0.15, "leave": 0.1, "min_seconds": 0.0}
    found = [
        describe_found(item, top_k=2)
        for item in look_through(predictor, videos[2], TimelinePlan(**options))  # type: ignore[arg-type]
    ]
    status, answer = endpoint.predict(videos[2], options={"timeline": options, "top_k": 2})
    assert (status, answer["hop"], answer["video"]["num_frames"]) == (200, 2, 40)
    for kind, count in (("window", 17), ("event", 1)):
        wanted = [values for name, values in found if name == kind]
        assert len(answer[f"{kind}s"]) == len(wanted) >= count
        for said, same in zip(answer[f"{kind}s"], wanted, strict=True):
            assert said["start_seconds"] == same["start_seconds"]
            assert said["end_seconds"] == same["end_seconds"]
    assert answer["windows"][0]["predictions"] == [
        {"label": top["label"], "score": pytest.approx(top["score"], abs=1e-6)}
        for top in next(values for name, values in found if name == "window")["predictions"]
    ]
    status, answer = endpoint.predict(videos[2], options={"timeline": True, "num_clips": 3})
    assert (status, answer["code"]) == (422, "bad_option")


def test_no_video_is_fetched_unless_hosts_are_named(endpoint: EndpointClient) -> None:
    body = json.dumps({"video_url": "https://videos.example/a.mp4?token=secret"}).encode()
    status, answer = endpoint.post(body, content_type="application/json")
    assert (status, answer["code"]) == (422, "bad_url")
    assert "secret" not in json.dumps(answer)


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        (b"", "application/octet-stream", 400, "bad_request"),
        (b"hello", "text/plain", 400, None),  # TorchServe makes text of it, which is no video
        (b'{"video": "x', "application/json", 400, "bad_request"),
        (b'{"video": "", "options": {"topk": 1}}', "application/json", 422, "bad_option"),
        (b"\0" * 2_100_000, "video/mp4", 413, "too_large"),
        (b"\0" * 5_000_000, "video/mp4", 413, None),
    ],
    ids=["empty", "text", "broken-json", "option", "over-our-limit", "over-the-servers-limit"],
)
def test_error_statuses_reach_the_client(
    endpoint: EndpointClient, body: bytes, content_type: str, status: int, code: str | None
) -> None:
    got, answer = endpoint.post(body, content_type=content_type)
    assert got == status
    assert code in (None, answer["code"])
    assert answer["message"]


def test_large_wrong_requests_cost_their_own_answer_alone(
    endpoint: EndpointClient, videos: list[Path]
) -> None:
    (worker,) = endpoint.describe()["workers"]
    long = "A" * 3_000_000
    wrong = [[{"video": long}], {"video": "AAAA", "options": long}, {"video": "AAAA", long: 1}]
    bodies = [json.dumps(value).encode() for value in wrong] + [b'{"video": ' + b"[" * 100_000]
    with ThreadPoolExecutor(8) as pool:
        bad = [pool.submit(endpoint.post, body, content_type="application/json") for body in bodies]
        good = [pool.submit(endpoint.predict, videos[i % 3]) for i in range(4)]
    assert [(status, answer["code"]) for status, answer in (future.result() for future in bad)] == [
        (400, "bad_request"),
        (400, "bad_request"),
        (400, "bad_request"),
        (400, "bad_request"),
    ]
    assert all(len(json.dumps(future.result()[1])) < 1000 for future in bad)
    assert [future.result()[0] for future in good] == [200] * 4
    assert endpoint.describe()["workers"][0]["pid"] == worker["pid"], "the worker was killed"


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
def test_other_methods_are_told_from_empty_requests(endpoint: EndpointClient, method: str) -> None:
    status, answer, headers = ask(endpoint, method, "?top_k=1")
    assert (status, sorted(headers["allow"].split(", "))) == (405, ["POST", "PUT"])
    assert method == "HEAD" or answer["code"] == "bad_method"
    status, answer, _ = ask(endpoint, "POST")
    assert (status, answer["code"]) == (400, "bad_request")


def test_compressed_body_is_refused_by_name(endpoint: EndpointClient, videos: list[Path]) -> None:
    body = gzip.compress(videos[0].read_bytes())
    status, answer, _ = ask(endpoint, "POST", body=body, Content_Encoding="gzip")
    assert (status, answer["code"]) == (415, "bad_encoding")
    assert "gzip" in answer["message"]


def test_files_without_pictures_and_with_too_many_are_told_apart(
    endpoint: EndpointClient, shared_data: Path, tmp_path: Path
) -> None:
    status, answer = endpoint.predict(shared_data / "odd" / "audio_only.m4a")
    assert (status, answer["code"]) == (415, "no_video_stream")
    status, answer = endpoint.predict(numbered_video(tmp_path / "long.mp4", num_frames=150, size=(64, 48)))
    assert (status, answer["code"]) == (413, "too_large")


def test_metrics_endpoint_counts_requests_and_stages(endpoint: EndpointClient, videos: list[Path]) -> None:
    def value(prefix: str) -> float:
        return sum(v for name, v in endpoint.metrics().items() if name.startswith(prefix))

    wait_for(
        lambda: value("ivdr_busy") == 0
    )  # TorchServe hears of a batch when it is over, and a while after that
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
    assert endpoint.predict(videos[0], options={"num_clips": 5})[0] == 200
    wait_for(lambda: value("ivdr_clips_total") == before["ivdr_clips_total"] + 5)
    added = dict.fromkeys(before, 1) | {"ivdr_clips_total": 5, 'ivdr_batch_clips_bucket{le="4"': 0}
    for name, more in added.items():
        wait_for(lambda name=name, more=more: value(name) == before[name] + more)  # type: ignore[misc]
    wait_for(lambda: value("ivdr_infer_seconds_sum") > 0)
    wait_for(lambda: value("ivdr_busy") == 0)


def test_load_can_be_put_on_it_and_its_stages_are_told(endpoint: EndpointClient, videos: list[Path]) -> None:
    bodies = [path.read_bytes() for path in videos]
    found = measure_endpoint(endpoint.predict_url, bodies, rates=[4.0], seconds=1.0)
    for step in (found.closed, *found.steps):
        assert step.outcomes == {"200": len(step.samples)}
        for sample in step.samples:
            assert set(sample.stages) == {"decode_ms", "preprocess_ms", "infer_ms"}
            assert 0 < sum(sample.stages.values()) < sample.latency_ms
