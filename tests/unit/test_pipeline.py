from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import TINY_CLIP
from hostile_sources import EatsMemory, Hangs, KillsItsProcess
from videos import numbered_video

from ivdr_deploy.decoding import DecodeOptions, pool
from ivdr_deploy.errors import ClosedError, InferenceError, NoVideoStreamError, VideoOpenError
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.results import Outcome, softmax
from ivdr_deploy.runtimes.base import LoadedModel, Runtime
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.spec import MAX_BATCH, ViewPlan
from ivdr_deploy.video import VideoLimits, load_clips

THREAD = DecodeOptions(isolation="thread")


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Iterator[LoadedModel]:
    model = open_model(tiny_bundle, threads=1)
    with model.runtime:
        yield model


@pytest.fixture(scope="module", params=["thread", "process"])
def predictor(model: LoadedModel, request: pytest.FixtureRequest) -> Iterator[VideoPredictor]:
    with VideoPredictor(model, decode=DecodeOptions(workers=2, isolation=request.param)) as predictor:
        yield predictor


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("videos")
    return [numbered_video(folder / f"{n}.mp4", num_frames=n, size=(64, 48)) for n in (5, 12, 30, 60)]


class Wrapped(Runtime):
    """A real runtime that is watched, held back or broken."""

    def __init__(self, runtime: Runtime) -> None:
        self.name, self.precision, self.output_names = runtime.name, runtime.precision, runtime.output_names
        self.description, self.runtime = runtime.description, runtime
        self.call_clips = runtime.call_clips
        self.calls: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.broken_on: np.ndarray | None = None

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        assert self.gate.wait(20)
        self.calls.append(len(video))
        if self.broken_on is not None and any(np.array_equal(clip, self.broken_on) for clip in video):
            raise RuntimeError("CUDA error")
        return self.runtime.infer(video)

    def close(self) -> None:
        self.runtime.close()


