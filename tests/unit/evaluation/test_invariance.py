from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from ivdr_deploy.artifacts.golden import Golden
from ivdr_deploy.artifacts.manifest import OutputParity
from ivdr_deploy.evaluation import invariance
from ivdr_deploy.evaluation.invariance import (
    PROBE_CLIPS,
    Company,
    Probe,
    choose_probes,
    fold,
    measure_batches,
    measure_sensitivity,
)
from ivdr_deploy.runtimes.base import Runtime

CLIPS = np.random.default_rng(0).integers(0, 256, (3, 2, 4, 4, 3), dtype=np.uint8)


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
    """The clip in the last place of a batch of one size is taken for the one before it."""

    def __init__(self, size: int = 5) -> None:
        super().__init__()
        self.size = size

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        outputs = super().infer(video)
        if len(video) == self.size:
            outputs = {name: np.concatenate([value[:-1], value[-2:-1]]) for name, value in outputs.items()}
        return outputs


def rows(outputs: dict[str, np.ndarray], index: int) -> dict[str, np.ndarray]:
    return {name: value[index] for name, value in outputs.items()}


def probes(clips: np.ndarray = CLIPS, *, off: float = 0.0) -> list[Probe]:
    outputs = Network().infer(clips)
    return [
        Probe(clip=clip, expected={name: row + np.float32(off) for name, row in rows(outputs, index).items()})
        for index, clip in enumerate(clips)
    ]


def sensitivity(network: Network, given: list[Probe]):
    return measure_sensitivity(network, given, network.infer(np.stack([probe.clip for probe in given])))


class Clock:
    """Time passes only where a network says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(invariance, "perf_counter", lambda: self.now)


def test_a_sound_network_is_the_same_in_every_batch() -> None:
    runtime = Network()
    found, alone = measure_batches(runtime, probes())
    assert (found.clips, found.flips, found.max_flip_margin) == (3, 0, 0.0)
    assert all(entry.max_abs_diff == 0 for entry in found.outputs)
    assert found.sizes == (2, 3, 5, 8, 20, 64)
    assert (found.turned, found.calls, found.left_out) == ((2, 3, 5, 8), (), ())
    assert set(runtime.sizes) == {1, *found.sizes}
    assert sum(runtime.sizes) < 200  # a bounded plan
    assert (alone["feature"] == Network().infer(CLIPS)["feature"]).all()


def test_every_clip_takes_every_place_of_a_small_batch_and_some_clip_every_place_of_a_large_one() -> None:
    places = set()

    class Watched(Network):
        def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
            which = [int(np.flatnonzero([(clip == known).all() for known in CLIPS])[0]) for clip in video]
            assert all(one != other for one, other in pairwise(which))
            places.update((len(video), clip, place) for place, clip in enumerate(which))
            return super().infer(video)

    measure_batches(Watched(), probes())
    for size in (2, 3, 5, 8):
        assert {(clip, place) for held, clip, place in places if held == size} == {
            (clip, place) for clip in range(3) for place in range(size)
        }
    assert {place for held, _, place in places if held == 64} == set(range(64))


@pytest.mark.parametrize("size", [2, 3, 5, 8, 20, 64])
def test_a_fault_of_one_batch_size_and_place_is_found(size: int) -> None:
    found, _ = measure_batches(Leaking(size), probes())
    assert not all(entry.passed for entry in found.outputs)
    assert found.flips
    assert found.max_flip_margin > 1e-4


def test_a_slow_network_is_tried_in_the_small_batches_and_the_others_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)

    class Slow(Leaking):
        def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
            clock.now += len(video)
            return super().infer(video)

    quicker, slow = Slow(3), Slow(3)
    found, _ = measure_batches(slow, probes())
    assert (found.sizes, found.turned, found.left_out) == ((2, 3, 5), (), (8, 20, 64))
    assert slow.sizes == [1, 1, 1, 2, 3, 5]
    assert found.flips == 1
    clock.now = 0.0
    monkeypatch.setattr(invariance, "TRIAL_SECONDS", 0.0)
    found, _ = measure_batches(quicker, probes())
    assert (found.sizes, found.flips) == ((2, 3), 1)


def test_calls_over_the_videos_are_compared_at_no_cost() -> None:
    """A fault of a size that is tried nowhere else, seen in what a call gave."""
    network, call = Leaking(7), np.concatenate([CLIPS, CLIPS, CLIPS[1:2]])
    given = network.infer(call)
    seen = [
        replace(probe, company=Company(size=7, place=place), found=(rows(given, place),))
        for probe, place in zip(probes(call[[0, 6]]), (0, 6), strict=True)
    ]
    network.sizes.clear()
    found, _ = measure_batches(network, seen, batches=False)
    assert network.sizes == [1, 1]
    assert (found.sizes, found.calls) == ((), (Company(size=7, place=0), Company(size=7, place=6)))
    assert found.flips == 1
    sound = [
        replace(probe, found=(rows(Network().infer(call), place),))
        for probe, place in zip(seen, (0, 6), strict=True)
    ]
    assert measure_batches(Network(), sound, batches=False)[0].flips == 0


def test_large_clips_are_put_into_smaller_batches() -> None:
    large = np.zeros((1, 32, 224, 224, 3), np.uint8)
    found, _ = measure_batches(Network(), probes(large))
    assert max(found.sizes) == 20


def test_sensitivity_is_movement_over_error() -> None:
    network = Network()
    exact, rough = (sensitivity(network, probes(off=off)) for off in (0.0, 1e-3))
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

    network, outputs = Constant(), Constant().infer(CLIPS)
    dead = [Probe(clip=clip, expected=rows(outputs, index)) for index, clip in enumerate(CLIPS)]
    assert [entry.ratio for entry in sensitivity(network, dead)] == [0, 0]
    broken = [replace(probe, expected={"logits": np.full(3, np.nan, np.float32)}) for probe in dead]
    assert [entry.ratio for entry in sensitivity(network, broken)] == [0]


def test_one_clip_is_moved_by_turning_its_frames() -> None:
    network = Network()
    (logits, _) = sensitivity(network, probes(CLIPS[:1]))
    assert logits.ratio > 100


def test_still_clips_are_moved_by_one_another() -> None:
    network, still = Network(), np.repeat(CLIPS[:, :1], 2, axis=1)
    (logits, _) = sensitivity(network, probes(still))
    assert logits.ratio > 100


def test_clips_of_videos_come_before_golden_ones() -> None:
    assert choose_probes(Golden(), []) == []
    golden = Golden(video=CLIPS, expected=Network().infer(CLIPS))
    (seen,) = probes(CLIPS[2:])
    chosen = choose_probes(golden, [seen])
    assert len(chosen) == PROBE_CLIPS
    assert chosen[0] is seen
    assert (chosen[1].clip == CLIPS[0]).all()
    assert (chosen[2].expected["feature"] == golden.expected["feature"][1]).all()


def test_the_worst_comparison_decides_not_the_most_generous_one() -> None:
    first, second = (
        OutputParity(output="logits", max_abs_diff=diff, min_cosine=cosine, tolerance=tolerance)
        for diff, cosine, tolerance in ((5e-3, 0.99, 1e-2), (2e-3, 0.98, 1e-3))
    )
    joined = fold(fold({}, [first]), [second])
    assert joined == {"logits": replace(second, min_cosine=0.98)}
    assert fold(fold({}, [second]), [first]) == joined
