from dataclasses import replace

import numpy as np
import pytest

from ivdr_deploy.artifacts.manifest import OutputParity
from ivdr_deploy.evaluation.invariance import (
    PROBE_CLIPS,
    fold,
    measure_batches,
    measure_sensitivity,
    probe_clips,
)
from ivdr_deploy.runtimes.base import Runtime

CLIPS = np.random.default_rng(0).integers(0, 256, (4, 2, 4, 4, 3), dtype=np.uint8)


class Network(Runtime):
    """A network of a few lines: logits and feature from the mean colour of the first frame."""

    def __init__(self) -> None:
        self.precision, self.call_clips = "fp32", 20
        self.sizes: list[int] = []

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        self.sizes.append(len(video))
        feature = video[:, 0].mean(axis=(1, 2)).astype(np.float32) / 255
        return {"logits": feature * 10, "feature": feature}


class Leaking(Network):
    """The clip in the last place of a batch of five is taken for the one before it."""

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        outputs = super().infer(video)
        if len(video) == 5:
            outputs = {name: np.concatenate([value[:-1], value[-2:-1]]) for name, value in outputs.items()}
        return outputs


def test_a_sound_network_is_the_same_in_every_batch() -> None:
    runtime = Network()
    found = measure_batches(runtime, CLIPS)
    assert (found.clips, found.flips, found.max_flip_margin) == (4, 0, 0.0)
    assert all(entry.max_abs_diff == 0 for entry in found.outputs)
    assert set(found.sizes) >= {2, 3, 64}
    assert set(runtime.sizes) == {1, *found.sizes}
    assert sum(runtime.sizes) < 200  # a bounded plan


def test_every_clip_takes_every_place_of_a_small_batch() -> None:
    places = set()

    class Watched(Network):
        def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
            if len(video) == 3:
                which = [int(np.flatnonzero([(clip == known).all() for known in CLIPS])[0]) for clip in video]
                places.update(zip(which, range(3), strict=True))
            return super().infer(video)

    measure_batches(Watched(), CLIPS)
    assert places == {(clip, place) for clip in range(4) for place in range(3)}


def test_a_fault_of_one_batch_size_and_place_is_found() -> None:
    found = measure_batches(Leaking(), CLIPS)
    assert not all(entry.passed for entry in found.outputs)
    assert found.flips == 1
    assert found.max_flip_margin > 1e-4


def test_large_clips_are_put_into_smaller_batches() -> None:
    large = np.zeros((1, 32, 224, 224, 3), np.uint8)
    assert max(measure_batches(Network(), large).sizes) == 20


def test_sensitivity_is_movement_over_error() -> None:
    network = Network()
    expected = network.infer(CLIPS)
    off = {name: value + np.float32(1e-3) for name, value in expected.items()}
    exact, rough = (measure_sensitivity(network, CLIPS, reference) for reference in (expected, off))
    assert all(entry.ratio > 1e5 for entry in exact)
    assert [entry.error for entry in rough] == pytest.approx([1e-3, 1e-3], rel=1e-3)
    assert all(entry.ratio == pytest.approx(entry.moved / entry.error) for entry in rough)


def test_what_never_moves_has_no_sensitivity_even_without_an_error() -> None:
    class Constant(Network):
        def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
            return {
                "logits": np.ones((len(video), 3), np.float32),
                "feature": np.zeros((len(video), 3), np.float32),
            }

    network = Constant()
    assert [entry.ratio for entry in measure_sensitivity(network, CLIPS, network.infer(CLIPS))] == [0, 0]
    broken = {"logits": np.full((4, 3), np.nan, np.float32)}
    assert [entry.ratio for entry in measure_sensitivity(network, CLIPS, broken)] == [0]


def test_one_clip_is_moved_by_turning_its_frames() -> None:
    network = Network()
    (logits, _) = measure_sensitivity(network, CLIPS[:1], network.infer(CLIPS[:1]))
    assert logits.ratio > 100


def test_still_clips_are_moved_by_one_another() -> None:
    network, still = Network(), np.repeat(CLIPS[:, :1], 2, axis=1)
    (logits, _) = measure_sensitivity(network, still, network.infer(still))
    assert logits.ratio > 100


def test_clips_of_videos_come_before_golden_ones() -> None:
    assert probe_clips(None, []) is None
    chosen = probe_clips(CLIPS, [CLIPS[3]])
    assert chosen is not None
    assert len(chosen) == PROBE_CLIPS
    assert (chosen[0] == CLIPS[3]).all()
    assert (chosen[1] == CLIPS[0]).all()


def test_the_worst_comparison_decides_not_the_most_generous_one() -> None:
    first, second = (
        OutputParity(output="logits", max_abs_diff=diff, min_cosine=cosine, tolerance=tolerance)
        for diff, cosine, tolerance in ((5e-3, 0.99, 1e-2), (2e-3, 0.98, 1e-3))
    )
    joined = fold(fold({}, [first]), [second])
    assert joined == {"logits": replace(second, min_cosine=0.98)}
    assert fold(fold({}, [second]), [first]) == joined
