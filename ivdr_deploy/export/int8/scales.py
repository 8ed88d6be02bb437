"""Which tensors of the fp32 graph become 8-bit, and what their stored values mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ivdr_deploy.export.int8.source import SourceGraph, attributes

Ranges = Mapping[str, tuple[float, float]]
"""Smallest and largest value to be told apart, per tensor of the source graph."""


@dataclass(frozen=True, slots=True)
class Scale:
    """``real = (stored - zero_point) * scale``, with stored in 0..255."""

    scale: np.float32
    zero_point: np.uint8

    @classmethod
    def of(cls, low: float, high: float) -> Scale:
        """Return the scale that tells 256 values from ``low`` to ``high`` apart, zero among them."""
        low, high = min(low, 0.0), max(high, 0.0)  # zero must be exact: it is what pads a convolution
        scale = np.float32(max(high - low, 1e-8) / 255)
        return cls(scale, np.uint8(np.clip(round(-low / float(scale)), 0, 255)))


def quantised_tensors(source: SourceGraph) -> list[set[str]]:
    """Find the tensors of the source graph that become 8-bit, in groups that share one scale.

    A pooling and a concatenation move values without computing, so what goes in and what comes out share a scale.
    """
    groups: dict[str, set[str]] = {}

    def join(names: Sequence[str]) -> None:
        merged = set(names).union(*(groups.get(name, set()) for name in names))
        for name in merged:
            groups[name] = merged

    for node in source.nodes:
        inputs = [source.padding.get(name, (name,))[0] for name in node.input]
        if node.op_type == "Conv":
            join(inputs[:1])
            join([fused_output(source, node)])
        elif node.op_type == "MaxPool":
            join([inputs[0], node.output[0]])
        elif node.op_type == "Concat" and attributes(node)["axis"] == 1 and set(inputs) <= set(groups):
            join([*inputs, node.output[0]])
        elif node.op_type == "Add" and set(inputs) <= set(groups):
            join([fused_output(source, node)])
        elif node.op_type == "Mul" and (gate := _gate(source, {*inputs}, {*groups})):
            join([gate])
            join([node.output[0]])
    return list({id(group): group for group in groups.values()}.values())


def tensor_scales(source: SourceGraph, ranges: Ranges) -> dict[str, Scale]:
    """Return the scale of every tensor of ``quantised_tensors``."""
    scales: dict[str, Scale] = {}
    for group in quantised_tensors(source):
        low, high = min(ranges[name][0] for name in group), max(ranges[name][1] for name in group)
        scales |= dict.fromkeys(group, Scale.of(low, high))
    return scales


def _gate(source: SourceGraph, names: set[str], known: set[str]) -> str | None:
    """Return the operand of a product with an 8-bit tensor that holds one number for each channel, if there is one."""
    others = names - known
    gates = [name for name in others if source.shapes.get(name, [])[1:] == [1, 1, 1]]
    return gates[0] if len(others) == len(gates) == 1 < len(names) else None


def round_trip(name: str, result: str, low: float, high: float) -> list[onnx.NodeProto]:
    """Return the nodes that round a value of an fp32 graph to 8 bits and back."""
    scale = Scale.of(low, high)
    ends: dict[str, np.ndarray] = {
        f"{result}/scale": np.asarray(scale.scale),
        f"{result}/zero": np.asarray(scale.zero_point),
    }
    return [
        *(
            helper.make_node("Constant", [], [end], value=numpy_helper.from_array(value))
            for end, value in ends.items()
        ),
        helper.make_node("QuantizeLinear", [name, *ends], [f"{result}/uint8"]),
        helper.make_node("DequantizeLinear", [f"{result}/uint8", *ends], [result]),
    ]


def fused_output(source: SourceGraph, node: onnx.NodeProto) -> str:
    """Return the output of a node, or of the ReLU that alone reads it."""
    relu = source.sole_reader(node.output[0], "Relu")
    return str(node.output[0] if relu is None else relu.output[0])
