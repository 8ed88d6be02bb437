"""Calibration is judged by clips that took no part in it, and the method that changes them least is taken."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
from int8_graphs import conv, graph, ranges_of, rounded, weights
from onnx import TensorProto, helper, numpy_helper

from ivdr_deploy.errors import ExportError
from ivdr_deploy.export.int8.quantise import Quantised, calibrate, quantise
from ivdr_deploy.export.int8.ranges import Method
from ivdr_deploy.export.int8.scales import Ranges
from ivdr_deploy.export.int8.source import SourceGraph
from ivdr_deploy.export.int8.weights import Weights

SHAPE = (2, 4, 4, 3)
DARK, BRIGHT = 20, 200


def network(path: Path, *, gain: float = 1.0, lift: float = 0.0, logit: float = 1.0) -> onnx.ModelProto:
    """The mean over a clip of gain * x + lift * (x > 100): ``lift`` shows on bright clips alone.

    The other output is ``logit`` times as much.
    """
    constants = {
        "w": np.full((1, 3, 1, 1, 1), gain / 3, np.float32),
        "axes": np.array([1, 2, 3, 4]),
        "limit": np.float32(100),
        "lift": np.float32(lift),
        "logit": np.float32(logit),
    }
    nodes = [
        helper.make_node("Cast", ["video"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["cast"], ["x"], perm=[0, 4, 1, 2, 3]),
        helper.make_node("Conv", ["x", "w"], ["y"], name="conv", kernel_shape=[1, 1, 1]),
        helper.make_node("Greater", ["y", "limit"], ["above"]),
        helper.make_node("Cast", ["above"], ["one"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["one", "lift"], ["lifted"]),
        helper.make_node("Add", ["y", "lifted"], ["sum"]),
        helper.make_node("ReduceMean", ["sum", "axes"], ["feature"], keepdims=0),
        helper.make_node("Mul", ["feature", "logit"], ["logits"]),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info("video", TensorProto.UINT8, ["batch", *SHAPE])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("feature", "logits")],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, path)
    return model


def clips(*values: int) -> np.ndarray:
    return np.stack([np.full(SHAPE, value, np.uint8) for value in values])


class Written:
    """Stands for the writer of int8 graphs: answers with one graph after the other, and notes the ranges."""

    def __init__(self, *answers: onnx.ModelProto) -> None:
        self.answers, self.ranges = list(answers), list[Ranges]()

    def __call__(
        self, source: SourceGraph, ranges: Ranges, rounded: Mapping[str, Weights], kept: Collection[str]
    ) -> onnx.ModelProto:
        self.ranges.append(ranges)
        return self.answers[len(self.ranges) - 1]


def test_every_third_clip_judges_and_takes_no_part(tmp_path: Path) -> None:
    exact = network(tmp_path / "fp32.onnx")
    write = Written(*[exact] * len(get_args(Method)))
    given = clips(DARK, DARK, BRIGHT, DARK, DARK, BRIGHT, DARK)
    found = quantise(calibrate(tmp_path / "fp32.onnx", given), write)
    assert np.array_equal(found.clips, clips(BRIGHT, BRIGHT))
    for ranges in write.ranges:
        assert ranges.keys() == {"x", "y"}
        assert all(high <= DARK * 1.01 for _, high in ranges.values())


@pytest.mark.parametrize("best", range(len(get_args(Method))))
def test_the_method_that_changes_the_held_out_clips_least_is_taken(tmp_path: Path, best: int) -> None:
    """The others are right where they were calibrated, and wrong on what they have not seen."""
    network(tmp_path / "fp32.onnx")
    wrong = network(tmp_path / "wrong.onnx", lift=BRIGHT / 2)
    nearly = network(tmp_path / "nearly.onnx", gain=1.01)
    write = Written(*[nearly if place == best else wrong for place in range(len(get_args(Method)))])
    found = quantise(calibrate(tmp_path / "fp32.onnx", clips(DARK, DARK, BRIGHT, DARK, DARK, BRIGHT)), write)
    assert found.method == get_args(Method)[best]
    assert found.ranges is write.ranges[best]
    assert found.errors[found.method] == pytest.approx(0.01, rel=1e-3)
    assert sorted(found.errors.values())[1] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("off", [{"logit": 1.1}, {"gain": 1.1, "logit": 1 / 1.1}])
def test_a_method_is_judged_by_the_output_that_it_changes_most(tmp_path: Path, off: dict[str, float]) -> None:
    """The other output is exact, and excuses nothing; both in turn."""
    network(tmp_path / "fp32.onnx")
    one = network(tmp_path / "one.onnx", **off)
    both = network(tmp_path / "both.onnx", gain=1.08)
    found = quantise(
        calibrate(tmp_path / "fp32.onnx", clips(DARK, DARK, BRIGHT, DARK, DARK, BRIGHT)),
        Written(one, both, one),
    )
    assert found.method == get_args(Method)[1]
    assert list(found.errors.values()) == pytest.approx([0.1, 0.08, 0.1], rel=1e-3)


def test_the_convolution_that_adds_most_error_comes_first() -> None:
    """8 bits hold the pixels and the weights of the first one exactly, and not those of the second."""
    rng = np.random.default_rng(0)
    nodes = [conv("x", "a", kernel=(1, 1, 1)), conv("a", "y", kernel=(1, 1, 1))]
    for node, name in zip(nodes, ("exact", "inexact"), strict=True):
        node.name = name
    exact = {"a_w": np.ones((5, 3, 1, 1, 1), np.float32), "a_b": np.zeros(5, np.float32)}
    source = graph(*nodes, **exact, **weights("y", (1, 1, 1), channels=5, rng=rng))
    video = rng.choice(np.array([0, 255], np.uint8), (2, 4, 6, 6, 3))
    made = Quantised(
        source=source,
        rounded=rounded(source, 8),
        ranges=ranges_of(source, video),
        write=Written(),
        clips=video,
        method="min-max",
        errors={},
    )
    assert made.by_error() == ["inexact", "exact"]


def test_too_few_clips_to_hold_some_out_are_refused(tmp_path: Path) -> None:
    network(tmp_path / "fp32.onnx")
    with pytest.raises(ExportError, match=r"5 clips are too few to calibrate with; at least 6"):
        calibrate(tmp_path / "fp32.onnx", clips(*[DARK] * 5))
