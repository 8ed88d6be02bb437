"""Weights that are rounded together: the errors cancel on what a convolution reads, and each fits its grid."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from int8_graphs import conv, graph, ranges_of, rounded, run, weights

from ivdr_deploy.errors import ExportError
from ivdr_deploy.export import layers
from ivdr_deploy.export.int8 import weights as rounding
from ivdr_deploy.export.int8.channels_last import lower
from ivdr_deploy.export.int8.qdq import insert_pairs
from ivdr_deploy.export.int8.quantise import calibrate, quantise
from ivdr_deploy.export.int8.source import SourceGraph
from ivdr_deploy.export.int8.weights import Weights, channel_parts, patches, round_together, round_weights

SIZE = (6, 12, 12)


def smooth_clips(count: int, seed: int) -> np.ndarray:
    """Videos of slow gradients: neighbours are alike, as in any video."""
    rng = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(*(np.linspace(0, 1, n) for n in SIZE), indexing="ij"))
    waves = rng.normal(size=(count, 3, 3)) @ places.reshape(3, -1)
    shades = 127 + 100 * np.sin(waves + rng.uniform(0, 6, (count, 3, 1)))
    return shades.reshape(count, 3, *SIZE).transpose(0, 2, 3, 4, 1).astype(np.uint8)


def network(rng: np.random.Generator) -> SourceGraph:
    return graph(
        conv("x", "a", kernel=(3, 3, 3), strides=(1, 2, 2), pads=(1, 1, 1, 1, 1, 1)),
        conv("a", "y", kernel=(2, 3, 3), dilations=(2, 1, 1), pads=(1, 0, 1, 0, 2, 1)),
        size=SIZE,
        **weights("a", (3, 3, 3), out=8, rng=rng),
        **weights("y", (2, 3, 3), channels=8, rng=rng),
    )


def gain(seen: np.ndarray) -> float:
    """How many times as exact a convolution is, on inputs (places, channels) of which it was told the first half."""
    half, channels = len(seen) // 2, seen.shape[1]
    given = np.random.default_rng(0).normal(size=(16, channels, 1, 1, 1)).astype(np.float32)
    errors = []
    for moment in (np.eye(channels), seen[:half].T @ seen[:half] / half):
        lost = (round_together(given, 8, [moment]).real - given).reshape(16, channels)
        errors.append(float(np.square(lost @ seen[half:].T).mean() ** 0.5))
    return errors[0] / errors[1]


def test_errors_cancel_on_inputs_whose_channels_are_alike() -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(size=(4000, 4)) @ rng.normal(size=(4, 64))
    assert gain(common + 0.1 * rng.normal(size=common.shape)) > 4


def test_errors_cancel_between_channels_that_are_far_apart() -> None:
    """Each channel is like the 128th after it, and unlike its neighbours."""
    rng = np.random.default_rng(1)
    once = rng.normal(size=(4000, 128))
    assert gain(np.hstack([once] * 3) + 0.1 * rng.normal(size=(4000, 384))) > 1.5


def test_inputs_that_have_nothing_in_common_round_each_weight_to_the_nearest() -> None:
    given = np.random.default_rng(1).normal(size=(5, 7, 1, 3, 3)).astype(np.float32)
    found = round_together(given, 8, [np.eye(63)])
    largest = np.abs(given).reshape(5, -1).max(axis=1)
    np.testing.assert_allclose(found.scale, largest / 127, rtol=1e-6)
    assert np.abs(found.real - given).max() <= found.scale.max() * 0.5001


@pytest.mark.parametrize(("bits", "limit"), [(7, 63), (8, 127)])
def test_no_weight_leaves_its_grid(bits: int, limit: int) -> None:
    """Not even where what is made good for others would take it beyond."""
    given = np.random.default_rng(2).uniform(0.97, 1, (6, 40, 1, 1, 1)).astype(np.float32)
    loud_and_low = np.tile([10.0, 1.0], 20)  # what is lost by one is ten steps of the other
    found = round_together(given, bits, [np.outer(loud_and_low, loud_and_low)])
    assert found.stored.dtype == np.int8
    assert np.abs(found.stored.astype(int)).max() == limit


def test_a_convolution_of_many_weights_is_rounded_in_parts_of_whole_channels() -> None:
    given = np.random.default_rng(3).normal(size=(2, 200, 3, 3, 3)).astype(np.float32)
    parts = channel_parts(given)
    assert [channel for part in parts for channel in range(200)[part]] == list(range(200))
    assert all(given[0, part].size <= 2048 for part in parts)
    found = round_together(given, 8, [np.eye(given[0, part].size) for part in parts])
    assert np.abs(found.real - given).max() <= found.scale.max() * 0.5001


def test_a_convolution_that_reads_nothing_but_zeros_is_rounded_too() -> None:
    given = np.random.default_rng(4).normal(size=(2, 3, 1, 1, 1)).astype(np.float32)
    found = round_together(given, 8, [np.zeros((3, 3))])
    assert np.abs(found.real - given).max() <= found.scale.max() * 0.5001


@pytest.mark.parametrize("index", [0, 1])
def test_what_is_watched_is_what_the_convolution_multiplies(index: int) -> None:
    """Padding, strides and dilations: with the weights it gives what ONNX Runtime gives, at every place."""
    source = network(np.random.default_rng(5))
    node = source.nodes[2 + index]
    assert node.op_type == "Conv"
    probe = onnx.ModelProto()
    probe.CopyFrom(source.model)
    for name in (node.input[0], node.output[0]):
        probe.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    _, read, made = run(probe, smooth_clips(1, seed=5))
    _, pads = source.padded(node)
    seen = patches(read[0], node, source, pads, 10_000, np.random.default_rng(0))
    given = source.constants[node.input[1]].reshape(len(made[0]), -1)
    computed = seen.reshape(len(seen), -1) @ given.T + source.constants[node.input[2]]
    expected = made[0].reshape(len(given), -1).T
    assert computed.shape == expected.shape
    np.testing.assert_allclose(np.sort(computed, axis=0), np.sort(expected, axis=0), rtol=1e-3, atol=0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_network_that_gives_no_numbers_is_refused(value: float) -> None:
    given = np.ones((2, 3, 1, 1, 1), np.float32)
    with pytest.raises(ExportError, match="gives NaN or infinity on the calibration clips"):
        round_together(given, 8, [np.full((3, 3), value)])


def test_a_convolution_of_groups_is_rounded_too_and_has_no_form_for_the_cpu() -> None:
    rng = np.random.default_rng(10)
    grouped = conv("a", "y", kernel=(1, 3, 3))
    next(entry for entry in grouped.attribute if entry.name == "group").i = 5
    source = graph(
        conv("x", "a", kernel=(1, 1, 1)),
        grouped,
        size=SIZE,
        **weights("a", (1, 1, 1), rng=rng),
        **weights("y", (1, 3, 3), channels=1, rng=rng),
    )
    clips = smooth_clips(6, seed=10)
    found = round_weights(source, clips, 8)
    for name in ("a_w", "y_w"):
        assert np.abs(found[name].real - source.constants[name]).max() < 5 * found[name].scale.max()
    (expected,), (made,) = (
        run(model, clips) for model in (source.model, insert_pairs(source, ranges_of(source, clips), found))
    )
    assert 1e-6 < np.abs(made - expected).max() < 0.02 * np.ptp(expected)
    with pytest.raises(ExportError, match=r"no form for the operator Conv"):
        lower(source, ranges_of(source, clips), found)


def test_few_places_are_picked_from_all_over_a_clip() -> None:
    source = network(np.random.default_rng(6))
    node = source.nodes[2]
    read = np.broadcast_to(np.arange(6, dtype=np.float32).reshape(1, 6, 1, 1), (3, *SIZE))
    seen = patches(read, node, source, source.padded(node)[1], 60, np.random.default_rng(0))
    assert seen.shape == (60, 3, 3, 3, 3)
    assert set(seen[:, 0, 1, 1, 1]) == {0, 1, 2, 3, 4, 5}


def test_the_clips_pass_again_where_not_all_moments_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    source = network(np.random.default_rng(7))
    opened: list[list[str]] = []

    def open_probe(model: onnx.ModelProto, outputs: list[str]):
        opened.append(outputs)
        return layers.open_probe(model, outputs)

    monkeypatch.setattr(rounding, "open_probe", open_probe)
    whole = round_weights(source, smooth_clips(6, seed=7), 8)
    monkeypatch.setattr(rounding, "_MOST_BYTES", 1)
    parted = round_weights(source, smooth_clips(6, seed=7), 8)
    assert opened == [["a", "x"], ["x"], ["a"]]
    assert parted.keys() == whole.keys() == {"a_w", "y_w"}
    for name, found in parted.items():
        assert np.array_equal(found.scale, whole[name].scale)
        assert np.abs(found.stored.astype(int) - whole[name].stored).mean() < 1


def test_an_8_bit_network_of_smooth_videos_is_several_times_as_exact(tmp_path: Path) -> None:
    """On videos that took no part; in both forms."""
    source = network(np.random.default_rng(8))
    onnx.save(source.model, tmp_path / "fp32.onnx")
    clips, others = smooth_clips(12, seed=8), smooth_clips(12, seed=9)
    (expected,) = run(source.model, others)
    for write, bits in ((lower, 7), (insert_pairs, 8)):
        plain = write(source, ranges_of(source, clips), rounded(source, bits))
        quantised = quantise(calibrate(tmp_path / "fp32.onnx", clips, weight_bits=bits), write)
        assert (
            max(np.abs(w.stored.astype(int)).max() for w in quantised.rounded.values()) == 2 ** (bits - 1) - 1
        )
        made = quantised.keeping(())
        errors = [np.square(run(model, others)[0] - expected).mean() ** 0.5 for model in (plain, made)]
        assert errors[1] < errors[0] / 2, (write, errors)


@pytest.mark.parametrize("axes", [3, 5])
def test_a_bias_that_steps_of_the_weights_cannot_hold_makes_them_coarser_in_its_channel_alone(
    axes: int,
) -> None:
    rng = np.random.default_rng(11)
    stored = rng.integers(-127, 128, (4, 6, *[3] * (axes - 2))).astype(np.int8)
    fine = Weights(stored, np.array([1e-3, 2e-3, 1e-9, 1e-12], np.float32))
    bias, read = np.array([5.0, -3.0, 0.5, -7.0], np.float32), np.float32(0.02)
    held = fine.beside(bias, read)
    assert held.scale.dtype == np.float32
    assert held.stored.dtype == np.int8
    for same in (0, 1):  # those that it can be stored in stay as they are
        assert held.scale[same] == fine.scale[same]
        assert np.array_equal(held.stored[same], fine.stored[same])
    whole = np.round(bias.astype(np.float64) / (held.scale.astype(np.float64) * float(read)))
    assert np.abs(whole).max() == pytest.approx(2**30, rel=1e-6)  # half of what 32 bits hold
    for coarser in (2, 3):
        assert held.scale[coarser] > fine.scale[coarser]
        off = np.abs(held.real[coarser] - fine.real[coarser])
        assert off.max() <= 0.5001 * held.scale[coarser]
    assert held.stored[2].any()  # scaled down, not lost
