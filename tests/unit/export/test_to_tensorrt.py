import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from requirements import missing
from videos import numbered_video

from ivdr_deploy._files import sha256_file
from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.checkpoint import save_checkpoint
from ivdr_deploy.artifacts.manifest import labels_sha256
from ivdr_deploy.artifacts.onnx_metadata import OnnxMetadata
from ivdr_deploy.artifacts.sidecar import BatchProfile, EngineInfo, read_sidecar
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.errors import ConfigError, ExportError, MissingDependencyError
from ivdr_deploy.export.bundle_export import add_variants, export_bundle
from ivdr_deploy.export.calibration import Calibration
from ivdr_deploy.export.steps import StepOptions, requests
from ivdr_deploy.export.to_tensorrt import (
    DEFAULT_COMPUTE_CAPABILITIES,
    build_engine,
    choose_provider,
    choose_targets,
)
from ivdr_deploy.models.network import build_model
from ivdr_deploy.runtimes.ort_runtime import OrtRuntime
from ivdr_deploy.spec import CheckpointInfo, ClipSpec, ModelSpec, TrainingState, ViewPlan
from ivdr_deploy.video.reader import VideoLimits

needs_rtx = pytest.mark.usefixtures("tensorrt_rtx")


@pytest.fixture
def tensorrt_rtx() -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        missing("trt", "tensorrt_rtx is not installed")


