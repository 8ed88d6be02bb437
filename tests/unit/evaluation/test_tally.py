from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np

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
