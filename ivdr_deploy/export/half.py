"""A graph in half precision of which some nodes compute in fp32: those whose values do not fit, or lose too much."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ivdr_deploy.errors import ExportError
from ivdr_deploy.export.layers import largest_values, layer_errors

_LARGEST = float(np.finfo(np.float16).max) / 2
"""What a value may be on golden clips: half of what fp16 holds, since other clips give other values."""

_BY_TYPE = ("Cast", "CastLike", "Constant", "ConstantOfShape", "RandomNormal", "Range")
"""Operators that have their type by attribute or by another input, and are left as they are."""


class UnlikeGraphsError(ExportError):
    """Two graphs that should be of the same network are not."""


class HalfGraph:
    """What the exporter made of a network in half precision, with the constants of its fp32 form.

    The two graphs hold the same nodes in the same order, but for casts. The exporter folds batch norms in the precision
    of the network; here each constant is rounded once, from fp32.

    Args:
        half: The graph in half precision. It is not changed.
        full: The fp32 graph of the same network.

    Raises:
        UnlikeGraphsError: if the exporter wrote other nodes in half precision than in fp32.
    """

    def __init__(self, half: onnx.ModelProto, full: onnx.ModelProto) -> None:
        self._half = onnx.shape_inference.infer_shapes(half)
        pairs = [[node for node in one.graph.node if node.op_type != "Cast"] for one in (half, full)]
        kinds = [[(node.op_type, len(node.input)) for node in nodes] for nodes in pairs]
        if kinds[0] != kinds[1]:
            raise UnlikeGraphsError("the exporter made another graph in half precision than in fp32")
        held = {tensor.name: tensor for tensor in half.graph.initializer}
        known = {tensor.name: tensor for tensor in full.graph.initializer}
        self._constants = {
            name: numpy_helper.to_array(tensor).astype(np.float32)
            for name, tensor in held.items()
            if tensor.data_type == TensorProto.FLOAT16
        }
        """fp32 values of the constants that are half."""

        for one, other in zip(*pairs, strict=True):
            for name, origin in zip(one.input, other.input, strict=True):
                if name not in self._constants or origin not in known:
                    continue
                if held[name].dims != known[origin].dims:
                    raise UnlikeGraphsError(f"{name} has another shape in half precision than in fp32")
                self._constants[name] = numpy_helper.to_array(known[origin]).astype(np.float32)
        graph = self._half.graph
        values = [*graph.value_info, *graph.input, *graph.output]
        self._is_half = {
            value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT16
        }
        self.nodes = [
            node.name
            for node in graph.node
            if len(node.output) == 1 and node.output[0] in self._is_half and node.op_type not in _BY_TYPE
        ]
        """Names of those that compute in half precision."""

    def keeping(self, kept: Collection[str]) -> onnx.ModelProto:
        """Return the graph with some nodes in fp32; values are cast where the two meet, and only there."""
        model = onnx.ModelProto()
        model.CopyFrom(self._half)
        full: set[str] = set()
        """Values that are fp32 now."""

        nodes: list[onnx.NodeProto] = []
        casts: set[str] = set()
        used: set[str] = set()

        def cast(name: str, kind: int) -> str:
            result = f"{name}/{'full' if kind == TensorProto.FLOAT else 'half'}"
            if result not in casts:
                casts.add(result)
                nodes.append(helper.make_node("Cast", [name], [result], to=kind))
            return result

        for node in model.graph.node:
            keep = node.name in kept
            for index, name in enumerate(node.input):
                if name in self._constants:
                    node.input[index] = f"{name}/full" if keep else name
                elif name in full and not keep and node.op_type != "Cast":
                    node.input[index] = cast(name, TensorProto.FLOAT16)
                elif keep and name in self._is_half and name not in full:
                    node.input[index] = cast(name, TensorProto.FLOAT)
            full |= {name for name in node.output if keep and name in self._is_half}
            used |= set(node.input)
            nodes.append(node)
        held = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in used}
        with np.errstate(over="ignore"):  # what is too large for fp16 is read by a node that is kept
            for name, value in self._constants.items():
                if name in used:
                    held[name] = numpy_helper.from_array(value.astype(np.float16), name)
                if f"{name}/full" in used:
                    held[f"{name}/full"] = numpy_helper.from_array(value, f"{name}/full")
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        for field in ("node", "initializer", "value_info"):
            model.graph.ClearField(field)
        model.graph.node.extend(copies)
        model.graph.initializer.extend(held.values())
        return model

    def overflowing(self, clips: np.ndarray) -> set[str]:
        """Find the nodes that make or read what fp16 does not hold, by running the graph in fp32.

        Args:
            clips: uint8 (N, T, H, W, 3).
        """
        names = [node.output[0] for node in self._half.graph.node if node.name in self.nodes]
        sizes = largest_values(self.keeping(self.nodes), clips, names)
        large = {name for name, size in sizes.items() if not size <= _LARGEST}
        large |= {
            name
            for name, value in self._constants.items()
            if value.size and not np.abs(value).max() <= _LARGEST
        }
        return {
            node.name
            for node in self._half.graph.node
            if node.name in self.nodes and large & {*node.input, *node.output}
        }

    def by_error(self, clips: np.ndarray, without: Collection[str]) -> list[str]:
        """Return the nodes that compute in half precision, the one that adds most error first.

        Args:
            clips: uint8 (N, T, H, W, 3).
            without: Nodes to leave out.
        """

        def round_value(name: str, nodes: list[onnx.NodeProto]) -> str:
            if name.removesuffix("/shadow") not in self._is_half:
                return name
            result = f"{name}/fp16"
            if not any(result in node.output for node in nodes):
                nodes.append(helper.make_node("Cast", [name], [f"{name}/narrow"], to=TensorProto.FLOAT16))
                nodes.append(helper.make_node("Cast", [f"{name}/narrow"], [result], to=TensorProto.FLOAT))
            return result

        def round_constant(name: str) -> np.ndarray | None:
            value = self._constants.get(name.removesuffix("/full"))
            return None if value is None else value.astype(np.float16).astype(np.float32)

        names = [name for name in self.nodes if name not in without]
        errors = layer_errors(
            self.keeping(self.nodes), clips, names, round_value=round_value, round_constant=round_constant
        )
        return sorted(names, key=lambda name: -errors[name])
