"""Channels of uneven size are brought closer to each other, and the network computes what it did."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from int8_graphs import conv, graph, run, weights
from onnx import helper

from ivdr_deploy.export.int8 import quantise as int8_quantise
from ivdr_deploy.export.int8.channels_last import lower
from ivdr_deploy.export.int8.equalise import equalised
from ivdr_deploy.export.int8.quantise import calibrate, quantise
from ivdr_deploy.export.int8.source import SourceGraph

RNG = np.random.default_rng(3)
CLIPS = RNG.integers(0, 256, (9, 4, 6, 6, 3), dtype=np.uint8)

SPREAD = np.geomspace(1, 0.01, 5).astype(np.float32)
"""How large each channel is over the largest."""


def uneven(name: str, kernel: tuple[int, int, int], channels: int = 3) -> dict[str, np.ndarray]:
    """Weights and bias of a convolution that gives channels of very different size, none of them silent."""
    made = weights(name, kernel, channels=channels, rng=RNG)
    rows = SPREAD.reshape(-1, 1, 1, 1, 1)
    return {f"{name}_w": np.abs(made[f"{name}_w"]) * rows, f"{name}_b": np.abs(made[f"{name}_b"]) * SPREAD}


def balanced(name: str, kernel: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Those of one that reads such channels, and to which each of them says as much."""
    made = weights(name, kernel, channels=5, rng=RNG)
    return {f"{name}_w": made[f"{name}_w"] / SPREAD.reshape(1, -1, 1, 1, 1), f"{name}_b": made[f"{name}_b"]}


def one_after_the_other() -> SourceGraph:
    return graph(
        conv("x", "a", kernel=(1, 1, 1)),
        helper.make_node("Relu", ["a"], ["positive"]),
        conv("positive", "y", kernel=(1, 3, 3), pads=(0, 1, 1, 0, 1, 1)),
        **uneven("a", (1, 1, 1)),
        **balanced("y", (1, 3, 3)),
    )


def sum_and_branches() -> SourceGraph:
    """A sum of two, joined with a third, pooled."""
    return graph(
        conv("x", "a", kernel=(1, 1, 1)),
        conv("x", "b", kernel=(1, 1, 1)),
        conv("x", "c", kernel=(1, 1, 1)),
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["positive"]),
        conv("positive", "d", kernel=(1, 1, 1)),
        helper.make_node("Concat", ["positive", "c"], ["joined"], axis=1),
        helper.make_node("MaxPool", ["joined"], ["pooled"], kernel_shape=[1, 2, 2], strides=[1, 2, 2]),
        conv("pooled", "e", kernel=(1, 3, 3)),
        helper.make_node("ReduceMean", ["d", "axes"], ["half"], keepdims=1),
        helper.make_node("Add", ["e", "half"], ["y"]),
        **uneven("a", (1, 1, 1)),
        **uneven("b", (1, 1, 1)),
        **uneven("c", (1, 1, 1)),
        **balanced("d", (1, 1, 1)),
        **weights("e", (1, 3, 3), channels=10, rng=RNG),
    )


def one_of_a_sum_is_read_besides() -> SourceGraph:
    """By a mean, before the sum is made."""
    return graph(
        conv("x", "a", kernel=(1, 1, 1)),
        conv("x", "b", kernel=(1, 1, 1)),
        helper.make_node("ReduceMean", ["b", "axes"], ["half"], keepdims=1),
        helper.make_node("Add", ["a", "b"], ["sum"]),
        conv("sum", "c", kernel=(1, 1, 1)),
        helper.make_node("Add", ["c", "half"], ["y"]),
        **uneven("a", (1, 1, 1)),
        **uneven("b", (1, 1, 1)),
        **balanced("c", (1, 1, 1)),
    )


def peaks(model: onnx.ModelProto, name: str) -> np.ndarray:
    """The largest value of each channel."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return np.abs(run(probe, CLIPS)[-1]).max(axis=(0, 2, 3, 4))


@pytest.mark.parametrize("made", [one_after_the_other, sum_and_branches, one_of_a_sum_is_read_besides])
def test_the_network_computes_what_it_did(made) -> None:
    source = made()
    (expected,), (found,) = run(source.model, CLIPS), run(equalised(source.model, CLIPS), CLIPS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("made", "value"), [(one_after_the_other, "positive"), (sum_and_branches, "c")])
def test_channels_come_half_way_to_each_other(made, value: str) -> None:
    source = made()
    before, after = peaks(source.model, value), peaks(equalised(source.model, CLIPS), value)
    np.testing.assert_allclose(after / after.max(), np.sqrt(before / before.max()), rtol=1e-4)


def test_two_that_are_summed_get_the_same_factors() -> None:
    source = sum_and_branches()
    result = equalised(source.model, CLIPS)
    change = {name: peaks(result, name) / peaks(source.model, name) for name in ("a", "b", "sum")}
    np.testing.assert_allclose(change["a"], change["b"], rtol=1e-4)
    np.testing.assert_allclose(change["a"], change["sum"], rtol=1e-4)
    assert change["a"].max() / change["a"].min() > 10


def test_what_is_read_by_something_that_cannot_undo_a_factor_stays() -> None:
    """By a mean, by an output, by a convolution of groups."""
    source = sum_and_branches()
    result = equalised(source.model, CLIPS)
    for name in ("d", "e"):
        np.testing.assert_allclose(peaks(result, name), peaks(source.model, name), rtol=1e-4)
    grouped = conv("a", "y", kernel=(1, 1, 1))
    next(entry for entry in grouped.attribute if entry.name == "group").i = 5
    apart = graph(
        conv("x", "a", kernel=(1, 1, 1)),
        grouped,
        **uneven("a", (1, 1, 1)),
        **weights("y", (1, 1, 1), channels=1, rng=RNG),
    )
    np.testing.assert_allclose(peaks(equalised(apart.model, CLIPS), "a"), peaks(apart.model, "a"), rtol=1e-4)


def test_a_channel_that_never_speaks_is_not_blown_up() -> None:
    source = one_after_the_other()
    for tensor in source.model.graph.initializer:
        values = source.constants[tensor.name].copy()
        if tensor.name in ("a_w", "a_b"):
            values[2] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    (found,) = run(equalised(source.model, CLIPS), CLIPS)
    (expected,) = run(source.model, CLIPS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_an_8_bit_network_of_uneven_channels_is_several_times_as_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = one_after_the_other()
    onnx.save(source.model, tmp_path / "fp32.onnx")
    (expected,) = run(source.model, CLIPS)

    def error() -> float:
        made = quantise(calibrate(tmp_path / "fp32.onnx", CLIPS, weight_bits=7), lower).keeping(())
        return float(np.square(run(made, CLIPS)[0] - expected).mean() ** 0.5)

    found = error()
    monkeypatch.setattr(int8_quantise, "equalised", lambda model, clips: model)
    assert found < error() / 3