@pytest.fixture
def metadata(bundle: Path) -> OnnxMetadata:
    return OrtRuntime(bundle / "model.onnx").metadata


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with the plain install: importing either package fails."""
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.trt
def test_a_plan_is_built_with_a_sidecar_that_says_what_it_belongs_to(
    bundle: Path, metadata: OnnxMetadata, tmp_path: Path
) -> None:
    engine = tmp_path / "model.fp32.engine"
    info = build_engine(bundle / "model.onnx", engine, metadata=metadata, precision="fp32")
    assert read_sidecar(engine) == info
    provider, module = choose_provider()
    assert (info.provider, info.provider_version) == (provider, module.__version__)
    assert info.onnx_sha256 == sha256_file(bundle / "model.onnx")
    assert info.contract_hash == metadata.contract_hash
    assert info.outputs == ("logits", "feature")
    assert (info.batch.min, info.batch.opt, info.batch.max) == (1, metadata.view_plan.max_views, 64)
    assert info.clip_shape == metadata.contract.clip_shape
    assert engine.stat().st_size > 100_000  # the weights are in it
    said = (tmp_path / "model.fp32.engine.log").read_text()
    assert re.search(r"^INFO: .*ONNX IR version", said, re.MULTILINE)
    assert "VERBOSE" not in said
    if provider == "tensorrt_rtx":
        assert info.compute_capabilities == DEFAULT_COMPUTE_CAPABILITIES


@pytest.mark.trt
def test_what_the_builder_said_of_each_plan_stays_in_the_bundle(tiny_bundle_copy: Path) -> None:
    """One logger: the library goes on using the first, and a second would hear nothing."""
    manifest = add_variants(tiny_bundle_copy, [("trt", "fp32")]).manifest
    again = add_variants(tiny_bundle_copy, [("trt", "fp32")]).manifest
    for held in (manifest, again):
        (variant,) = (one for one in held.variants if one.runtime == "tensorrt")
        assert held.entry(f"{variant.files[0]}.log").kind == "record"
        assert not any(name.endswith(".log") for name in variant.files)  # an archive needs none
    assert "Engine generation completed" in (tiny_bundle_copy / f"{variant.files[0]}.log").read_text()
    open_bundle(tiny_bundle_copy)


@pytest.mark.trt
@needs_rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="tensorrt may build where there is a GPU")
def test_the_requested_gpus_are_built_for(bundle: Path, metadata: OnnxMetadata, tmp_path: Path) -> None:
    info = build_engine(
        bundle / "model.onnx",
        tmp_path / "a.engine",
        metadata=metadata,
        precision="fp32",
        compute_capabilities=["8.6", "8.6"],
    )
    assert info.compute_capabilities == ("8.6",)


@pytest.mark.trt
@needs_rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="tensorrt may build where there is a GPU")
def test_a_gpu_that_cannot_be_built_for_is_refused(
    bundle: Path, metadata: OnnxMetadata, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"'9\.0'") as caught:
        build_engine(
            bundle / "model.onnx",
            tmp_path / "a.engine",
            metadata=metadata,
            precision="fp32",
            compute_capabilities=["9.0"],
        )
    assert "8.6" in caught.value.hint
    with pytest.raises(ConfigError, match=r"8\.6 does not multiply fp8"):
        choose_targets(["8.9", "8.6"], "fp8")
    assert (choose_targets(None)[2], choose_targets(None, "fp8")[2]) == (
        DEFAULT_COMPUTE_CAPABILITIES,
        ("8.9", "12.0"),
    )
    # Turing is a target, but has no fp32 3-D convolution: the library's own words are in the error.
    with pytest.raises(ExportError, match=r"compute capability 7\.5 .*[Tt]uring"):
        build_engine(
            bundle / "model.onnx",
            tmp_path / "a.engine",
            metadata=metadata,
            precision="fp32",
            compute_capabilities=["7.5"],
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.trt
def test_a_file_that_cannot_be_parsed_is_refused(metadata: OnnxMetadata, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match=r"cannot parse a\.onnx"):
        build_engine(tmp_path / "a.onnx", tmp_path / "a.engine", metadata=metadata, precision="fp32")


def test_without_tensorrt_the_extras_are_named(
    bundle: Path, metadata: OnnxMetadata, tmp_path: Path, no_tensorrt: None
) -> None:
    with pytest.raises(MissingDependencyError, match="neither tensorrt nor tensorrt_rtx") as caught:
        build_engine(bundle / "model.onnx", tmp_path / "a.engine", metadata=metadata, precision="fp32")
    assert "ivdr-deploy[trt-rtx]" in caught.value.hint
    assert "ivdr-deploy[trt]" in caught.value.hint


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_tensorrt_alone_cannot_build_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "tensorrt", sys
    )  # stands for an installed tensorrt: only its presence matters
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ExportError, match="no NVIDIA driver or GPU") as caught:
        choose_provider()
    assert "trt-rtx" in caught.value.hint


@pytest.mark.trt
@needs_rtx
@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(torch.cuda.is_available(), reason="tensorrt may build where there is a GPU")
@pytest.mark.parametrize("backbone", ["r3d_18", "r2plus1d_18", "s3d", "i3d"])
def test_plans_of_full_size_networks_are_built_in_every_precision(
    backbone: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    clip = ClipSpec(num_frames=16, short_side=112, crop_size=112)
    rng = np.random.default_rng(0)
    golden = rng.integers(0, 256, (1, *clip.clip_shape), dtype=np.uint8)
    spec = ModelSpec(backbone=backbone, num_classes=5, num_slots=0, clip_dim=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(spec, clip).eval()
    training = TrainingState(backbone_step=1, head_steps={"classifier": 1})
    info = CheckpointInfo(
        clip=clip, view_plan=ViewPlan(), model=spec, labels=tuple("abcde"), training=training
    )
    save_checkpoint(tmp_path / "model.safetensors", model=model, info=info, golden=golden)
    bundle = export_bundle(tmp_path / "model.safetensors", tmp_path / "bundle")
    (tmp_path / "videos").mkdir()
    for index in range(6):
        numbered_video(tmp_path / "videos" / f"{index}.mp4", num_frames=40 + index)
    videos = Calibration(videos=read_video_list(tmp_path / "videos"), limits=VideoLimits())
    options = StepOptions(calibration=videos, compute_capabilities=("8.6",))
    for precision in ("fp32", "fp16", "int8"):
        (request,) = requests([("trt", precision)])
        bundle = add_variants(bundle.path, [request], options)
        plan = bundle.variant(f"trt-{precision}-sm86")
        sidecar = read_sidecar(bundle.variant_file(plan))
        record_property(f"{precision}_build_seconds", sidecar.build_seconds)
        print(f"{backbone} {precision}: {sidecar.build_seconds:.1f} s")
        assert plan.derived_from is not None
        source = bundle.variant(plan.derived_from)
        assert not plan.verified
        assert source.verified
        assert sidecar == EngineInfo(
            provider="tensorrt_rtx",
            provider_version=choose_provider()[1].__version__,
            compute_capabilities=("8.6",),
            precision=precision,
            onnx_sha256=bundle.manifest.entry(source.files[0]).sha256,
            contract_hash=clip.contract_hash,
            clip_shape=clip.clip_shape,
            batch=BatchProfile(min=1, opt=10, max=64),
            outputs=("logits", "feature"),
            labels_sha256=labels_sha256(info.labels),
            build_seconds=sidecar.build_seconds,
        )
        weights = bundle.variant_file(source).stat().st_size
        assert bundle.variant_file(plan).stat().st_size > weights / 5  # int8 from fp32 is a quarter
