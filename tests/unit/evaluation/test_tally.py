from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.golden import Golden
from ivdr_deploy.datasets.lists import VideoItem
from ivdr_deploy.evaluation.judging import judge
from ivdr_deploy.evaluation.metrics import Accuracy
from ivdr_deploy.evaluation.tally import SideBySide, Tally
from ivdr_deploy.evaluation.thresholds import thresholds_for
from ivdr_deploy.records import to_dict
from ivdr_deploy.runtimes.base import Runtime

FACTS = {
    "reference": "torch-fp32",
    "view_plan": "10 clips",
    "decoder": "pyav",
    "data": "list.csv",
    "measured_at": "2026-01-01T00:00:00+00:00",
    "bad_videos": 0,
}


class Network(Runtime):
    """Gives the mean of each clip."""

    def __init__(self, factor: float = 1.0) -> None:
        self.name, self.precision, self.description = "torch", "fp32", "a network"
        self.output_names, self.call_clips, self._factor = ("feature",), 20, factor

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        return {"feature": video.reshape(len(video), -1).mean(axis=1, keepdims=True) * self._factor}


def test_thousands_of_videos_need_little_memory_and_a_small_record(tiny_bundle: Path) -> None:
    """Outputs are folded as they come: what stays is a row of probabilities and a feature for each video."""
    manifest = open_bundle(tiny_bundle).manifest
    labels, clips, videos = manifest.labels, 10, 6000
    rng = np.random.default_rng(0)
    first, second = (Tally(variant, Network(), Golden()) for variant in manifest.variants)
    tracemalloc.start()
    for index in range(videos):
        item = VideoItem(Path(f"{index}.mp4"), labels[index % len(labels)], f"{index}.mp4")
        outputs = {
            "logits": rng.normal(size=(clips, len(labels))).astype(np.float32),
            "feature": rng.normal(size=(clips, 64)).astype(np.float32),
        }
        first.add(item, outputs, outputs)
        second.add(item, dict(outputs), outputs)
    record = second.record(first, manifest, FACTS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 80e6  # all similarities at once would take 144 MB
    assert len(json.dumps(to_dict(record))) < 150 * videos
    report = judge(record, thresholds_for("fp32"))
    assert report.passed
    assert report.agreement == Accuracy(videos, videos)
    assert report.recall_change is not None
    assert report.recall_change.total == videos


def test_of_one_class_no_retrieval_is_counted(tiny_bundle: Path) -> None:
    """Whatever the features, the nearest other video would be of the right class."""
    manifest = open_bundle(tiny_bundle).manifest
    for truth, asked in ((manifest.labels[:1] * 4, 0), (manifest.labels[:2] * 2, 4)):
        first, second = (Tally(variant, Network(), Golden()) for variant in manifest.variants)
        for number, label in enumerate(truth):
            outputs = {"feature": np.full((1, 1), number, np.float32)}
            for tally in (first, second):
                tally.add(
                    VideoItem(path=Path(f"{number}.mp4"), uri=f"{number}.mp4", label=label), outputs, outputs
                )
        record = second.record(first, manifest, FACTS)
        assert (len(record.videos.hits), len(record.videos.expected_hits)) == (asked, asked)
        assert (judge(record, thresholds_for("fp32")).recall is None) == (not asked)


def test_who_answers_worse_than_the_reference_has_the_loss(tiny_bundle: Path) -> None:
    """The reference finds the class of every video; the other one gives the feature of another video."""
    manifest = open_bundle(tiny_bundle).manifest
    rng, videos = np.random.default_rng(3), 60
    truth = [manifest.labels[index % len(manifest.labels)] for index in range(videos)]
    features = np.eye(len(manifest.labels))[[index % len(manifest.labels) for index in range(videos)]]
    features += rng.normal(scale=0.01, size=features.shape)
    first, second = (Tally(variant, Network(), Golden()) for variant in manifest.variants)
    for place, other in enumerate(rng.permutation(videos)):
        item = VideoItem(path=Path(f"{place}.mp4"), uri=f"{place}.mp4", label=truth[place])
        right, wrong = ({"feature": features[index : index + 1]} for index in (place, other))
        first.add(item, right, right)
        second.add(item, wrong, right)
    record = second.record(first, manifest, FACTS)
    assert sum(record.videos.hits) < videos / 2 < sum(record.videos.expected_hits) == videos
    report = judge(record, thresholds_for("fp32"))
    assert "recall" in {check.name for check in report.failures}
    assert report.recall_change is not None
    assert (report.recall_change.lost, report.recall_change.won) == (videos - sum(record.videos.hits), 0)


def test_the_margin_of_a_flip_is_how_much_surer_the_reference_was(tiny_bundle: Path) -> None:
    """Of 0.6 and 0.3 the variant makes 0.1 and 0.7: the reference preferred its label by 0.3, not by 0.6."""
    manifest = open_bundle(tiny_bundle).manifest
    rest = len(manifest.labels) - 2
    first, second = (Tally(variant, Network(), Golden()) for variant in manifest.variants)
    for place, (old, new) in enumerate([((0.6, 0.3), (0.1, 0.7)), ((0.6, 0.3), (0.5, 0.3))]):
        given = [
            {"logits": np.log([[*pair, *[(1 - sum(pair)) / rest] * rest]]).astype(np.float32)}
            for pair in (old, new)
        ]
        item = VideoItem(path=Path(f"{place}.mp4"), uri=f"{place}.mp4", label=None)
        first.add(item, given[0], given[0])
        second.add(item, given[1], given[0])
    columns = second.record(first, manifest, FACTS).videos
    assert (columns.expected, columns.found) == (manifest.labels[:1] * 2, manifest.labels[1::-1])
    assert columns.margins == pytest.approx((0.3, 0.0), abs=1e-6)
    assert columns.expected_confidence == pytest.approx((0.6, 0.6), abs=1e-6)
    assert columns.confidence == pytest.approx((0.7, 0.5), abs=1e-6)


def test_variants_side_by_side_keep_their_outputs_apart_and_a_few_clips(tiny_bundle: Path) -> None:
    variants = open_bundle(tiny_bundle).manifest.variants
    networks = (Network(), Network(2.0))
    together = SideBySide([Tally(*pair, Golden()) for pair in zip(variants, networks, strict=True)])
    clips = np.arange(6, dtype=np.uint8)[:, None, None, None, None] * np.ones((1, 2, 2, 2, 3), np.uint8)
    one, two = SideBySide.apart(together.infer(clips), 2)
    assert one["feature"].ravel().tolist() == [0, 1, 2, 3, 4, 5]
    assert two["feature"].ravel().tolist() == [0, 2, 4, 6, 8, 10]
    together.infer(clips[:1])
    assert sorted(probe.clip.max() for probe in together.seen) == [0, 0, 5]
    assert {(probe.company.size, probe.company.place) for probe in together.seen} == {(6, 0), (6, 5), (1, 0)}
    last = next(probe for probe in together.seen if probe.company.place == 5)
    assert [found["feature"].item() for found in last.found] == [5, 10]
    assert last.expected["feature"].item() == 5
    for _ in range(9):
        together.infer(clips)
    assert len(together.seen) == 3
