"""Accuracies and recalls against values worked by hand."""

import math

import numpy as np
import pytest

from ivdr_deploy.evaluation.metrics import (
    Accuracy,
    clip_accuracy,
    per_class_accuracy,
    retrieval_recall,
    video_accuracy,
)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_interval_is_wilsons(correct: int, total: int, low: float, high: float) -> None:
    assert Accuracy(correct, total).interval == pytest.approx((low, high), abs=1e-4)


def test_nothing_counted_says_nothing() -> None:
    assert math.isnan(Accuracy(0, 0).value)
    assert Accuracy(0, 0).interval == (0.0, 1.0)


def test_accuracy_in_words_and_as_data() -> None:
    assert str(Accuracy(8, 10)) == "80.0% (8/10, 95 % interval 49.0% to 94.3%)"
    assert Accuracy(8, 10).to_dict().keys() == {"value", "correct", "total", "low", "high"}


def test_video_accuracy_counts_the_k_most_probable() -> None:
    rows = [np.array([0.1, 0.6, 0.3]), np.array([0.5, 0.2, 0.3])]
    assert video_accuracy(rows, [1, 2]) == Accuracy(1, 2)
    assert video_accuracy(rows, [1, 2], k=2) == Accuracy(2, 2)
    assert video_accuracy(rows, [0, 1], k=2) == Accuracy(0, 2)


def test_clip_accuracy_counts_single_clips_of_videos_of_any_length() -> None:
    logits = [np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]]), np.array([[0.0, 5.0]])]
    assert clip_accuracy(logits, [0, 1]) == Accuracy(3, 4)


def test_per_class_accuracy_is_by_true_class() -> None:
    assert per_class_accuracy([0, 1, 1, 0], [0, 0, 1, 2], num_classes=3) == [
        Accuracy(1, 2), Accuracy(1, 1), Accuracy(0, 1)
    ]  # fmt: skip


def test_retrieval_ranks_after_centring_gallery_and_queries_apart() -> None:
    # The queries lie far from the gallery: only their own mean makes them comparable. By hand, after centring:
    # gallery (2,0) (0,2) (-2,0) (0,-2) of classes 0 1 2 3; queries (1,0.5) and (-1,-0.5), whose nearest are
    # in order 0 1 3 2 and 2 3 1 0.
    gallery = np.array([[12.0, 5.0], [10.0, 7.0], [8.0, 5.0], [10.0, 3.0]])
    queries = np.array([[101.0, -49.5], [99.0, -50.5]])
    recall = retrieval_recall(
        gallery, queries, gallery_labels=[0, 1, 2, 3], query_labels=[1, 2], ks=[1, 2, 4]
    )
    assert recall == {1: Accuracy(1, 2), 2: Accuracy(2, 2), 4: Accuracy(2, 2)}
    third = retrieval_recall(gallery, queries, gallery_labels=[0, 1, 2, 3], query_labels=[3, 1], ks=[2, 3])
    assert third == {2: Accuracy(0, 2), 3: Accuracy(2, 2)}
