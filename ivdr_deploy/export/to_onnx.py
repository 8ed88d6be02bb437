"""Network -> ONNX: uint8 clips in, normalisation inside, named outputs, dynamic batch, contract attached."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch

from ivdr_deploy._text import quoted, reason_of
from ivdr_deploy.artifacts.onnx_metadata import OnnxMetadata
from ivdr_deploy.errors import ExportError
from ivdr_deploy.export.layers import LAYER_KEY
from ivdr_deploy.models.network import ExportNetwork, VideoModel
from ivdr_deploy.spec import INPUT_NAME, MAX_BATCH, ClipSpec

OPSET = 20

_MOST_BYTES = (2 << 30) - (64 << 20)
"""Of a network's numbers: protobuf holds 2 GiB, and the graph needs room too. ONNX allows a second file for numbers,
but what runs a variant opens one file."""


def export_onnx(model: VideoModel, path: Path, *, clip: ClipSpec, metadata: OnnxMetadata) -> None:
    """Write ``model`` as one ONNX file.

    Args:
        model: In eval mode, on the CPU.
        path: File to write.
        clip: The contract; gives the shape of the input ``video``, uint8 (batch, T, H, W, 3) with 1 to 64
            clips.
        metadata: What the file says about itself; ``metadata.outputs`` names the outputs, in order.

    Raises:
        ExportError: if the network is too large or cannot be exported, or the metadata does not survive.
    """
    _require_room(model)
    network = ExportNetwork(model, metadata.outputs).eval()
    # Two clips: with one, the exporter may take the batch axis for a constant.
    example = torch.zeros((2, *clip.clip_shape), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    try:
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: batch},),
            input_names=[INPUT_NAME],
            output_names=list(metadata.outputs),
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(
            f"the network {quoted(model.spec.backbone)} cannot be exported to ONNX ({reason_of(error)})"
        ) from error
    if program is None:
        raise ExportError("torch.onnx.export returned no program")
    proto = program.model_proto
    _forget_origin(proto.graph)
    # Last, because every tool that rewrites a graph may drop these; export_bundle reads them back through
    # ONNX Runtime.
    onnx.helper.set_model_props(proto, metadata.to_props())
    _check_interface(proto, clip, metadata.outputs)
    onnx.save_model(proto, path)


def _require_room(model: VideoModel) -> None:
    """Refuse a network that no ONNX file can hold, before the minutes of work after which protobuf would."""
    size = sum(value.numel() * value.element_size() for value in (*model.parameters(), *model.buffers()))
    if size > _MOST_BYTES:
        raise ExportError(
            f"the network {quoted(model.spec.backbone)} has {size / 2**30:.1f} GiB of numbers, and an ONNX file holds "
            "less than 2 GiB",
            hint="take a smaller network; a checkpoint of this one runs as it is, with torch",
        )


def _layer_of(node: onnx.NodeProto) -> str:
    """Return which module a node came from, and the line that calls it, without the paths of this machine."""
    notes = {entry.key: entry.value for entry in node.metadata_props}
    weights = [name.rsplit(".", 1)[0] for name in node.input if name.endswith(".weight")]
    try:
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
    except (ValueError, SyntaxError):
        scopes = []
    module = (weights or scopes[-2:-1] or [""])[0].removeprefix("model.")
    lines = re.findall(r'File "([^"]+)\.py", line (\d+)', notes.get("pkg.torch.onnx.stack_trace", ""))
    places = []
    for path, line in lines:
        parts = Path(path).parts
        roots = [at for at, part in enumerate(parts) if part in ("site-packages", "ivdr_deploy")]
        if roots:
            dotted = ".".join(parts[roots[-1] :]).removeprefix("site-packages.")
            if not dotted.startswith("torch."):
                places.append(f"{dotted}:{line}")
    return f"{module} ({places[-1]})" if module and places else module


def _forget_origin(graph: onnx.GraphProto) -> None:
    """Drop what the exporter notes about its work: stack traces, with the paths of this machine in them.

    What stays is the layer of each node; see ``layers.LAYER_KEY``.
    """
    layers = [_layer_of(node) for node in graph.node]
    graph.ClearField("metadata_props")
    for parts in (graph.node, graph.value_info, graph.input, graph.output, graph.initializer):
        for part in parts:
            part.ClearField("metadata_props")
            part.ClearField("doc_string")
    for node, layer in zip(graph.node, layers, strict=True):
        if layer:
            node.metadata_props.add(key=LAYER_KEY, value=layer)


def _check_interface(proto: onnx.ModelProto, clip: ClipSpec, outputs: Sequence[str]) -> None:
    """Make sure that the file has the interface it promises, and names its batch axis."""
    (video,) = proto.graph.input
    axes = [axis.dim_param or axis.dim_value for axis in video.type.tensor_type.shape.dim]
    found = (
        video.name,
        video.type.tensor_type.elem_type,
        axes,
        [output.name for output in proto.graph.output],
    )
    expected = (INPUT_NAME, onnx.TensorProto.UINT8, ["batch", *clip.clip_shape], list(outputs))
    if found != expected:
        raise ExportError(f"the exported graph has the interface {found}, expected {expected}")
