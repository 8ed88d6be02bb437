"""fp32 graph -> int8 graph, channels last throughout.

Activations lie as (N, T, H, W, C), in the order in which a clip comes, so that the graph holds no transpose: a
convolution reads all channels of a pixel at once. Convolutions are ONNX Runtime's
``com.microsoft.QLinearConv(channels_last=1)``, over two axes instead of three (``planes.py``).
Activations are uint8 with one scale per tensor, weights int8 with one scale per output channel. A ReLU needs no
operator: zero is the smallest value that its output can hold. The normalisation of the input and the heads stay fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ivdr_deploy.errors import ExportError
from ivdr_deploy.export.int8.planes import Planes, as_planes
from ivdr_deploy.export.int8.scales import Ranges, Scale, fused_output, tensor_scales
from ivdr_deploy.export.int8.source import SourceGraph, attributes
from ivdr_deploy.export.int8.weights import Weights

_TO_CHANNELS_LAST = (0, 2, 3, 4, 1)
_AXIS = {0: 0, 1: 4, 2: 1, 3: 2, 4: 3}
"""Axis of (N, C, T, H, W) -> axis of (N, T, H, W, C)."""

_DOMAIN = "com.microsoft"


@dataclass(frozen=True, slots=True)
class _Value:
    """What a tensor of the source graph has become."""

    name: str
    channels_last: bool = False
    scale: Scale | None = None
    """Of an 8-bit tensor; None: fp32."""


def lower(
    source: SourceGraph, ranges: Ranges, rounded: Mapping[str, Weights], kept: Collection[str] = ()
) -> onnx.ModelProto:
    """Write the int8 graph.

    Args:
        source: The fp32 graph.
        ranges: For every tensor of ``quantised_tensors``.
        rounded: Weights of every convolution, by the names of their constants.
        kept: Names of convolutions that stay in fp32; their operands are transposed for them.

    Raises:
        ExportError: if the graph holds an operator that has no 8-bit channels-last form.
    """
    return _Lowering(source, ranges, rounded, kept).run()


class _Lowering:
    def __init__(
        self, source: SourceGraph, ranges: Ranges, rounded: Mapping[str, Weights], kept: Collection[str]
    ) -> None:
        self.source, self.rounded, self.kept = source, rounded, kept
        self.scales = tensor_scales(source, ranges)
        (video,) = source.model.graph.input
        self.values = {video.name: _Value(video.name)}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.real: set[str] = set()
        """Names of values that were brought back to fp32."""

    def run(self) -> onnx.ModelProto:
        handlers: dict[str, Callable[[onnx.NodeProto], None]] = {
            "Transpose": self._transpose,
            "Conv": self._conv,
            "Relu": self._relu,
            "MaxPool": self._max_pool,
            "AveragePool": self._average_pool,
            "Concat": self._concat,
            "Add": self._pair,
            "Mul": self._pair,
            "ReduceMean": self._reduce_mean,
        }
        for node in self.source.nodes:
            handlers.get(node.op_type, self._float)(node)
        graph = self.source.model.graph
        model = helper.make_model(
            helper.make_graph(
                self.nodes,
                graph.name,
                graph.input,
                graph.output,
                [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
            ),
            opset_imports=[*self.source.model.opset_import, helper.make_opsetid(_DOMAIN, 1)],
            ir_version=self.source.model.ir_version,
        )
        model.metadata_props.extend(self.source.model.metadata_props)
        return model

    def _transpose(self, node: onnx.NodeProto) -> None:
        """Drop the step from a clip's own order to channels first."""
        value = self._read(node.input[0])
        if (
            tuple(attributes(node)["perm"]) == (0, 4, 1, 2, 3)
            and value.scale is None
            and not value.channels_last
        ):
            self.values[node.output[0]] = _Value(value.name, channels_last=True)
        else:
            self._float(node)

    def _conv(self, node: onnx.NodeProto) -> None:
        given = attributes(node)
        x, pads = self.source.padded(node)
        if node.name in self.kept:
            self._full_conv(node, x, pads)
            return
        source = self._quantised(x)
        if source.scale is None or given["group"] != 1 or node.input[1] not in self.rounded:
            raise self._unknown(node)
        weights = self.rounded[node.input[1]]
        bias = (
            self.source.constants[node.input[2]]
            if len(node.input) > 2
            else np.zeros(len(weights.stored), np.float32)
        )
        weights = weights.beside(bias, source.scale.scale)
        name = fused_output(self.source, node)
        frames_out, rows_out, columns_out = self.source.shapes[node.output[0]][1:]
        planes = as_planes(
            weights.stored,
            self.source.shapes[x],
            frames_out,
            strides=given["strides"],
            dilations=given["dilations"],
            pads=pads,
        )
        zero = self._scale_inputs(source.scale, name, "x")[1]
        nodes, constants = planes.read(source.name, zero=zero, name=name)
        self.nodes += nodes
        self.constants |= constants
        self._emit_conv(name, nodes[-1].output[0], source.scale, planes, weights.scale, bias)
        clip = [-1, frames_out, rows_out, columns_out, len(weights.stored)]
        self._emit("Reshape", [f"{name}/planes", self._constant(f"{name}/clip", np.array(clip))], name)

    def _emit_conv(
        self,
        name: str,
        images: str,
        scale: Scale,
        planes: Planes,
        weight_scale: np.ndarray,
        bias: np.ndarray,
    ) -> None:
        product = weight_scale.astype(np.float64) * float(scale.scale)
        stored_bias = np.round(bias / product).astype(np.int32)
        inputs = [
            images,
            *self._scale_inputs(scale, name, "x"),
            self._constant(f"{name}/weight", planes.weights),
            self._constant(f"{name}/weight_scale", weight_scale),
            self._constant(f"{name}/weight_zero", np.zeros(len(weight_scale), np.int8)),
            *self._scale_inputs(self.scales[name], name, "y"),
            self._constant(f"{name}/bias", stored_bias),
        ]
        convolution = helper.make_node(
            "QLinearConv",
            inputs,
            [f"{name}/planes"],
            domain=_DOMAIN,
            channels_last=1,
            kernel_shape=planes.weights.shape[2:],
            strides=planes.strides,
            dilations=planes.dilations,
            pads=planes.pads,
        )
        self.nodes.append(convolution)

    def _full_conv(self, node: onnx.NodeProto, x: str, pads: list[int]) -> None:
        """Keep a convolution in fp32, and the ReLU after it."""
        weights = [self._constant(part, self.source.constants[part]) for part in node.input[1:]]
        kept = helper.make_node("Conv", [x, *weights], node.output, name=node.name)
        kept.attribute.extend(entry for entry in node.attribute if entry.name != "pads")
        kept.attribute.append(helper.make_attribute("pads", pads))
        name = fused_output(self.source, node)
        self._channels_first(kept, name, "Relu" if name != node.output[0] else "Identity")

    def _average_pool(self, node: onnx.NodeProto) -> None:
        value = self._read(node.input[0])
        if value.channels_last:
            self._channels_first(node, node.output[0], "Identity")
        else:
            self._float(node)

    def _channels_first(self, node: onnx.NodeProto, name: str, then: str) -> None:
        """Keep an operator that takes no channels last in fp32, between two transposes."""
        own = node.output[0]
        kept = onnx.NodeProto()
        kept.CopyFrom(node)
        kept.input[0], kept.output[0] = f"{own}/first", f"{own}/full"
        real = self._real(self._read(node.input[0]))
        self.nodes += [
            helper.make_node("Transpose", [real], [kept.input[0]], perm=[0, 4, 1, 2, 3]),
            kept,
            helper.make_node("Transpose", [kept.output[0]], [f"{own}/last"], perm=list(_TO_CHANNELS_LAST)),
            helper.make_node(then, [f"{own}/last"], [name]),
        ]
        self.values[name] = _Value(name, channels_last=True)

    def _relu(self, node: onnx.NodeProto) -> None:
        if node.output[0] not in self.values:  # not done by the operator before it
            self._float(node)

    def _max_pool(self, node: onnx.NodeProto) -> None:
        given = attributes(node)
        x, pads = self.source.padded(node)
        source = self._quantised(x)
        self._emit(
            "NhwcMaxPool",
            [source.name],
            node.output[0],
            domain=_DOMAIN,
            kernel_shape=given["kernel_shape"],
            strides=given["strides"],
            dilations=given["dilations"],
            ceil_mode=given.get("ceil_mode", 0),
            pads=pads,
        )

    def _concat(self, node: onnx.NodeProto) -> None:
        if node.output[0] not in self.scales:
            self._float(node)
            return
        self._emit("Concat", [self._quantised(name).name for name in node.input], node.output[0], axis=4)

    def _pair(self, node: onnx.NodeProto) -> None:
        name = fused_output(self.source, node) if node.op_type == "Add" else node.output[0]
        if not {*node.input, name} <= self.scales.keys():
            self._float(node)
            return
        parts = []
        for index, operand in enumerate(node.input):
            value = self._quantised(operand)
            assert value.scale is not None
            parts += [value.name, *self._scale_inputs(value.scale, name, "ab"[index])]
        ends = self._scale_inputs(self.scales[name], name, "y")
        self._emit(f"QLinear{node.op_type}", [*parts, *ends], name, domain=_DOMAIN)

    def _reduce_mean(self, node: onnx.NodeProto) -> None:
        value = self._read(node.input[0])
        if not value.channels_last:
            self._float(node)
            return
        axes = sorted(_AXIS[int(axis) % 5] for axis in self.source.constants[node.input[1]])
        keep = attributes(node)["keepdims"]
        if not keep and axes != [1, 2, 3]:
            raise self._unknown(node)
        inputs = [self._real(value), self._constant(f"{node.output[0]}/axes", np.array(axes, np.int64))]
        self.nodes.append(helper.make_node("ReduceMean", inputs, node.output, keepdims=keep))
        self.values[node.output[0]] = _Value(node.output[0], channels_last=bool(keep))

    def _float(self, node: onnx.NodeProto) -> None:
        """Keep an operator in fp32; one that works on each value by itself does so in any order of the axes."""
        values = [self._read(name) for name in node.input if name and name not in self.source.constants]
        last = any(value.channels_last for value in values)
        if last and (
            node.op_type not in ("Add", "Sub", "Mul", "Div", "Relu")
            or not all(v.channels_last for v in values)
        ):
            raise self._unknown(node)
        names = []
        for name in node.input:
            if name in self.source.constants:
                constant = self.source.constants[name]
                if last and constant.ndim == 5:
                    names.append(
                        self._constant(f"{name}/channels_last", constant.transpose(_TO_CHANNELS_LAST))
                    )
                elif last and constant.ndim:
                    raise self._unknown(node)
                else:
                    names.append(self._constant(name, constant))
            else:
                names.append(self._real(self._read(name)) if name else "")
        kept = helper.make_node(node.op_type, names, node.output, domain=node.domain)
        kept.attribute.extend(node.attribute)
        self.nodes.append(kept)
        for name in node.output:
            self.values[name] = _Value(name, channels_last=last)

    def _read(self, name: str) -> _Value:
        if name in self.source.padding:
            raise ExportError(
                f"the padded value {name} is read by something that is neither convolution nor pooling"
            )
        return self.values[name]

    def _quantised(self, name: str) -> _Value:
        """Return the 8-bit form of a value, made from its fp32 form where it has no other."""
        value = self._read(name)
        if value.scale is None:
            scale = self.scales[name]
            stored, real = f"{name}/uint8", value.name
            if not value.channels_last:
                real = f"{name}/last"
                order = helper.make_node("Transpose", [value.name], [real], perm=list(_TO_CHANNELS_LAST))
                self.nodes.append(order)
            ends = self._scale_inputs(scale, name, "q")
            self.nodes.append(helper.make_node("QuantizeLinear", [real, *ends], [stored]))
            value = self.values[name] = _Value(stored, channels_last=True, scale=scale)
        return value

    def _real(self, value: _Value) -> str:
        """Return the fp32 form of a value."""
        if value.scale is None:
            return value.name
        name = f"{value.name}/float"
        if name in self.real:
            return name
        self.real.add(name)
        inputs = [value.name, *self._scale_inputs(value.scale, value.name, "d")]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [name]))
        return name

    def _emit(self, op_type: str, inputs: list[str], output: str, **given: Any) -> None:
        self.nodes.append(helper.make_node(op_type, inputs, [output], **given))
        self.values[output] = _Value(output, channels_last=True, scale=self.scales[output])

    def _scale_inputs(self, scale: Scale, name: str, role: str) -> list[str]:
        return [
            self._constant(f"{name}/{role}_scale", np.asarray(scale.scale)),
            self._constant(f"{name}/{role}_zero", np.asarray(scale.zero_point)),
        ]

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = np.ascontiguousarray(value).reshape(value.shape)
        return name

    def _unknown(self, node: onnx.NodeProto) -> ExportError:
        return ExportError(
            f"the int8 engine has no form for the operator {node.op_type} that makes {node.output[0]}",
            hint="export this network in another precision",
        )
