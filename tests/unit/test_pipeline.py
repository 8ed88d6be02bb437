from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bundles import TINY_CLIP, TINY_LABELS
from videos import numbered_video

from ivdr_deploy.errors import ConfigError, NoVideoStreamError, VideoOpenError
from ivdr_deploy.pipeline import VideoPredictor, softmax
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.spec import MAX_BATCH
from ivdr_deploy.video.clips import load_clips


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Iterator[VideoPredictor]:
    model = open_model(tiny_bundle, threads=1)
    with model.runtime:
        yield VideoPredictor(model)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("videos")
    return [numbered_video(folder / f"{n}.mp4", num_frames=n, size=(64, 48)) for n in (5, 12, 30, 60)]


def test_result_combines_the_clips_as_documented(predictor: VideoPredictor, videos: list[Path]) -> None:
    result = predictor.predict(videos[2], num_clips=3)
    raw = predictor.model.runtime.infer(predictor.load(videos[2], num_clips=3).video)
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


def test_top_labels_are_sorted_and_carry_their_probability(
    predictor: VideoPredictor, videos: list[Path]
) -> None:
    result = predictor.predict(videos[1])
    assert result.probabilities is not None
    top = result.top(TINY_LABELS, 3)
    assert [score for _, score in top] == sorted(result.probabilities.tolist(), reverse=True)[:3]
    assert all(score == pytest.approx(result.probabilities[TINY_LABELS.index(label)]) for label, score in top)


def test_a_batch_of_videos_gives_what_each_gives_alone(predictor: VideoPredictor, videos: list[Path]) -> None:
    together = predictor.infer([predictor.load(path, num_clips=1 + i) for i, path in enumerate(videos)])
    for i, (path, result) in enumerate(zip(videos, together, strict=True)):
        alone = predictor.predict(path, num_clips=1 + i)
        np.testing.assert_allclose(result.clip_logits, alone.clip_logits, atol=1e-5)
        assert result.info == alone.info


def test_more_clips_than_one_call_takes_are_split(predictor: VideoPredictor, videos: list[Path]) -> None:
    many = [predictor.load(videos[2], num_clips=MAX_BATCH), predictor.load(videos[3], num_clips=3)]
    first, second = predictor.infer(many)
    assert first.clip_logits is not None
    assert first.clip_logits.shape == (MAX_BATCH, len(TINY_LABELS))
    np.testing.assert_allclose(
        second.clip_logits, predictor.predict(videos[3], num_clips=3).clip_logits, atol=1e-5
    )


@pytest.mark.parametrize("num_clips", [0, MAX_BATCH + 1])
def test_an_impossible_number_of_clips_is_refused(
    predictor: VideoPredictor, videos: list[Path], num_clips: int
) -> None:
    with pytest.raises(ConfigError, match="num_clips must be between"):
        predictor.load(videos[0], num_clips=num_clips)


@pytest.mark.parametrize("decode_threads", [1, 3])
def test_outcomes_come_in_order_and_a_bad_video_spoils_no_other(
    predictor: VideoPredictor, videos: list[Path], tmp_path: Path, decode_threads: int
) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    sources = [videos[0], tmp_path / "text.mp4", videos[1].read_bytes(), tmp_path / "absent.mp4", videos[2]]
    outcomes = list(predictor.predict_many(sources, decode_threads=decode_threads))
    assert [outcome.source for outcome in outcomes] == sources
    assert [outcome.result is not None for outcome in outcomes] == [True, False, True, False, True]
    assert all(isinstance(outcomes[i].error, VideoOpenError) for i in (1, 3))
    assert outcomes[4].result is not None
    np.testing.assert_array_equal(outcomes[4].result.clip_logits, predictor.predict(videos[2]).clip_logits)


def test_sources_are_read_only_a_few_ahead(predictor: VideoPredictor, videos: list[Path]) -> None:
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield videos[0]

    outcomes = predictor.predict_many(endless(), decode_threads=2)
    next(outcomes)
    assert taken <= 3
    outcomes.close()  # type: ignore[attr-defined]


def test_the_network_gets_what_load_clips_gives(predictor: VideoPredictor, videos: list[Path]) -> None:
    np.testing.assert_array_equal(predictor.load(videos[1]).video, load_clips(videos[1], TINY_CLIP).video)


def test_audio_alone_is_no_video(predictor: VideoPredictor, shared_data: Path) -> None:
    with pytest.raises(NoVideoStreamError):
        predictor.predict(shared_data / "odd" / "audio_only.m4a")
