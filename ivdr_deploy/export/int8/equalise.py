"""The same fp32 network with channels of more equal size, so that the 256 levels of a tensor serve them all.

A channel may be made smaller where it is computed and its weights larger where it is read, by one factor: a
convolution, a ReLU, a pooling and a sum pass it on. Nothing of it is left in the 8-bit graph (after Nagel et al.,
"Data-Free Quantization Through Weight Equalization and Bias Correction", 2019).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ivdr_deploy.export.int8.scales import fused_output
from ivdr_deploy.export.int8.source import SourceGraph, attributes
from ivdr_deploy.export.layers import open_probe
from ivdr_deploy.spec import INPUT_NAME

_SMALLEST = 1e-3
"""Of a channel's largest value over that of its tensor: one that hardly ever speaks is not blown up without end."""


class _Channels:
    """Those that a convolution makes, with all values that must have the same factors."""

    def __init__(self, count: int) -> None:
        self.fixed = False
        """Somebody reads them who cannot undo a factor."""

        self.peaks = np.zeros(count, np.float32)

    @property
    def factors(self) -> np.ndarray:
        """How many times too large each channel is; (channels,)."""
        largest = self.peaks.max()
        if self.fixed or largest <= 0:
            return np.ones_like(self.peaks)
        factors: np.ndarray = np.sqrt(np.maximum(self.peaks / largest, _SMALLEST))
        return factors


def equalised(model: onnx.ModelProto, clips: np.ndarray) -> onnx.ModelProto:
    """Return an fp32 graph that computes the same, with channels closer to each other in size.

    The factor of a channel is the root of its share in the tensor's largest value: half way to channels that are all
    equally large, at which point any clip that exceeds what was seen would be cut.

    Args:
        model: The fp32 graph. It is not changed.
        clips: uint8 (N, T, H, W, 3), from real videos.
    """
    source = SourceGraph(model)
    held = _channels(source)
    _note_peaks(source, held, clips)
    changed: dict[str, np.ndarray] = {}
    for node in source.nodes:
        if node.op_type != "Conv" or node.output[0] not in held:
            continue
        weights = source.constants[node.input[1]]
        read = held.get(source.padded(node)[0])
        (made,) = held[node.output[0]]
        if read is not None:
            weights = weights * np.concatenate([part.factors for part in read]).reshape(1, -1, 1, 1, 1)
        changed[node.input[1]] = weights / made.factors.reshape(-1, 1, 1, 1, 1)
        if len(node.input) > 2:
            changed[node.input[2]] = source.constants[node.input[2]] / made.factors
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for tensor in result.graph.initializer:
        if tensor.name in changed:
            tensor.CopyFrom(numpy_helper.from_array(changed[tensor.name].astype(np.float32), tensor.name))
    return result


def _channels(source: SourceGraph) -> dict[str, list[_Channels]]:
    """Return the channels that each value holds, for those values that can have factors."""
    held: dict[str, list[_Channels]] = {}
    for node in source.nodes:
        inputs = [source.padding.get(name, (name,))[0] for name in node.input]
        parts = [held[name] for name in inputs if name in held]
        known = len(parts) == len(inputs)
        if node.op_type == "Conv" and _is_own(source, node):
            held[node.output[0]] = [_Channels(len(source.constants[node.input[1]]))]
        elif node.op_type in ("Relu", "MaxPool"):
            if parts:
                (held[node.output[0]],) = parts
        elif node.op_type == "Concat" and attributes(node)["axis"] == 1 and known:
            held[node.output[0]] = [channels for part in parts for channels in part]
        elif node.op_type == "Add" and known and _sizes(parts[0]) == _sizes(parts[1]):
            for one, other in zip(*parts, strict=True):
                _merge(held, one, other)
            held[node.output[0]] = held[inputs[0]]
        else:
            _fix(parts)
    _fix([held[output.name] for output in source.model.graph.output if output.name in held])
    return held


def _is_own(source: SourceGraph, node: onnx.NodeProto) -> bool:
    """Say whether a convolution has weights that nobody else reads, each input channel apart from the others."""
    return attributes(node)["group"] == 1 and all(
        name in source.constants and len(source.readers[name]) == 1 for name in node.input[1:]
    )


def _sizes(parts: Sequence[_Channels]) -> list[int]:
    return [len(part.peaks) for part in parts]


def _merge(held: dict[str, list[_Channels]], one: _Channels, other: _Channels) -> None:
    """Give two sets of channels the same factors."""
    one.fixed |= other.fixed
    for parts in held.values():
        parts[:] = [one if part is other else part for part in parts]


def _fix(values: Sequence[Sequence[_Channels]]) -> None:
    for parts in values:
        for part in parts:
            part.fixed = True


def _note_peaks(source: SourceGraph, held: dict[str, list[_Channels]], clips: np.ndarray) -> None:
    """Run clips through the graph, and note the largest size of each channel."""
    made = {
        fused_output(source, node): held[node.output[0]]
        for node in source.nodes
        if node.op_type in ("Conv", "Add") and node.output[0] in held
    }
    nodes = [helper.make_node("Constant", [], ["peaks/axes"], value_ints=[0, 2, 3, 4])]
    for name in made:
        nodes.append(helper.make_node("Abs", [name], [f"{name}/abs"]))
        nodes.append(
            helper.make_node("ReduceMax", [f"{name}/abs", "peaks/axes"], [f"{name}/peaks"], keepdims=0)
        )
    outputs = [f"{name}/peaks" for name in made]
    session = open_probe(source.model, outputs, nodes)
    for clip in clips:
        for parts, peaks in zip(made.values(), session.run(outputs, {INPUT_NAME: clip[None]}), strict=True):
            start = 0
            for part in parts:
                end = start + len(part.peaks)
                np.maximum(part.peaks, peaks[start:end], out=part.peaks)
                start = end
