"""Which layers a coarse precision cannot hold: by what the nodes of an exported graph compute on golden clips.

A node goes by its name in the graph. ``export_onnx`` notes on each which module it belongs to, and the line that calls
it, so that people can be told.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from ivdr_deploy._optional import import_onnxruntime
from ivdr_deploy.spec import INPUT_NAME

LAYER_KEY = "ivdr.layer"
"""Entry of a node's ``metadata_props``: its module, and the line that calls it, e.g.
``backbone.1.0.conv1.0 (torchvision.models.video.resnet:104)``."""

_FLOAT = onnx.TensorProto.FLOAT

Round = Callable[[str, list[onnx.NodeProto]], str]
"""Appends nodes that round a value as the coarse precision does; returns the name of the rounded value, in fp32."""


def open_probe(
    model: onnx.ModelProto,
    outputs: Sequence[str],
    nodes: Iterable[onnx.NodeProto] = (),
    constants: Mapping[str, np.ndarray] | None = None,
    *,
    as_written: bool = False,
) -> Any:
    """Open a graph with other outputs; what they do not need is not computed.

    Args:
        model: The graph. It is not changed.
        outputs: Names of fp32 values, of the graph or of ``nodes``.
        nodes: More nodes, behind its own.
        constants: More constants.
        as_written: Without any optimisation.

    Returns:
        An ``onnxruntime.InferenceSession`` for the CPU.
    """
    ort: Any = import_onnxruntime()
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.node.extend(nodes)
    probe.graph.initializer.extend(
        onnx.numpy_helper.from_array(value, name) for name, value in (constants or {}).items()
    )
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_tensor_value_info(name, _FLOAT, None) for name in outputs)
    options = ort.SessionOptions()
    if as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])


def layer_name(node: onnx.NodeProto) -> str:
    """Return how a node is called for people: module and source line, else its name in the graph."""
    return next((entry.value for entry in node.metadata_props if entry.key == LAYER_KEY), node.name)


def module_of(node: onnx.NodeProto) -> str:
    """Return the path of the module that a node came from; empty where its file does not say."""
    return next((entry.value.split(" ")[0] for entry in node.metadata_props if entry.key == LAYER_KEY), "")


def describe_layers(model: onnx.ModelProto, names: Collection[str]) -> str:
    """Return the layers of some nodes, each once, in the order of the graph."""
    return "; ".join(dict.fromkeys(layer_name(node) for node in model.graph.node if node.name in names))


def largest_values(model: onnx.ModelProto, clips: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Return the largest size that each fp32 value of a graph has; NaN where it holds one.

    Args:
        model: The graph.
        clips: uint8 (N, T, H, W, 3).
        names: Values to look at.
    """
    nodes = []
    for name in names:
        nodes.append(helper.make_node("Abs", [name], [f"{name}/abs"]))
        nodes.append(helper.make_node("ReduceMax", [f"{name}/abs"], [f"{name}/largest"], keepdims=0))
    found = _probe(model, clips, nodes, {name: f"{name}/largest" for name in names})
    return {name: float(values.max()) for name, values in found.items()}


def layer_errors(
    model: onnx.ModelProto,
    clips: np.ndarray,
    names: Collection[str],
    *,
    round_value: Round,
    round_constant: Callable[[str], np.ndarray | None],
) -> dict[str, float]:
    """Return the error that each node adds: its inputs and its output are rounded, and nothing else.

    Args:
        model: The fp32 graph.
        clips: uint8 (N, T, H, W, 3).
        names: Nodes to look at, each of one output.
        round_value: What the coarse precision does to a value.
        round_constant: The same for a constant, by name; None where the name is no constant of the graph.

    Returns:
        By name of the node the root of the mean square error over that of the values, at most over the clips.
    """
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray] = {}
    probes: dict[str, str] = {}
    for node in model.graph.node:
        if node.name not in names:
            continue
        shadow = onnx.NodeProto()
        shadow.CopyFrom(node)
        result = node.output[0]
        for index, name in enumerate(node.input):
            if not name:
                continue
            rounded = round_constant(name)
            if rounded is None:
                shadow.input[index] = round_value(name, nodes)
            else:
                shadow.input[index] = f"{name}/rounded"
                constants[f"{name}/rounded"] = rounded
        shadow.name, shadow.output[0] = f"{node.name}/shadow", f"{result}/shadow"
        nodes.append(shadow)
        found = round_value(f"{result}/shadow", nodes)
        nodes.append(helper.make_node("Sub", [found, result], [f"{result}/difference"]))
        for part, value in (("off", f"{result}/difference"), ("size", result)):
            nodes.append(helper.make_node("ReduceL2", [value], [f"{result}/{part}"], keepdims=0))
        nodes.append(helper.make_node("Div", [f"{result}/off", f"{result}/size"], [f"{result}/error"]))
        probes[node.name] = f"{result}/error"
    found_errors = _probe(model, clips, nodes, probes, constants)
    return {
        name: float(np.nan_to_num(values, nan=np.inf).max()) if values.size else 0.0
        for name, values in found_errors.items()
    }


def fewest(order: Sequence[str], passes: Callable[[Collection[str]], bool]) -> list[str] | None:
    """Find how many of the first nodes must be kept in fp32 so that the network passes.

    Args:
        order: Nodes, the one that adds most error first.
        passes: Whether it passes with these in fp32.

    Returns:
        Them; None where it fails even with all.
    """
    failed, count = 0, 1
    while not passes(order[:count]):
        if count >= len(order):
            return None
        failed, count = count, min(2 * count, len(order))
    while count - failed > 1:
        middle = (failed + count) // 2
        if passes(order[:middle]):
            count = middle
        else:
            failed = middle
    return list(order[:count])


def _probe(
    model: onnx.ModelProto,
    clips: np.ndarray,
    nodes: Iterable[onnx.NodeProto],
    outputs: Mapping[str, str],
    constants: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Run a graph with more nodes, clip by clip; returns for each key the values of its output."""
    # Else a rounding to half precision and back, which is the point here, may be taken out as useless.
    session = open_probe(model, list(outputs.values()), nodes, constants, as_written=True)
    runs = [session.run(list(outputs.values()), {INPUT_NAME: clip[None]}) for clip in clips]
    return {key: np.stack(values) for key, values in zip(outputs, zip(*runs, strict=True), strict=True)}
