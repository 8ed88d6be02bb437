import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from bundles import TINY_CLIP

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.artifacts.onnx_metadata import OnnxMetadata
from ivdr_deploy.errors import ExportError
from ivdr_deploy.export import to_onnx
from ivdr_deploy.export.to_onnx import OPSET, export_onnx
from ivdr_deploy.models.backbones import BACKBONES
from ivdr_deploy.models.network import VideoModel, build_model
from ivdr_deploy.runtimes.compare import compare_outputs
from ivdr_deploy.runtimes.ort_runtime import OrtRuntime
from ivdr_deploy.runtimes.torch_runtime import TorchRuntime
from ivdr_deploy.spec import OUTPUT_NAMES, ClipSpec, ModelSpec, ViewPlan


def clips(number: int, clip: ClipSpec) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (number, *clip.clip_shape), dtype=np.uint8)


@pytest.mark.parametrize("number", [1, 2, 7, 64])
def test_onnx_gives_what_torch_gives_at_every_batch(bundle: Path, checkpoint: Path, number: int) -> None:
    names = ("logits", "feature")
    video = clips(number, TINY_CLIP)
    torch_runtime = TorchRuntime(load_checkpoint(checkpoint).model, clip=TINY_CLIP, output_names=names)
    expected = torch_runtime.infer(video)
    found = OrtRuntime(bundle / "model.onnx", clip=TINY_CLIP).infer(video)
    assert (
        max(np.abs(value).max() for value in expected.values()) > 1
    )  # the comparison below has something to find
    for entry in compare_outputs(expected, found, precision="fp32"):
        assert entry.max_abs_diff <= 1e-4, entry


def test_the_graph_has_the_promised_interface(bundle: Path) -> None:
    proto = onnx.load(bundle / "model.onnx")
    onnx.checker.check_model(proto)
    (video,) = proto.graph.input
    shape = [axis.dim_param or axis.dim_value for axis in video.type.tensor_type.shape.dim]
    assert (video.name, shape) == ("video", ["batch", *TINY_CLIP.clip_shape])
    assert video.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [output.name for output in proto.graph.output] == ["logits", "feature"]
    assert [entry.version for entry in proto.opset_import if entry.domain == ""] == [OPSET]
    # TensorRT refuses to transpose uint8, so the first thing done to the input is the cast.
    assert [node.op_type for node in proto.graph.node if "video" in node.input] == ["Cast"]


@pytest.mark.parametrize("part", ["num_classes", "slot_dim", "clip_dim"])
def test_a_network_too_large_for_a_file_is_refused_before_it_is_exported(part: str, tmp_path: Path) -> None:
    """protobuf holds 2 GiB, and would say so in its own words after minutes."""

    def sized(count: int) -> VideoModel:
        sizes = {"num_classes": 1, "num_slots": 1, "slot_dim": 1, "clip_dim": 1, part: count}
        with torch.device("meta"):  # takes no memory
            return build_model(ModelSpec(backbone="tiny", **sizes), TINY_CLIP).eval()

    def held(count: int) -> int:
        return sum(value.numel() * value.element_size() for value in sized(count).state_dict().values())

    step = held(2) - held(1)  # bytes for one more
    metadata = OnnxMetadata(
        name="m",
        version="1",
        contract_hash=TINY_CLIP.contract_hash,
        contract=TINY_CLIP,
        view_plan=ViewPlan(),
        labels=(),
        outputs=("feature",),
        ivdr_version="1",
    )
    started = time.monotonic()
    with pytest.raises(
        ExportError, match=r"'tiny' has 2\.0 GiB of numbers, and an ONNX file holds less than 2 GiB"
    ) as caught:
        export_onnx(sized((2 << 30) // step + 1), tmp_path / "m.onnx", clip=TINY_CLIP, metadata=metadata)
    assert "runs as it is, with torch" in caught.value.hint
    assert time.monotonic() - started < 5
    assert not any(tmp_path.iterdir())
    to_onnx._require_room(sized((1 << 30) // step))


def test_the_file_says_what_it_is(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    metadata = OrtRuntime(bundle / "model.onnx").metadata
    assert metadata.contract == manifest.clip
    assert metadata.contract_hash == manifest.contract_hash
    assert metadata.view_plan == manifest.view_plan
    assert (metadata.name, metadata.version, metadata.labels) == ("lively", "1.0", manifest.labels)
    assert metadata.outputs == manifest.output_names


def test_the_file_does_not_say_where_it_was_made(bundle: Path) -> None:
    """The exporter notes a stack trace for every node, with the paths of the machine."""
    data = (bundle / "model.onnx").read_bytes()
    for trace in (b"stack_trace", b"/ivdr_deploy/", b".py"):
        assert trace not in data


def test_another_contract_gives_another_graph(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The normalisation inside the graph is the contract's."""
    loaded = load_checkpoint(checkpoint)
    video = clips(2, TINY_CLIP)
    plain = replace(TINY_CLIP, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    model = build_model(loaded.info.model, plain)
    model.load_state_dict(loaded.model.state_dict())
    found = TorchRuntime(model, clip=plain, output_names=("logits",)).infer(video)["logits"]
    normal = OrtRuntime(bundle / "model.onnx").infer(video)["logits"]
    assert np.abs(found - normal).max() > 1e-2


QUICK = ("r2plus1d_10",)
EXPORT_SECONDS = 60.0
"""Of processor time, which other work on the machine does not stretch."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.exhaustive) for name in BACKBONES],
)
def test_every_backbone_exports(backbone: str, tmp_path: Path) -> None:
    """With random weights: ``inter`` and ``intra``, being of unit length, show a wrong graph at any scale."""
    fixed = BACKBONES[backbone].fixed_size
    size = BACKBONES[backbone].min_size if fixed else 64
    clip = ClipSpec(num_frames=16, short_side=size, crop_size=size)
    video = clips(7, clip)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(ModelSpec(backbone=backbone, num_classes=5), clip).eval()
    metadata = OnnxMetadata(
        name=backbone,
        version="1",
        contract_hash=clip.contract_hash,
        contract=clip,
        view_plan=ViewPlan(),
        labels=tuple("abcde"),
        outputs=OUTPUT_NAMES,
        ivdr_version="0",
    )
    started = time.process_time()
    export_onnx(model, tmp_path / "model.onnx", clip=clip, metadata=metadata)
    if not fixed:  # a transformer
        assert time.process_time() - started < EXPORT_SECONDS
        # ONNX Runtime would put arithmetic on shapes on the CPU, where a GPU was asked for.
        kinds = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
        assert not kinds & {"Shape", "Size", "Range", "ConstantOfShape"}
    torch_runtime = TorchRuntime(model, clip=clip, output_names=OUTPUT_NAMES)
    ort_runtime = OrtRuntime(tmp_path / "model.onnx", clip=clip)
    for number in (1, 2, 7):
        expected, found = torch_runtime.infer(video[:number]), ort_runtime.infer(video[:number])
        for entry in compare_outputs(expected, found, precision="fp32"):
            assert entry.passed, entry
            assert entry.max_abs_diff <= 1e-4, entry
