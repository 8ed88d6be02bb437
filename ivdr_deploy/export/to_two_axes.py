"""An ONNX graph whose convolutions over time, height and width are done over two axes, for GPUs that have no others.

TensorRT-RTX has neither fp32 convolutions over three axes nor fp32 matrix products for Turing (compute capability 7.5,
such as the T4). It has fp32 convolutions over two, and both become such ones without a change of what is computed:
frames are seen as images, pixels of a frame as columns that move through time, and a full kernel reads frames that were
joined along their channels; see ``int8.planes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ivdr_deploy.export.int8.planes import Planes, as_planes
from ivdr_deploy.export.int8.source import SourceGraph, attributes

_TIME_FIRST = [0, 2, 1, 3, 4]
"""(N, C, T, H, W) to (N, T, C, H, W), and back."""


def over_two_axes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph that computes the same with convolutions over two axes and without matrix products.

    Args:
        model: What ``export_onnx`` wrote, or that with pairs of ``int8.qdq``. It is not changed. Grouped convolutions
            over time, and products of two computed values, stay as they are.

    Raises:
        ExportError: as ``int8.source.SourceGraph``.
    """
    return _Rewriting(model).result


class _Rewriting:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.result = onnx.ModelProto()
        self.result.CopyFrom(model)
        self._initializers = {tensor.name: tensor for tensor in self.result.graph.initializer}
        self._makers = {node.output[0]: node for node in self.result.graph.node}
        self._shapes = SourceGraph(_without_pairs(model)).shapes
        self._nodes: list[onnx.NodeProto] = []
        for node in list(self.result.graph.node):
            if node.op_type == "Conv" and self._convolve(node):
                continue
            if node.op_type == "Gemm" and self._multiply(node):
                continue
            self._nodes.append(node)
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self._nodes]
        del self.result.graph.node[:], self.result.graph.value_info[:]
        self.result.graph.node.extend(nodes)
        read = {name for node in nodes for name in node.input}
        for tensor in [held for held in self.result.graph.initializer if held.name not in read]:
            self.result.graph.initializer.remove(tensor)

    def _convolve(self, node: onnx.NodeProto) -> bool:
        """Add a convolution over two axes in the place of one over three; returns whether there is one."""
        stored = self._initializers.get(self._rounded(node.input[1]))
        given = attributes(node)
        if stored is None or len(stored.dims) != 5:
            return False
        if given["group"] != 1 and stored.dims[2] != 1:
            return False
        size, found = self._shapes[self._rounded(node.input[0])], self._shapes[node.output[0]]
        weights = numpy_helper.to_array(stored)
        window = {name: [int(value) for value in given[name]] for name in ("strides", "dilations", "pads")}
        planes = as_planes(weights, size, found[1], **window)
        stored.CopyFrom(numpy_helper.from_array(planes.weights, stored.name))
        columns = weights.shape[2] > 1 and not planes.starts
        images = self._read(node, planes, size, columns=columns)
        made = self._add(
            "Conv",
            [images, *node.input[1:]],
            f"{node.output[0]}/planes",
            group=given["group"],
            strides=planes.strides,
            dilations=planes.dilations,
            pads=planes.pads,
        )
        channels, frames, rows, wide = found
        if columns:
            self._reshape(made, [-1, channels, frames, rows, wide], node.output[0])
        else:
            apart = self._reshape(made, [-1, frames, channels, rows, wide], f"{node.output[0]}/frames")
            self._add("Transpose", [apart], node.output[0], perm=_TIME_FIRST)
        return True

    def _read(self, node: onnx.NodeProto, planes: Planes, size: Sequence[int], *, columns: bool) -> str:
        """Add what turns activations into what is read; where these are rounded, before they are."""
        name, x = node.output[0], self._rounded(node.input[0])
        if columns:
            images = self._reshape(x, [-1, size[0], size[1], size[2] * size[3]], f"{name}/columns")
        else:
            before, behind = planes.padding
            if before or behind:
                pads = self._constant(f"{name}/pads", [0, 0, before, 0, 0, 0, 0, behind, 0, 0])
                x = self._add("Pad", [x, pads], f"{name}/padded")
            parts = [self._slice(x, planes, start, name) for start in planes.starts]
            if len(parts) > 1:
                x = self._add("Concat", parts, f"{name}/joined", axis=1)
            elif parts:
                (x,) = parts
            first = self._add("Transpose", [x], f"{name}/first", perm=_TIME_FIRST)
            _, rows, wide, channels = planes.view
            images = self._reshape(first, [-1, channels, rows, wide], f"{name}/images")
        if node.input[0] == self._rounded(node.input[0]):
            return images
        back = self._makers[node.input[0]]
        ends = list(self._makers[back.input[0]].input[1:])
        kept = self._add("QuantizeLinear", [images, *ends], f"{name}/stored")
        return self._add("DequantizeLinear", [kept, *ends], f"{name}/rounded")

    def _multiply(self, node: onnx.NodeProto) -> bool:
        """Add a convolution in the place of a product with constant weights; returns whether there is one."""
        given = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0, **attributes(node)}
        stored = self._initializers.get(node.input[1])
        if stored is None or (given["alpha"], given["beta"], given["transA"]) != (1.0, 1.0, 0):
            return False
        weights = numpy_helper.to_array(stored)
        weights = weights if given["transB"] else weights.T
        kernel = self._constant(f"{node.output[0]}/kernel", weights[:, :, None, None])
        image = self._reshape(node.input[0], [-1, weights.shape[1], 1, 1], f"{node.output[0]}/image")
        made = self._add("Conv", [image, kernel, *node.input[2:]], f"{node.output[0]}/planes")
        self._reshape(made, [-1, len(weights)], node.output[0])
        return True

    def _rounded(self, name: str) -> str:
        """Return what a value was before it was rounded; itself where it was not."""
        maker = self._makers.get(name)
        if maker is None or maker.op_type != "DequantizeLinear":
            return name
        return str(self._makers[maker.input[0]].input[0])

    def _slice(self, x: str, planes: Planes, start: int, name: str) -> str:
        values = {"start": start, "end": start + planes.length, "axis": 2, "step": planes.step}
        ends = [self._constant(f"{name}/{key}{start}", [value]) for key, value in values.items()]
        return self._add("Slice", [x, *ends], f"{name}/from{start}")

    def _reshape(self, x: str, shape: list[int], result: str) -> str:
        return self._add("Reshape", [x, self._constant(f"{result}/shape", shape)], result)

    def _constant(self, name: str, value: Any) -> str:
        self.result.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def _add(self, op_type: str, inputs: list[str], result: str, **given: Any) -> str:
        self._nodes.append(helper.make_node(op_type, inputs, [result], name=result, **given))
        return result


def _without_pairs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph as it was before values were rounded, for the shapes of its values."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type in _PAIR}
    nodes = [node for node in plain.graph.node if node.op_type not in _PAIR]
    for node in nodes:
        for index, name in enumerate(node.input):
            while name in sources:
                name = sources[name]
            node.input[index] = name
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del plain.graph.node[:]
    plain.graph.node.extend(kept)
    return plain


_PAIR = ("QuantizeLinear", "DequantizeLinear")
