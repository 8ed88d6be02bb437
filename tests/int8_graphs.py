"""Small graphs as ``export_onnx`` writes them, and what the forms of 8 bits are made from."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from ivdr_deploy._optional import import_onnxruntime
from ivdr_deploy.artifacts.onnx_metadata import OnnxMetadata
from ivdr_deploy.export.int8.qdq import insert_fp8_pairs, insert_pairs
from ivdr_deploy.export.int8.ranges import choose_ranges, observe
from ivdr_deploy.export.int8.scales import Ranges, quantised_tensors
from ivdr_deploy.export.int8.source import SourceGraph
from ivdr_deploy.export.int8.weights import Weights, channel_parts, round_together
from ivdr_deploy.export.to_onnx import export_onnx
from ivdr_deploy.models.network import VideoModel, build_model
from ivdr_deploy.runtimes.ort_runtime import WRONG_REWRITES
from ivdr_deploy.spec import ClipSpec, ModelSpec, ViewPlan

RNG = np.random.default_rng(0)
CLIP = ClipSpec(num_frames=8, short_side=32, crop_size=32)
OUTPUTS = ("logits", "feature", "inter", "intra")


def run(model: onnx.ModelProto, video: np.ndarray) -> list[np.ndarray]:
    session = import_onnxruntime().InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"], disabled_optimizers=WRONG_REWRITES
    )
    return session.run(None, {"video": video})


def ranges_of(source: SourceGraph, video: np.ndarray, method: str = "min-max"):
    names = sorted(set().union(*quantised_tensors(source)))
    return choose_ranges(observe(source.model, video, names), method)


def paired(source: SourceGraph, ranges: Ranges) -> list[onnx.ModelProto]:
    """The forms of a graph that TensorRT takes."""
    return [write(source, ranges, rounded(source, 8)) for write in (insert_pairs, insert_fp8_pairs)]


def rounded(source: SourceGraph, bits: int) -> dict[str, Weights]:
    """Each weight by itself: what a convolution reads has channels that are not alike."""
    found = {}
    for node in source.nodes:
        if node.op_type == "Conv":
            given = source.constants[node.input[1]]
            moments = [np.eye(given[0, part].size) for part in channel_parts(given)]
            found[node.input[1]] = round_together(given, bits, moments)
    return found


def graph(
    *nodes: onnx.NodeProto, result: str = "y", size: Sequence[int] = (4, 6, 6), **constants: np.ndarray
) -> SourceGraph:
    """A clip, to channels first, through ``nodes``, and averaged."""
    return SourceGraph(graph_model(*nodes, result=result, size=size, **constants))


def graph_model(
    *nodes: onnx.NodeProto, result: str = "y", size: Sequence[int] = (4, 6, 6), **constants: np.ndarray
) -> onnx.ModelProto:
    """The same as it lies in a file."""
    whole = [
        helper.make_node("Cast", ["video"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["cast"], ["x"], perm=[0, 4, 1, 2, 3]),
        *nodes,
        helper.make_node("ReduceMean", [result, "axes"], ["feature"], keepdims=0),
    ]
    constants = {"axes": np.array([2, 3, 4]), **constants}
    return helper.make_model(
        helper.make_graph(
            whole,
            "graph",
            [helper.make_tensor_value_info("video", TensorProto.UINT8, ["batch", *size, 3])],
            [helper.make_tensor_value_info("feature", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


def conv(
    x: str, y: str, *, kernel: Sequence[int], strides=(1, 1, 1), pads=(0,) * 6, dilations=(1, 1, 1)
) -> onnx.NodeProto:
    return helper.make_node(
        "Conv", [x, f"{y}_w", f"{y}_b"], [y], kernel_shape=kernel, strides=strides, pads=pads,
        dilations=dilations, group=1,
    )  # fmt: skip


def weights(
    y: str, kernel: Sequence[int], channels: int = 3, out: int = 5, rng: np.random.Generator = RNG
) -> dict[str, np.ndarray]:
    shape = (out, channels, *kernel)
    return {
        f"{y}_w": rng.normal(size=shape).astype(np.float32),
        f"{y}_b": rng.normal(size=out).astype(np.float32) * 50,
    }


def exported(backbone: str, path: Path) -> tuple[VideoModel, OnnxMetadata]:
    """A network of random weights, written to a file in fp32."""
    spec = ModelSpec(backbone=backbone, num_slots=2, slot_dim=8, clip_dim=8, num_classes=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Batch norm as it begins: fitted to a few clips, a random network is so uneven that each rounding grows.
        model = build_model(spec, CLIP).eval()
    metadata = OnnxMetadata(
        name="model",
        version="1",
        contract_hash=CLIP.contract_hash,
        contract=CLIP,
        view_plan=ViewPlan(),
        labels=("a", "b", "c", "d"),
        outputs=OUTPUTS,
        ivdr_version="1",
    )
    export_onnx(model, path, clip=CLIP, metadata=metadata)
    return model, metadata
