"""Convolutions over three axes as ones over two: the same numbers, for every kind of kernel and of rounding."""

import numpy as np
import onnx
import pytest
from int8_graphs import conv, graph_model, paired, ranges_of, run, weights
from onnx import helper

from ivdr_deploy.export.int8.source import SourceGraph
from ivdr_deploy.export.to_two_axes import over_two_axes

VIDEO = np.random.default_rng(5).integers(0, 256, (3, 7, 8, 9, 3), dtype=np.uint8)

KERNELS = {
    "space": {"kernel": (1, 3, 3), "pads": (0, 1, 0, 0, 1, 2), "strides": (1, 2, 1)},
    "time": {"kernel": (3, 1, 1), "pads": (2, 0, 0, 1, 0, 0), "strides": (2, 1, 1)},
    "time, frames apart": {"kernel": (3, 1, 1), "pads": (2, 0, 0, 2, 0, 0), "dilations": (2, 1, 1)},
    "time, padded before each row": {"kernel": (3, 1, 1), "pads": (1, 0, 2, 1, 0, 0)},
    "time, padded behind each column": {"kernel": (3, 1, 1), "pads": (1, 0, 0, 1, 1, 0)},
    "time, every second row": {"kernel": (3, 1, 1), "pads": (1, 0, 0, 1, 0, 0), "strides": (1, 2, 1)},
    "time, every second column": {"kernel": (3, 1, 1), "pads": (1, 0, 0, 1, 0, 0), "strides": (1, 1, 2)},
    "full": {"kernel": (3, 3, 2), "pads": (1, 1, 1, 0, 1, 0), "strides": (2, 1, 2)},
    "apart": {"kernel": (2, 3, 3), "pads": (0, 1, 1, 0, 1, 1), "dilations": (3, 1, 2)},
    "every second frame": {"kernel": (1, 1, 1), "strides": (2, 2, 2)},
    "point": {"kernel": (1, 1, 1)},
}


def whole(*nodes: onnx.NodeProto, **constants: np.ndarray) -> onnx.ModelProto:
    """A graph that also gives every value of ``y``, not only their mean."""
    model = graph_model(*nodes, size=VIDEO.shape[1:4], **constants)
    model.graph.output.append(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None))
    return model


def same(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite a graph and see that it gives the same numbers."""
    before = model.SerializeToString()
    made = over_two_axes(model)
    assert model.SerializeToString() == before
    for expected, found in zip(run(model, VIDEO), run(made, VIDEO), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    return made


def axes(model: onnx.ModelProto) -> set[int]:
    """How many axes the weights of the convolutions have; what is rounded has those of what it was."""
    held = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    makers = {node.output[0]: node for node in model.graph.node}
    found = set()
    for node in model.graph.node:
        if node.op_type == "Conv":
            name = node.input[1]
            while name in makers:
                name = makers[name].input[0]
            found.add(held[name])
    return found


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
def test_a_convolution_over_three_axes_is_one_over_two(kernel: dict[str, tuple[int, ...]]) -> None:
    rng = np.random.default_rng(1)
    again = (3, 1, 1)  # two of them one after the other: what the first gives lies as it should
    made = same(
        whole(
            conv("x", "a", **kernel),
            helper.make_node("Relu", ["a"], ["b"]),
            conv("b", "y", kernel=again, pads=(1, 0, 0, 1, 0, 0)),
            **weights("a", kernel["kernel"], rng=rng),
            **weights("y", again, channels=5, rng=rng),
        )
    )
    assert axes(made) == {4}


@pytest.mark.parametrize("form", [0, 1], ids=["int8", "fp8"])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
def test_what_is_rounded_to_8_bits_is_rounded_alike(kernel: dict[str, tuple[int, ...]], form: int) -> None:
    model = whole(conv("x", "y", **kernel), **weights("y", kernel["kernel"], rng=np.random.default_rng(2)))
    source = SourceGraph(model)
    made = same(paired(source, ranges_of(source, VIDEO))[form])
    assert axes(made) == {4}
    (node,) = (node for node in made.graph.node if node.op_type == "Conv")
    makers = {held.output[0]: held for held in made.graph.node}
    # TensorRT makes an 8-bit kernel where a convolution reads what was just rounded.
    assert [makers[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2


def test_a_grouped_convolution_over_time_stays_and_over_space_does_not() -> None:
    rng = np.random.default_rng(3)
    for kernel, expected in (((1, 3, 3), {4}), ((3, 1, 1), {5})):
        node = conv("x", "y", kernel=kernel)
        next(entry for entry in node.attribute if entry.name == "group").i = 3
        given = weights("y", kernel, channels=1, out=6, rng=rng)
        assert axes(same(whole(node, **given))) == expected


@pytest.mark.parametrize("turned", [0, 1])
def test_a_matrix_product_is_a_convolution(turned: int) -> None:
    rng = np.random.default_rng(4)
    matrix = rng.normal(size=(5, 4)).astype(np.float32)
    model = whole(
        conv("x", "y", kernel=(1, 1, 1)),
        helper.make_node("ReduceMean", ["y", "axes"], ["mean"], keepdims=0),
        helper.make_node("Gemm", ["mean", "m_w", "m_b"], ["logits"], transB=turned),
        **weights("y", (1, 1, 1), rng=rng),
        m_w=matrix.T if turned else matrix,
        m_b=rng.normal(size=4).astype(np.float32),
    )
    model.graph.output.append(helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None))
    made = same(model)
    assert "Gemm" not in {node.op_type for node in made.graph.node}
    assert "m_w" not in {tensor.name for tensor in made.graph.initializer}, "weights lie there twice"
