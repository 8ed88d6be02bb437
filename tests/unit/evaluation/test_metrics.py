"""Accuracies and recalls against values worked by hand."""

import math
import tracemalloc

import numpy as np
import pytest

from ivdr_deploy.evaluation import metrics
from ivdr_deploy.evaluation.metrics import (
    Accuracy,
    clip_accuracy,
    leave_one_out_hits,
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
    assert Accuracy(0, 0).to_dict()["value"] is None  # JSON has no NaN
    assert str(Accuracy(8, 10)) == "80.0% (8/10, 95 % interval 49.0% to 94.3%)"
    assert Accuracy(8, 10).to_dict().keys() == {"value", "correct", "total", "low", "high"}


def test_video_accuracy_counts_the_k_most_probable() -> None:
    rows = [np.array([0.1, 0.6, 0.3]), np.array([0.5, 0.2, 0.3])]
    assert video_accuracy(rows, [1, 2]) == Accuracy(1, 2)
    assert video_accuracy(rows, [1, 2], k=2) == Accuracy(2, 2)
    assert video_accuracy(rows, [0, 1], k=2) == Accuracy(0, 2)


def test_of_equal_probabilities_the_lower_class_ranks_first() -> None:
    """Over so many that a sort which is not stable would mix them."""
    row = np.full(400, 1 / 400)
    for k in (1, 17, 399):
        assert video_accuracy([row, row], [k - 1, k], k=k) == Accuracy(1, 2)


def test_videos_and_classes_of_another_number_are_not_paired() -> None:
    rows = [np.array([1.0, 0.0])] * 3
    with pytest.raises(ValueError, match="zip"):
        video_accuracy(rows, [0, 0])
    with pytest.raises(ValueError, match="zip"):
        clip_accuracy([row[None] for row in rows], [0, 0])


def test_clip_accuracy_counts_single_clips_of_videos_of_any_length() -> None:
    logits = [np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]]), np.array([[0.0, 5.0]])]
    assert clip_accuracy(logits, [0, 1]) == Accuracy(3, 4)


def test_per_class_accuracy_is_by_true_class() -> None:
    assert per_class_accuracy([0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 2], num_classes=4) == [
        Accuracy(3, 4), Accuracy(1, 1), Accuracy(0, 1), Accuracy(0, 0)
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


@pytest.mark.parametrize("block", [1, 7, 40, 1 << 22])
def test_retrieval_is_that_of_the_whole_table_whatever_the_blocks(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against sorting all similarities at once; features repeat, so that there are ties."""
    monkeypatch.setattr(metrics, "_BLOCK", block)
    rng = np.random.default_rng(1)
    gallery, queries = rng.integers(-1, 2, (23, 3)).astype(float), rng.integers(-1, 2, (11, 3)).astype(float)
    gallery_labels, query_labels = rng.integers(0, 5, 23).tolist(), rng.integers(0, 6, 11).tolist()
    ks = [1, 2, 5, 23, 100]

    def unit(rows: np.ndarray) -> np.ndarray:
        centred = rows - rows.mean(axis=0)
        return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)

    ranked = np.argsort(-(unit(queries) @ unit(gallery).T), axis=1, kind="stable")
    found = dict.fromkeys(ks, 0)
    for k in ks:
        for row, wanted in zip(ranked, query_labels, strict=True):
            found[k] += any(gallery_labels[place] == wanted for place in row[:k])
    recall = retrieval_recall(
        gallery, queries, gallery_labels=gallery_labels, query_labels=query_labels, ks=ks
    )
    assert {k: accuracy.correct for k, accuracy in recall.items()} == found

    features = rng.normal(size=(23, 3))
    similarity = unit(features) @ unit(features).T
    np.fill_diagonal(similarity, -np.inf)
    right = [
        gallery_labels[row.argmax()] == label for row, label in zip(similarity, gallery_labels, strict=True)
    ]
    assert leave_one_out_hits(features, gallery_labels).tolist() == right


def test_retrieval_holds_no_table_of_all_against_all() -> None:
    features = np.random.default_rng(0).normal(size=(20_000, 4)).astype(np.float32)
    labels = [index % 10 for index in range(len(features))]
    tracemalloc.start()
    leave_one_out_hits(features, labels)
    retrieval_recall(features, features[:500], gallery_labels=labels, query_labels=labels[:500], ks=[1])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 300e6  # the table would take 1.6 GB
