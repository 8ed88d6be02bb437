"""What goes wrong with one request costs that request, and is counted."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hostile_sources import EatsMemory, Hangs, KillsItsProcess

from ivdr_deploy.decoding import DecodePool
from ivdr_deploy.runtimes.base import LoadedModel, Runtime
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.serving.core.schema import Response
from ivdr_deploy.serving.core.service import InferenceService
from ivdr_deploy.serving.core.settings import ENDPOINT_LIMITS, ServiceSettings
from ivdr_deploy.video.clips import load_clips
from ivdr_deploy.video.source import BytesSource, Source

SETTINGS = ServiceSettings(
    decode_workers=2, decode_memory_mib=512, limits=replace(ENDPOINT_LIMITS, max_decode_seconds=1.0)
)


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Iterator[LoadedModel]:
    opened = open_model(tiny_bundle, threads=1)
    with opened.runtime:
        yield opened


class FaultyPool(DecodePool):
    """The real pool with real processes; videos of certain bytes do harm to the one that decodes them."""

    faults: ClassVar = {b"kill": KillsItsProcess(), b"hang": Hangs(), b"eat": EatsMemory()}

    def submit(self, job: Any, source: Source, *args: Any, **kwargs: Any) -> Future[Any]:
        if isinstance(source, BytesSource):
            source = self.faults.get(source.data, source)
        return super().submit(job, source, *args, **kwargs)


class FlawedRuntime(Runtime):
    """Fails, or gives NaN, whenever a marked clip is in a call; no call begins while ``go`` is cleared."""

    def __init__(self, runtime: Runtime, *, fails: np.ndarray, gives_nan: np.ndarray) -> None:
        self.name, self.precision = runtime.name, runtime.precision
        self.description, self.output_names = runtime.description, runtime.output_names
        self.call_clips = runtime.call_clips
        self.calls: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self._runtime, self._fails, self._gives_nan = runtime, fails, gives_nan

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        self.go.wait()
        self.calls.append(len(video))
        if any(np.array_equal(clip, self._fails) for clip in video):
            raise RuntimeError("the network does not survive this")
        outputs = self._runtime.infer(video)
        for row in [i for i, clip in enumerate(video) if np.array_equal(clip, self._gives_nan)]:
            outputs["feature"][row] = np.nan
        return outputs

    def close(self) -> None:
        self._runtime.close()


def counts(service: InferenceService) -> dict[str, float]:
    return {
        series.name + "".join(f"[{text}]" for _, text in series.labels): value
        for series, value in service.metrics.values().items()
    }


def outcome(answer: Response) -> str:
    return "ok" if answer.status == 200 else answer.body["code"]


def test_worker_that_dies_hangs_or_eats_memory_costs_its_own_request(
    model: LoadedModel, videos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ivdr_deploy.pipeline.DecodePool", FaultyPool)
    service = InferenceService(model, SETTINGS)
    sent = [b"kill", videos[0], b"hang", videos[1], b"eat", videos[2], b"kill", b"kill", videos[0]]
    answers = [future.result(60) for future in [service.submit({"video": video}) for video in sent]]
    assert [(answer.status, outcome(answer)) for answer in answers] == [
        (422, "crashed"),
        (200, "ok"),
        (504, "too_slow"),
        (200, "ok"),
        (413, "too_large"),
        (200, "ok"),
        (422, "crashed"),
        (422, "crashed"),
        (200, "ok"),
    ]
    assert "SIGKILL" in answers[0].body["message"]
    assert "512 MiB" in answers[4].body["message"]
    service._predictor.close()


def test_what_waits_when_the_service_is_closed_is_told_to_come_back(
    model: LoadedModel, videos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ivdr_deploy.pipeline.DecodePool", FaultyPool)
    closing = InferenceService(model, replace(SETTINGS, decode_workers=1))
    waiting = [closing.submit({"video": video}) for video in (b"hang", *videos)]  # nothing passes the first
    closing._predictor.close()
    first, *answers = [future.result(60) for future in waiting]
    assert first.status in (503, 504)
    assert [(answer.status, outcome(answer)) for answer in answers] == [(503, "draining")] * len(videos)
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in answers)


@pytest.fixture
def flawed(model: LoadedModel, videos: list[bytes]) -> Iterator[tuple[InferenceService, FlawedRuntime]]:
    # The last clips: the videos begin alike.
    marks = [load_clips(video, model.clip, model.view_plan).video[-1] for video in videos[1:]]
    runtime = FlawedRuntime(model.runtime, fails=marks[0], gives_nan=marks[1])
    service = InferenceService(replace(model, runtime=runtime), SETTINGS)
    yield service, runtime
    service._predictor.close()


def test_failing_network_costs_the_requests_at_fault(
    flawed: tuple[InferenceService, FlawedRuntime], videos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, runtime = flawed
    batcher, decoded = service._predictor._batcher, threading.Semaphore(0)
    submit = batcher.submit

    def counted(video: np.ndarray) -> object:
        inferring = submit(video)
        decoded.release()
        return inferring

    monkeypatch.setattr(batcher, "submit", counted)
    sent = [videos[i] for i in (0, 1, 0, 2, 0, 1, 0)]
    runtime.go.clear()
    waiting = [service.submit({"video": video}) for video in sent]
    for _ in sent:
        assert decoded.acquire(timeout=60)
    runtime.go.set()
    answers = [future.result(60) for future in waiting]
    expected = {0: (200, "ok"), 1: (500, "inference_failed"), 2: (500, "inference_failed")}
    assert [(a.status, outcome(a)) for a in answers] == [expected[videos.index(video)] for video in sent]
    # The first call was held back with what was there; the second took all that came meanwhile.
    assert max(runtime.calls) >= len(sent), "the requests did not share a call"
    assert "does not survive" in answers[1].body["message"]
    assert "NaN or infinity" in answers[3].body["message"]


def test_what_was_counted_is_what_was_answered(
    flawed: tuple[InferenceService, FlawedRuntime], videos: list[bytes]
) -> None:
    service, _ = flawed
    requests = [{"body": b"hello"}, {"video": videos[0]}, {"video": videos[1]}, {}, {"body": videos[0]}]
    requests += [{"video": videos[0], "options": {"num_clips": 5}}, {"video": videos[0], "options": {"x": 1}}]
    waiting = [service.submit(parts) for parts in requests]
    answers = [future.result(60) for future in waiting]
    found = counts(service)
    outcomes = Counter(outcome(answer) for answer in answers)
    assert outcomes == {"ok": 3, "unreadable": 1, "inference_failed": 1, "bad_request": 1, "bad_option": 1}
    for code, number in outcomes.items():
        assert found.pop(f"ivdr_requests_total[{code}]") == number
    assert not [name for name in found if name.startswith("ivdr_requests_total")]
    clips = sum(answer.body["view_plan"]["num_clips"] for answer in answers if answer.status == 200)
    assert found["ivdr_clips_total"] == found["ivdr_batch_clips_sum"] == clips == 9
    for stage in ("decode", "preprocess", "infer"):
        assert found[f"ivdr_{stage}_seconds_count"] == 3
        assert found[f"ivdr_{stage}_seconds_sum"] > 0
    assert found["ivdr_busy"] == 0


def test_defect_of_ours_is_a_500_of_its_own_request(
    model: LoadedModel,
    videos: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    service = InferenceService(model, SETTINGS)
    submit = service._predictor.submit

    def broken(source: bytes, **options: object) -> object:
        if source == b"defect":
            raise ZeroDivisionError("a defect")
        return submit(source, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(service._predictor, "submit", broken)
    waiting = [service.submit({"body": b"defect"}), service.submit({"body": videos[0]})]
    assert [future.result(60).status for future in waiting] == [500, 200]
    assert waiting[0].result().body["code"] == "internal"
    assert "ZeroDivisionError: a defect" in caplog.text
    assert counts(service)["ivdr_busy"] == 0
    service._predictor.close()
