"""The fp32 graph that is lowered: constants by name, readers of a value, padding moved into what it pads for."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from ivdr_deploy.errors import ExportError
from ivdr_deploy.export.layers import layer_name

_WEIGHT_AXES = 5
"""Outputs, channels, T, H, W."""

_WINDOW = {"strides": [1, 1, 1], "dilations": [1, 1, 1], "pads": [0] * 6}
_IMPLIED: dict[str, dict[str, Any]] = {
    "Conv": {**_WINDOW, "group": 1},
    "MaxPool": _WINDOW,
    "ReduceMean": {"keepdims": 1},
    "Transpose": {"perm": []},
}


class SourceGraph:
    """What ``export_onnx`` wrote, indexed for lowering.

    Args:
        model: The fp32 model. It is not changed.

    Raises:
        ExportError: if it holds a convolution that has no 8-bit form; names its layer.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.constants: dict[str, np.ndarray] = {
            tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer
        }
        self.nodes: list[onnx.NodeProto] = []
        self.padding: dict[str, tuple[str, list[int]]] = {}
        """Result of a zero padding -> what it pads, and by how much: begins, then ends, of T, H and W."""

        self.shapes = _shapes(model)
        """Of every value that is known, without its first axis, the batch."""

        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = _constant(node)
            elif (pads := self._zero_padding(node)) is not None:
                self.padding[node.output[0]] = (node.input[0], pads)
            else:
                self.nodes.append(node)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)
            self._require_form(node)

    def sole_reader(self, name: str, op_type: str) -> onnx.NodeProto | None:
        """Return the one node that reads a value, if it is of the given type and the value is no output."""
        readers = self.readers[name]
        is_output = any(output.name == name for output in self.model.graph.output)
        return readers[0] if len(readers) == 1 and not is_output and readers[0].op_type == op_type else None

    def padded(self, node: onnx.NodeProto) -> tuple[str, list[int]]:
        """Return what a convolution or a pooling reads, and by how much it is padded: begins, then ends, of T, H, W."""
        pads = [int(pad) for pad in attributes(node)["pads"]]
        name = node.input[0]
        if name in self.padding:
            name, more = self.padding[name]
            pads = [a + b for a, b in zip(pads, more, strict=True)]
        return name, pads

    def _require_form(self, node: onnx.NodeProto) -> None:
        if node.op_type != "Conv":
            return
        weights = self.constants.get(node.input[1])
        if weights is None or weights.ndim != _WEIGHT_AXES:
            name = layer_name(node) or node.output[0]
            found = "are computed" if weights is None else f"have {weights.ndim} axes"
            raise ExportError(
                f"the int8 engine has no form for the convolution {name}: its weights {found}, expected constants of "
                f"{_WEIGHT_AXES} axes",
                hint="export this network in another precision",
            )

    def _zero_padding(self, node: onnx.NodeProto) -> list[int] | None:
        if node.op_type != "Pad" or attributes(node).get("mode", b"constant") != b"constant":
            return None
        if len(node.input) > 2 and node.input[2] and self.constants[node.input[2]].any():
            return None
        pads = [int(value) for value in self.constants[node.input[1]]]
        if len(pads) != 10 or any((*pads[:2], *pads[5:7])):
            return None
        return [*pads[2:5], *pads[7:10]]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return the attributes of a node by name, and what the operators that are lowered do where one is not given."""
    given = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    return {**_IMPLIED.get(node.op_type, {}), **given}


def _shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim[1:]]
        for value in (*graph.input, *graph.value_info, *graph.output)
    }


def _constant(node: onnx.NodeProto) -> np.ndarray:
    values = attributes(node)
    if "value" not in values:
        raise ExportError(f"the constant {node.output[0]} of the fp32 graph is not a tensor")
    return numpy_helper.to_array(values["value"])
