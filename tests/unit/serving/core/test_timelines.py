"""Timelines through the service: in one piece and as they are found, a few at a time, with errors in their place."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from videos import numbered_video

from ivdr_deploy.errors import ConfigError
from ivdr_deploy.events import TimelinePlan
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.serving.core.metrics import BUSY, Series
from ivdr_deploy.serving.core.schema import Response
from ivdr_deploy.serving.core.service import InferenceService
from ivdr_deploy.serving.core.settings import ENDPOINT_LIMITS, ServiceSettings
from ivdr_deploy.timeline import describe_found, look_through


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return numbered_video(
        tmp_path_factory.mktemp("long") / "a.mp4", num_frames=150, size=(64, 48)
    ).read_bytes()


@pytest.fixture
def other(service: InferenceService) -> Iterator[InferenceService]:
    """A service with settings of its own over the same model."""
    settings = ServiceSettings(decode_workers=1, max_timelines=1)
    opened = InferenceService(service.model, settings)
    yield opened
    opened._predictor.close()


def ask(service: InferenceService, video: bytes, **options: Any) -> tuple[int, dict[str, Any]]:
    answer = service.submit({"video": video, "options": options}).result(60)
    return answer.status, json.loads(answer.json)


def followed(service: InferenceService, video: bytes, **options: Any) -> list[Any]:
    return list(service.follow({"video": video, "options": options}))


def outcomes(service: InferenceService) -> dict[str, float]:
    return {
        dict(series.labels)["outcome"]: value
        for series, value in service.metrics.values().items()
        if series.name == "ivdr_requests_total"
    }


def test_an_answer_in_one_piece_is_what_is_told_piece_by_piece_and_what_the_library_says(
    service: InferenceService, long: bytes
) -> None:
    options = {"hop": 3, "enter": 0.2, "leave": 0.15, "min_seconds": 0.0}
    status, body = ask(service, long, timeline=options, top_k=2)
    assert status == 200
    assert set(body) == {"windows", "events", "hop", "video", "model"}
    assert body["video"]["num_frames"] == 150
    assert body["model"]["contract_hash"] == service.model.contract_hash
    with VideoPredictor(service.model) as predictor:
        expected = [
            describe_found(item, top_k=2) for item in look_through(predictor, long, TimelinePlan(**options))
        ]
    near = {"abs": 1e-5}
    for kind in ("window", "event"):
        said, wanted = body[f"{kind}s"], [values for found, values in expected if found == kind]
        assert len(said) == len(wanted)
        for one, same in zip(said, wanted, strict=True):
            assert [one["start_seconds"], one["end_seconds"]] == [same["start_seconds"], same["end_seconds"]]
            if kind == "window":
                assert [p["score"] for p in one["predictions"]] == pytest.approx(
                    [p["score"] for p in same["predictions"]], **near
                )
    assert len(body["windows"]) == 49
    told = followed(service, long, timeline=options, top_k=2, timings=True)
    assert [values for kind, values in told if kind == "event"] == [
        {**event, "score": pytest.approx(event["score"], **near)} for event in body["events"]
    ]
    assert told[-1][0] == "summary"
    assert told[-1][1]["windows"] == 49
    assert min(told[-1][1]["timings"].values()) > 0
    assert [kind for kind, _ in told[:-1]].count("window") == 49


def test_true_takes_the_defaults_and_false_is_none(service: InferenceService, videos: list[bytes]) -> None:
    assert ask(service, videos[2], timeline=True)[1]["hop"] == 4
    assert "view_plan" in ask(service, videos[2], timeline=False)[1]
    in_query = service.submit({"body": videos[2], "timeline": "true"}).result(60)
    assert in_query.body["hop"] == 4
    in_form = service.submit({"video": videos[2], "timeline": b'{"hop": 2}'}).result(60)
    assert in_form.body["hop"] == 2


@pytest.mark.parametrize(
    "options",
    [
        {"timeline": {"hop": 9}}, {"timeline": {"hop": -1}}, {"timeline": {"hops": 1}}, {"timeline": 1},
        {"timeline": {"enter": 0.1}}, {"timeline": True, "num_clips": 2}, {"timeline": True, "outputs": ["intra"]},
        {"timeline": "true, please"},
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_any_work(
    service: InferenceService, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service._predictor, "windows", None)
    status, body = ask(service, b"never looked at", **options)
    assert (status, body["code"]) == (422, "bad_option"), body
    (answer,) = followed(service, b"never looked at", **options)
    assert (answer.status, answer.body["code"]) == (422, "bad_option")


def test_a_model_without_classifier_has_no_timeline(service: InferenceService, videos: list[bytes]) -> None:
    model = replace(service.model, output_names=("feature",))
    without = InferenceService(model, ServiceSettings(decode_workers=1))
    assert ask(without, videos[0], timeline=True)[0] == 422
    without._predictor.close()


def test_only_a_timeline_is_followed(service: InferenceService, videos: list[bytes]) -> None:
    (answer,) = followed(service, videos[0])
    assert (answer.status, answer.body["code"]) == (422, "bad_option")
    assert "timeline" in answer.body["hint"]


def test_a_bad_video_is_an_answer_with_its_status(service: InferenceService) -> None:
    assert ask(service, b"no video", timeline=True)[0] == 400
    (answer,) = followed(service, b"no video", timeline=True)
    assert isinstance(answer, Response)
    assert (answer.status, answer.body["code"]) == (400, "unreadable")


def test_an_error_in_the_middle_comes_after_what_was_found(other: InferenceService, tmp_path: Path) -> None:
    data = numbered_video(tmp_path / "a.mp4", num_frames=400, bframes=0).read_bytes()
    damaged = data[: len(data) // 2] + bytes(len(data) // 4) + data[len(data) * 3 // 4 :]
    *found, last = followed(other, damaged, timeline=True)
    assert {kind for kind, _ in found} >= {"window"}
    assert isinstance(last, Response)
    assert (last.status, last.body["code"]) == (422, "decode_failed")
    assert outcomes(other) == {"decode_failed": 1}


def test_one_more_than_are_taken_is_told_to_come_back_and_a_place_is_freed(
    other: InferenceService, long: bytes
) -> None:
    following = other.follow({"video": long, "options": {"timeline": {"hop": 1}}})
    assert next(following)[0] == "window"  # type: ignore[index]
    status, body = ask(other, long, timeline=True)
    assert (status, body["code"]) == (429, "queue_full")
    assert ask(other, long)[0] == 200  # other requests are answered
    assert other.metrics.values()[Series(BUSY.name, BUSY)] == 1
    following.close()
    assert other.metrics.values()[Series(BUSY.name, BUSY)] == 0
    assert ask(other, long, timeline=True)[0] == 200
    assert outcomes(other) == {"client_gone": 1, "queue_full": 1, "ok": 2}


def test_time_and_size_are_bounded(
    service: InferenceService, long: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ServiceSettings(decode_workers=1, timeline_seconds=1e-9)
    hasty = InferenceService(service.model, settings)
    status, body = ask(hasty, long, timeline=True)
    assert (status, body["code"]) == (504, "too_slow")
    hasty._predictor.close()
    short = replace(settings, limits=replace(ENDPOINT_LIMITS, max_seconds=2.0))
    limited = InferenceService(service.model, short)
    assert ask(limited, long, timeline=True)[0] == 413
    limited._predictor.close()
    monkeypatch.setattr("ivdr_deploy.serving.core.answers.MAX_ANSWER_BYTES", 3000)
    calls = []
    infer = service._predictor.infer_clips
    monkeypatch.setattr(service._predictor, "infer_clips", lambda clips: calls.append(clips) or infer(clips))
    status, body = ask(service, long, timeline={"hop": 1})
    assert (status, body["code"]) == (422, "bad_option")
    assert len(calls) < 6  # of 18: it is given up, not collected
    assert "stream" in body["hint"]
    assert len(followed(service, long, timeline={"hop": 1})) > 100  # piece by piece there is no such bound


def test_closing_and_draining_tell_to_come_back(
    service: InferenceService, long: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing = InferenceService(service.model, ServiceSettings(decode_workers=1))
    following = closing.follow({"video": long, "options": {"timeline": {"hop": 1}}})
    next(following)
    waiting = closing.submit({"video": long, "options": {"timeline": {"hop": 1}}})
    closing.drain()
    refused = followed(closing, long, timeline=True)
    assert [answer.status for answer in refused] == [503]
    closing._predictor.close()
    *_, last = following
    assert isinstance(last, Response)
    assert (last.status, last.body["code"]) == (503, "draining")
    assert waiting.result(60).status in (200, 503)


def test_a_network_that_fails_fails_its_timeline_alone(
    service: InferenceService, long: bytes, videos: list[bytes]
) -> None:
    calls = 0
    third = threading.Event()
    infer = service.model.runtime.infer

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(service.model.runtime, name)

        def infer(self, video: np.ndarray) -> Any:
            nonlocal calls
            calls += 1
            if calls >= 3 and not third.is_set():
                raise RuntimeError("out of order")
            return infer(video)

    failing = InferenceService(
        replace(service.model, runtime=Failing()),  # type: ignore[arg-type]
        ServiceSettings(decode_workers=1),
    )
    *found, last = followed(failing, long, timeline={"hop": 1})
    assert found
    assert (last.status, last.body["code"]) == (500, "inference_failed")
    third.set()
    assert ask(failing, videos[0])[0] == 200
    failing._predictor.close()


@pytest.mark.parametrize(
    "values", [{"max_timelines": 0}, {"timeline_seconds": 0.0}, {"timeline_seconds": float("nan")}]
)
def test_settings_that_mean_nothing_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServiceSettings(**values)