class Hold(Future[None]):
    """Counts who waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = threading.Semaphore(0)

    def add_done_callback(self, fn: Callable[[Future[None]], object]) -> None:
        super().add_done_callback(fn)
        self.waiting.release()


def test_result_combines_the_clips_as_documented(predictor: VideoPredictor, videos: list[Path]) -> None:
    plan = ViewPlan(num_clips=3)
    result = predictor.predict(videos[2], plan=plan)
    raw = predictor.model.runtime.infer(predictor.load(videos[2], plan=plan).video)
    assert result.probabilities is not None
    assert result.feature is not None
    assert result.inter is not None
    np.testing.assert_allclose(result.probabilities, softmax(raw["logits"]).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(result.feature, raw["feature"].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(result.inter), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(result.intra, raw["intra"])
    assert result.clip_seconds.shape == (3, 2)
    assert np.all(np.diff(result.clip_seconds[:, 0]) > 0)
    assert result.probabilities.sum() == pytest.approx(1.0, abs=1e-5)
    assert result.view_plan == plan


def test_top_labels_are_sorted_and_carry_their_probability(
    predictor: VideoPredictor, videos: list[Path]
) -> None:
    result = predictor.predict(videos[1])
    assert result.probabilities is not None
    assert result.view_plan == predictor.model.view_plan
    top = result.top(3)
    assert [score for _, score in top] == sorted(result.probabilities.tolist(), reverse=True)[:3]
    labels = predictor.model.labels
    assert all(score == pytest.approx(result.probabilities[labels.index(label)]) for label, score in top)


def test_clips_of_several_videos_share_a_call(model: LoadedModel, videos: list[Path]) -> None:
    wrapped = Wrapped(model.runtime)
    with VideoPredictor(replace(model, runtime=wrapped), decode=THREAD) as predictor:
        alone = [predictor.predict(path) for path in videos]
        wrapped.calls.clear()
        wrapped.gate.clear()
        futures = [predictor.submit(path) for path in videos]
        predictor.load(videos[0])  # the one worker takes them in order: all are decoded
        wrapped.gate.set()
        together = [future.result(20).result for future in futures]
    for one, other in zip(alone, together, strict=True):
        assert other is not None
        np.testing.assert_allclose(other.clip_logits, one.clip_logits, atol=1e-5)
        assert other.info == one.info
    assert sum(wrapped.calls) == 2 * len(videos)
    assert len(wrapped.calls) < len(videos)


def test_more_clips_than_one_call_takes_are_split(model: LoadedModel, videos: list[Path]) -> None:
    wrapped = Wrapped(model.runtime)
    with VideoPredictor(replace(model, runtime=wrapped), decode=THREAD) as predictor:
        result = predictor.predict(videos[3], plan=ViewPlan(num_clips=MAX_BATCH + 3))
        assert wrapped.calls == [MAX_BATCH, 3]
        assert result.clip_logits is not None
        assert len(result.clip_logits) == MAX_BATCH + 3


def test_outcomes_come_in_order_and_a_bad_video_spoils_no_other(
    predictor: VideoPredictor, videos: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    sources = [videos[0], tmp_path / "text.mp4", videos[1].read_bytes(), tmp_path / "absent.mp4", videos[2]]
    outcomes = list(predictor.predict_many(sources))
    assert [outcome.source for outcome in outcomes] == sources
    assert [outcome.result is not None for outcome in outcomes] == [True, False, True, False, True]
    assert all(isinstance(outcomes[i].error, VideoOpenError) for i in (1, 3))
    assert outcomes[4].result is not None
    np.testing.assert_allclose(
        outcomes[4].result.clip_logits, predictor.predict(videos[2]).clip_logits, atol=1e-5
    )


@pytest.mark.parametrize(
    ("source", "code"),
    [(KillsItsProcess(), "crashed"), (Hangs(), "too_slow"), (EatsMemory(), "too_large")],
    ids=["killed", "hangs", "memory"],
)
def test_a_video_that_breaks_its_worker_costs_only_itself(
    model: LoadedModel, videos: list[Path], monkeypatch: pytest.MonkeyPatch, source: object, code: str
) -> None:
    monkeypatch.setattr(pool, "GRACE_SECONDS", 0.2)
    with VideoPredictor(model, limits=VideoLimits(max_decode_seconds=1.0)) as predictor:
        expected = [predictor.predict(path).clip_logits for path in videos[:2]]
        outcomes = list(predictor.predict_many([videos[0], source, videos[1]]))  # type: ignore[list-item]
    codes = [outcome.error.code if outcome.error else "ok" for outcome in outcomes]
    assert codes == ["ok", code, "ok"]
    for logits, outcome in zip(expected, (outcomes[0], outcomes[2]), strict=True):
        assert outcome.result is not None
        np.testing.assert_allclose(outcome.result.clip_logits, logits, atol=1e-5)


def test_what_shares_a_call_depends_on_the_list_alone(model: LoadedModel, videos: list[Path]) -> None:
    wrapped = Wrapped(model.runtime)
    wrapped.call_clips = 6
    with VideoPredictor(replace(model, runtime=wrapped), decode=DecodeOptions(workers=3)) as predictor:
        sources = [*videos, *videos]
        first = list(predictor.predict_many(sources))
        assert sorted(wrapped.calls) == [4, 6, 6]  # with three workers, in whichever order they are decoded
        wrapped.calls.clear()
        hold = Hold()
        taken = predictor.predict_many(sources, holds={4: hold})
        again = [next(taken) for _ in range(4)]
        for _ in range(2):  # both calls behind it are decoded
            assert hold.waiting.acquire(timeout=20)
        assert sorted(wrapped.calls) == [2, 6], "the network took up what is held back"
        hold.set_result(None)
        again += taken
        assert sorted(wrapped.calls) == [2, 2, 6, 6]
    for one, other in zip(first, again, strict=True):
        assert one.result is not None
        assert other.result is not None
        np.testing.assert_allclose(one.result.clip_logits, other.result.clip_logits, atol=1e-5)
    for one, other in zip(first[:3], again[4:7], strict=True):  # the same call in other places
        np.testing.assert_array_equal(one.result.clip_logits, other.result.clip_logits)  # type: ignore[union-attr]


def test_a_video_that_the_network_fails_on_costs_only_itself(model: LoadedModel, videos: list[Path]) -> None:
    wrapped = Wrapped(model.runtime)
    with VideoPredictor(replace(model, runtime=wrapped), decode=THREAD) as predictor:
        wrapped.broken_on = predictor.load(videos[1]).video[1]
        outcomes = list(predictor.predict_many(videos))
        assert [outcome.error is None for outcome in outcomes] == [True, False, True, True]
        assert isinstance(outcomes[1].error, InferenceError)
        with pytest.raises(InferenceError, match="CUDA error"):
            predictor.predict(videos[1])


def test_a_network_that_gives_no_numbers_fails_on_the_video_however_it_is_asked(
    model: LoadedModel, videos: list[Path]
) -> None:
    class Diverged(Wrapped):
        def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
            outputs = super().infer(video)
            outputs["feature"][-1, 0] = np.nan
            return outputs

    with VideoPredictor(replace(model, runtime=Diverged(model.runtime)), decode=THREAD) as predictor:
        with pytest.raises(InferenceError, match="NaN or infinity in feature"):
            predictor.predict(videos[0])
        for outcome in (*predictor.predict_many(videos[:1]), predictor.submit(videos[0]).result(60)):
            assert isinstance(outcome.error, InferenceError)


def test_sources_are_read_only_a_few_ahead(predictor: VideoPredictor, videos: list[Path]) -> None:
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield videos[0]

    outcomes: Iterator[Outcome] = predictor.predict_many(endless(), plan=ViewPlan(num_clips=10))
    next(outcomes)
    assert taken <= 2 + 4 + 2 + 1  # two workers, two calls of two videos each, and the call after them
    outcomes.close()  # type: ignore[attr-defined]


def test_the_network_gets_what_load_clips_gives(predictor: VideoPredictor, videos: list[Path]) -> None:
    plan = predictor.model.view_plan
    np.testing.assert_array_equal(
        predictor.load(videos[1]).video, load_clips(videos[1], TINY_CLIP, plan).video
    )


def test_a_closed_predictor_says_so(model: LoadedModel, videos: list[Path]) -> None:
    predictor = VideoPredictor(model, decode=THREAD)
    predictor.predict(videos[0])
    predictor.close()
    predictor.close()
    with pytest.raises(ClosedError):
        predictor.predict(videos[0])


def test_audio_alone_is_no_video(predictor: VideoPredictor, shared_data: Path) -> None:
    with pytest.raises(NoVideoStreamError):
        predictor.predict(shared_data / "odd" / "audio_only.m4a")


def test_an_error_on_the_way_to_the_network_reaches_whoever_waits(
    model: LoadedModel, videos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError("no room for a call")

    with VideoPredictor(model, decode=THREAD) as predictor:
        monkeypatch.setattr(predictor._batcher, "submit", no_memory)
        with pytest.raises(MemoryError, match="no room"):
            predictor.submit(videos[0]).result(timeout=60)
