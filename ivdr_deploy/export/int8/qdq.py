"""fp32 graph -> the same graph with QuantizeLinear and DequantizeLinear around its convolutions, as TensorRT takes it.

TensorRT fuses these pairs into 8-bit kernels. It wants signed values around zero, and no quantised bias.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ivdr_deploy.export.int8.scales import Ranges, quantised_tensors
from ivdr_deploy.export.int8.source import SourceGraph
from ivdr_deploy.export.int8.weights import Weights


@dataclass(frozen=True, slots=True)
class _Stored:
    """How a value is kept in 8 bits: the type of ONNX, and its largest number."""

    type: int
    largest: int


_INT8 = _Stored(TensorProto.INT8, 127)
_FP8 = _Stored(TensorProto.FLOAT8E4M3FN, 448)


def insert_pairs(
    source: SourceGraph, ranges: Ranges, rounded: Mapping[str, Weights], kept: Collection[str] = ()
) -> onnx.ModelProto:
    """Return a copy of the fp32 graph whose convolutions read values rounded to 8 bits.

    Args:
        source: The fp32 graph.
        ranges: For every tensor of ``quantised_tensors``.
        rounded: Weights of every convolution, by the names of their constants.
        kept: Names of convolutions that stay in fp32.
    """
    scales = {name: weights.scale for name, weights in rounded.items()}
    real = {name: weights.real for name, weights in rounded.items()}
    return _insert(source, ranges, scales, real, kept, _INT8)


def insert_fp8_pairs(
    source: SourceGraph, ranges: Ranges, rounded: Mapping[str, Weights], kept: Collection[str] = ()
) -> onnx.ModelProto:
    """Return a copy of the fp32 graph whose convolutions read values rounded to fp8: 4 bits of exponent, 3 of fraction.

    Weights are those of the graph: rounded together they would fit the steps of int8, which are of one size.

    Args:
        source: As in ``insert_pairs``, and so are the others.
        ranges: Of the tensors.
        rounded: Says by its names which weights there are.
        kept: Names of convolutions.
    """
    scales = {}
    for name in rounded:
        largest = np.abs(source.constants[name]).reshape(len(source.constants[name]), -1).max(axis=1)
        scales[name] = (np.maximum(largest, 1e-8) / _FP8.largest).astype(np.float32)
    return _insert(source, ranges, scales, {}, kept, _FP8)


def _insert(
    source: SourceGraph,
    ranges: Ranges,
    weight_scales: Mapping[str, np.ndarray],
    real: Mapping[str, np.ndarray],
    kept: Collection[str],
    stored: _Stored,
) -> onnx.ModelProto:
    """Insert the pairs; weights of which ``real`` holds another value are replaced by it."""
    model = onnx.ModelProto()
    model.CopyFrom(source.model)
    scales: dict[str, np.float32] = {}
    for group in quantised_tensors(source):
        largest = max(max(abs(ranges[name][0]), abs(ranges[name][1])) for name in group)
        scales |= dict.fromkeys(group, np.float32(max(largest, 1e-8) / stored.largest))
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    done: set[str] = set()

    def pair(name: str, scale: np.ndarray, *, axis: int | None) -> str:
        result = f"{name}/rounded"
        if name not in done:
            done.add(name)
            ends = [f"{name}/scale", f"{name}/zero"]
            constants.append(numpy_helper.from_array(scale, ends[0]))
            constants.append(helper.make_tensor(ends[1], stored.type, scale.shape, np.zeros(scale.size)))
            along: dict[str, Any] = {} if axis is None else {"axis": axis}
            nodes.append(helper.make_node("QuantizeLinear", [name, *ends], [f"{name}/stored"], **along))
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}/stored", *ends], [result], **along))
        return result

    replaced: set[str] = set()
    for node in model.graph.node:
        if node.op_type == "Conv" and node.name not in kept and node.input[1] in weight_scales:
            replaced.add(node.input[1])
            read = source.padding.get(node.input[0], (node.input[0],))[0]
            node.input[0] = pair(node.input[0], np.asarray(scales[read]), axis=None)
            node.input[1] = pair(node.input[1], weight_scales[node.input[1]], axis=0)
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    for tensor in model.graph.initializer:
        if tensor.name in replaced and tensor.name in real:
            tensor.CopyFrom(numpy_helper.from_array(real[tensor.name], tensor.name))
    del model.graph.node[:]
    model.graph.node.extend(copies)
    model.graph.initializer.extend(constants)
    return model
