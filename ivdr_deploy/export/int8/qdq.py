"""fp32 graph -> the same graph with QuantizeLinear and DequantizeLinear around its convolutions, as TensorRT takes it.

TensorRT fuses these pairs into 8-bit kernels. It wants signed values around zero, and no quantised bias.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ivdr_deploy.export.int8.scales import Ranges, quantised_tensors
from ivdr_deploy.export.int8.source import SourceGraph
from ivdr_deploy.export.int8.weights import Weights

_LIMIT = 127


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
    model = onnx.ModelProto()
    model.CopyFrom(source.model)
    scales: dict[str, np.float32] = {}
    for group in quantised_tensors(source):
        largest = max(max(abs(ranges[name][0]), abs(ranges[name][1])) for name in group)
        scales |= dict.fromkeys(group, np.float32(max(largest, 1e-8) / _LIMIT))
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray] = {}
    real: dict[str, np.ndarray] = {}
    done: set[str] = set()

    def pair(name: str, scale: np.ndarray, *, axis: int | None) -> str:
        result = f"{name}/rounded"
        if name not in done:
            done.add(name)
            constants[f"{name}/scale"] = scale
            constants[f"{name}/zero"] = np.zeros(scale.shape, np.int8)
            along: dict[str, Any] = {} if axis is None else {"axis": axis}
            ends = [f"{name}/scale", f"{name}/zero"]
            nodes.append(helper.make_node("QuantizeLinear", [name, *ends], [f"{name}/int8"], **along))
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}/int8", *ends], [result], **along))
        return result

    for node in model.graph.node:
        if node.op_type == "Conv" and node.name not in kept and node.input[1] in rounded:
            weights = rounded[node.input[1]]
            real[node.input[1]] = weights.real
            read = source.padding.get(node.input[0], (node.input[0],))[0]
            node.input[0] = pair(node.input[0], np.asarray(scales[read]), axis=None)
            node.input[1] = pair(node.input[1], weights.scale, axis=0)
        nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    for tensor in model.graph.initializer:
        if tensor.name in real:
            tensor.CopyFrom(numpy_helper.from_array(real[tensor.name], tensor.name))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return model
