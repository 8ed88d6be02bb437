"""A long video through a real bundle: its windows are sliding clips, events are told as they end, memory is bounded."""

from __future__ import annotations

import itertools
import json
import os
import resource
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from videos import numbered_frame, numbered_video, write_video

import ivdr_deploy as ivdr
from ivdr_deploy.batching import Inferred
from ivdr_deploy.cli import main
from ivdr_deploy.errors import (
    ArtifactError,
    ClosedError,
    ConfigError,
    InferenceError,
    VideoError,
    VideoTimeoutError,
)
from ivdr_deploy.events import Event, EventFinder, TimelinePlan
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.results import softmax
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.spec import ViewPlan
from ivdr_deploy.timeline import TimelineEnd, Window, checked_hop, look_through

PLAN = TimelinePlan(hop=3, min_seconds=0.0)


@pytest.fixture(scope="module")
def predictor(bundle: Path) -> Iterator[VideoPredictor]:
    model = open_model(bundle, threads=1)
    with model.runtime, VideoPredictor(model) as opened:
        yield opened


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Changes what it shows, so that the tiny network changes its mind."""
    frames = (
        numbered_frame(n, size=(64, 48)) if n // 30 % 2 else np.full((48, 64, 3), (n // 2) % 256, np.uint8)
        for n in range(150)
    )
    return write_video(tmp_path_factory.mktemp("videos") / "long.mp4", frames)


def split(found: list[Any]) -> tuple[list[Window], list[Event], list[TimelineEnd]]:
    return (
        [item for item in found if isinstance(item, Window)],
        [item for item in found if isinstance(item, Event)],
        [item for item in found if isinstance(item, TimelineEnd)],
    )


def test_windows_are_the_sliding_clips_and_events_what_is_made_of_them(
    predictor: VideoPredictor, video: Path
) -> None:
    sliding = ViewPlan(placement="sliding", num_clips=200, hop=PLAN.hop)
    (outcome,) = predictor.predict_many([video], plan=sliding)
    assert outcome.raw is not None
    expected = softmax(outcome.raw.outputs["logits"])
    windows, events, ends = split(list(look_through(predictor, video.read_bytes(), PLAN)))
    assert len(windows) == len(expected) == 49
    np.testing.assert_allclose([w.probabilities for w in windows], expected, atol=1e-6)
    assert [w.start_seconds for w in windows] == list(outcome.raw.clips.seconds[:, 0])
    finder = EventFinder(predictor.model.labels, PLAN)
    borders = [0.0, *((3 * k + 2) / 25 for k in range(1, 49)), 6.0]
    told = [finder.add(part, p) for part, p in zip(itertools.pairwise(borders), expected, strict=True)]
    wanted = [*itertools.chain(*told), *finder.finish()]
    assert len(wanted) > 1  # so that equality means something
    for event, same in zip(events, wanted, strict=True):
        assert (event.label, *np.round((event.start_seconds, event.end_seconds, event.score), 4)) == (
            same.label, *np.round((same.start_seconds, same.end_seconds, same.score), 4),
        )  # fmt: skip
    (end,) = ends
    assert (end.windows, end.events, end.hop, end.video) == (49, len(events), 3, outcome.raw.clips.info)
    assert min(end.decode_ms, end.preprocess_ms, end.infer_ms) > 0


def test_an_event_is_told_before_the_window_that_follows_it(predictor: VideoPredictor, video: Path) -> None:
    found = list(look_through(predictor, video, PLAN))
    assert isinstance(found[-1], TimelineEnd)
    told = [
        (item.end_seconds, found[place - 1], found[place + 1])
        for place, item in enumerate(found[:-1])
        if isinstance(item, Event) and isinstance(found[place + 1], Window)
    ]
    assert told
    for end_seconds, _, after in told:
        assert isinstance(after, Window)
        assert after.start_seconds < end_seconds < after.end_seconds


def test_decoding_ends_when_nobody_listens_any_more(predictor: VideoPredictor, tmp_path: Path) -> None:
    long = numbered_video(tmp_path / "long.mp4", num_frames=1000, size=(64, 48))
    before = set(psutil.Process().children(recursive=True))
    looking = look_through(predictor, long, TimelinePlan(hop=1))
    assert isinstance(next(looking), Window)
    started = set(psutil.Process().children(recursive=True)) - before
    workers = [
        child for child in started if child.ppid() != os.getpid()
    ]  # others are the servers that fork them
    assert workers
    looking.close()  # type: ignore[attr-defined]
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_a_bounded_number_of_windows_is_held(
    predictor: VideoPredictor, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lots: list[weakref.ref[np.ndarray]] = []
    alive = []
    infer = predictor.infer_clips

    def listening(clips: np.ndarray) -> Future[Inferred]:
        lots.append(weakref.ref(clips))
        alive.append(sum(lot() is not None for lot in lots))
        return infer(clips)

    monkeypatch.setattr(predictor, "infer_clips", listening)
    list(look_through(predictor, video, TimelinePlan(hop=1)))
    assert len(alive) == -(-143 // 8)
    assert max(alive) <= 5, "drawn, waiting, in the network, and what threads have not let go of yet"


def test_windows_are_decoded_while_the_network_works_on_those_before(
    predictor: VideoPredictor, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each lot is answered only when the next one was handed over."""

    class Answer(Future):  # type: ignore[type-arg]
        def result(self, timeout: float | None = None) -> Inferred:
            return super().result(20)  # type: ignore[no-any-return]

    infer, lots = predictor.infer_clips, -(-143 // 8)
    held: list[tuple[Answer, Future[Inferred]]] = []

    def late(clips: np.ndarray) -> Future[Inferred]:
        answer = Answer()
        held.append((answer, infer(clips)))
        for waiting, inferred in held[-2:] if len(held) == lots else held[-2:-1]:
            waiting.set_result(inferred.result(20))
        return answer

    monkeypatch.setattr(predictor, "infer_clips", late)
    windows, _, _ = split(list(look_through(predictor, video, TimelinePlan(hop=1))))
    assert (len(windows), len(held)) == (143, lots)


def test_windows_are_told_as_soon_as_the_network_has_answered(
    predictor: VideoPredictor, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer, answers = predictor.infer_clips, list[Future[Inferred]]()

    def answered(clips: np.ndarray) -> Future[Inferred]:
        answers.append(infer(clips))
        answers[-1].result(20)
        return answers[-1]

    monkeypatch.setattr(predictor, "infer_clips", answered)
    told = [
        len(answers)
        for found in look_through(predictor, video, TimelinePlan(hop=1))
        if isinstance(found, Window)
    ]
    assert told == [1 + place // 8 for place in range(143)]  # lots of 8 windows


def test_a_hop_is_half_a_window_or_up_to_a_whole_one(predictor: VideoPredictor) -> None:
    clip = predictor.model.clip  # a window of 8 frames
    assert [checked_hop(TimelinePlan(hop=hop), clip) for hop in (0, 1, 8)] == [4, 1, 8]
    assert checked_hop(TimelinePlan(), replace(clip, num_frames=1, frame_stride=1)) == 1


@pytest.mark.parametrize(
    ("clips", "held", "most"), [(64, 100, 8), (3, 100, 3), (64, 2, 2), (64, 0.5, 1)], ids=str
)
def test_a_lot_is_no_more_than_a_call_takes_and_memory_allows(
    predictor: VideoPredictor,
    video: Path,
    monkeypatch: pytest.MonkeyPatch,
    clips: int,
    held: float,
    most: int,
) -> None:
    asked: list[int] = []
    windows = predictor.windows

    def listening(source: Any, *, hop: int, most: int) -> Any:
        asked.append(most)
        return windows(source, hop=hop, most=most)

    monkeypatch.setattr(predictor, "windows", listening)
    monkeypatch.setattr(predictor.model.runtime, "call_clips", clips)
    monkeypatch.setattr(
        "ivdr_deploy.timeline._TOGETHER_BYTES", int(held * np.prod(predictor.model.clip.clip_shape))
    )
    assert isinstance(list(look_through(predictor, video, TimelinePlan(hop=8)))[-1], TimelineEnd)
    assert asked == [most]


@pytest.mark.exhaustive
def test_an_hour_costs_as_much_memory_as_a_minute(bundle: Path, tmp_path: Path) -> None:
    """With threads, so that the decoder's memory is that of this process."""
    frames = [numbered_frame(n, size=(160, 120)) for n in range(50)]
    peaks = {}
    with ivdr.load(bundle, threads=1, isolation="thread") as model:
        for seconds in (60, 3590):
            path = tmp_path / f"{seconds}.mp4"
            write_video(path, (frames[n % 50] for n in range(seconds * 25)), options={"preset": "ultrafast"})
            windows = sum(isinstance(item, Window) for item in model.timeline(path))
            assert windows == -(-(seconds * 25 - 8) // 4) + 1
            peaks[seconds] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    pixels_of_all_windows = 3590 * 25 // 4 * np.prod((4, 32, 32, 3))
    assert peaks[3590] - peaks[60] < pixels_of_all_windows / 4


def test_errors_come_where_they_belong(
    predictor: VideoPredictor, video: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(VideoError):
        list(look_through(predictor, b"no video", PLAN))
    with pytest.raises(ConfigError, match="a window of this model has 8"):
        list(look_through(predictor, video, TimelinePlan(hop=9)))
    with pytest.raises(VideoTimeoutError, match="looking through it took longer"):
        list(look_through(predictor, video, PLAN, seconds=0.0))
    without = VideoPredictor(replace(predictor.model, output_names=("feature",)))
    with without, pytest.raises(ArtifactError, match="no classifier"):
        list(look_through(without, video, PLAN))
    closed = VideoPredictor(predictor.model)
    looking = look_through(closed, video, PLAN)
    next(looking)
    closed.close()
    with pytest.raises(ClosedError):
        list(looking)
    infer = predictor.model.runtime.infer
    monkeypatch.setattr(
        predictor.model.runtime,
        "infer",
        lambda clips: {name: value * np.nan for name, value in infer(clips).items()},
    )
    with VideoPredictor(predictor.model) as diverged, pytest.raises(InferenceError, match="NaN"):
        list(look_through(diverged, video, PLAN))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], str]:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out.splitlines(), said.err


def test_the_command_prints_json_lines_that_say_what_the_library_says(
    bundle: Path,
    predictor: VideoPredictor,
    video: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    options = ("--timeline", "--hop", 3, "--min-seconds", 0, "--top-k", 2)
    code, lines, _ = run(capsys, "predict", bundle, video, tmp_path / "broken.mp4", *options, "--json")
    assert code == 1
    said = [json.loads(line) for line in lines]
    assert [line["uri"] for line in said] == [*[str(video)] * (len(said) - 1), str(tmp_path / "broken.mp4")]
    kinds = [next(key for key in line if key != "uri") for line in said]
    assert kinds[-2:] == ["summary", "error"]
    assert said[-1]["error"]["code"] == "unreadable"
    windows, events, (end,) = split(list(look_through(predictor, video, PLAN)))
    assert [line["event"] for line in said if "event" in line] == [
        {"label": e.label, "start_seconds": e.start_seconds, "end_seconds": e.end_seconds,
         "score": pytest.approx(e.score, abs=1e-6)}
        for e in events
    ]  # fmt: skip
    shown = [line["window"] for line in said if "window" in line]
    assert [w["start_seconds"] for w in shown] == [w.start_seconds for w in windows]
    assert all(len(w["predictions"]) == 2 for w in shown)
    assert said[-2]["summary"]["windows"] == end.windows == len(shown)


def test_the_command_tells_people(bundle: Path, video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, err = run(capsys, "predict", bundle, video, "--timeline")
    assert code == 0
    assert any(" event " in line for line in lines)
    assert f"{len([line for line in lines if ' event ' not in line])} windows" in err


def test_options_that_do_not_go_together_are_refused(
    bundle: Path, video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, said in (
        (("--hop", 3), "--hop is for a timeline"),
        (("--min-seconds", 3), "--min-seconds is for a timeline"),
        (("--timeline", "--num-clips", 3), "--num-clips does not go with --timeline"),
        (("--timeline", "--enter", 0.1), "leave is at most enter"),
        (("--timeline", "--hop", 9), "choose a hop from 1 to 8"),
    ):
        code, _, err = run(capsys, "predict", bundle, video, *options)
        assert (code, said in err) == (2, True), err
