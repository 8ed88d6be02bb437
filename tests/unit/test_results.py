"""Which label goes with which probability, and in which order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ivdr_deploy.datasets.lists import VideoItem, VideoList
from ivdr_deploy.results import RawResult, VideoResult, combine_clips, top_labels
from ivdr_deploy.spec import ViewPlan
from ivdr_deploy.video.clips import Clips


def result(*probabilities: float) -> VideoResult:
    return VideoResult(
        labels=("a", "b", "c", "d")[: len(probabilities)], probabilities=np.array(probabilities, np.float32),
        clip_logits=None, feature=None, inter=None, intra=None, clip_seconds=np.zeros((1, 2)),
        view_plan=ViewPlan(num_clips=1), info=None, decode_ms=0.0, preprocess_ms=0.0, infer_ms=0.0,
    )  # fmt: skip


def test_the_best_label_comes_first_with_its_own_probability() -> None:
    assert result(0.2, 0.1, 0.7).top(2) == [("c", pytest.approx(0.7)), ("a", pytest.approx(0.2))]


def test_what_the_network_gave_for_each_clip_becomes_one_answer() -> None:
    clips = Clips(
        video=np.empty((0, 1, 1, 1, 3), np.uint8), seconds=np.array([[0.0, 0.5], [1.0, 1.5]]),
        view_plan=ViewPlan(num_clips=2), info=None, decode_ms=1.0, preprocess_ms=2.0,
    )  # fmt: skip
    outputs = {
        "logits": np.log(np.float32([[1, 3], [500, 500]])) + np.float32(100),  # whose powers are no float32
        "feature": np.float32([[1, 2], [3, 6]]),
        "inter": np.float32([[3, 0], [3, 8]]),
        "intra": np.float32([[[1, 0], [0, 1]], [[0, 1], [1, 0]]]),
    }
    found = combine_clips(RawResult(clips=clips, outputs=outputs, infer_ms=4.0), labels=["a", "b"])
    assert found.top() == [("b", pytest.approx(0.625, abs=1e-5)), ("a", pytest.approx(0.375, abs=1e-5))]
    assert found.feature == pytest.approx([2, 4])
    assert found.inter == pytest.approx([0.6, 0.8])
    assert found.clip_logits is outputs["logits"]
    assert found.intra is outputs["intra"]
    assert (found.decode_ms, found.preprocess_ms, found.infer_ms) == (1.0, 2.0, 4.0)
    assert (found.clip_seconds is clips.seconds, found.view_plan, found.info) == (True, clips.view_plan, None)
    nothing = combine_clips(RawResult(clips=clips, outputs={}, infer_ms=4.0), labels=["a", "b"])
    assert (nothing.probabilities, nothing.feature, nothing.inter, nothing.intra) == (None,) * 4
    assert nothing.top() == []


def test_equal_probabilities_keep_the_order_of_the_labels() -> None:
    assert [label for label, _ in result(0.2, 0.3, 0.2, 0.3).top(4)] == ["b", "d", "a", "c"]


def test_classes_are_in_the_order_of_their_names_whatever_the_list_says() -> None:
    items = tuple(
        VideoItem(uri=f"{i}.mp4", path=Path(f"{i}.mp4"), label=label)
        for i, label in enumerate(("wave", "bow", "wave", "sit"))
    )
    videos = VideoList(Path("list.csv"), items)
    assert videos.labels == ("bow", "sit", "wave")
    assert videos.targets(videos.labels) == [2, 0, 2, 1]


def test_of_equal_probabilities_the_lower_index_comes_first() -> None:
    labels = [str(number) for number in range(200)]
    levels = np.float32([number % 2 for number in range(200)])
    assert [label for label, _ in top_labels(labels, levels, 200)] == labels[1::2] + labels[::2]
