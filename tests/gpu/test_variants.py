"""Every variant that a GPU can make: exported, opened, compared with the CPU, and timed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import TINY_CLIP
from requirements import missing
from videos import numbered_video

from ivdr_deploy._optional import import_onnxruntime
from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.benchmarks.engines import LEAST_TURNS, time_variants, timed_variants
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.evaluation.verify import verify_bundle
from ivdr_deploy.export.bundle_export import add_variants
from ivdr_deploy.export.calibration import Calibration
from ivdr_deploy.export.steps import Request, StepOptions
from ivdr_deploy.export.to_tensorrt import choose_provider
from ivdr_deploy.runtimes.compare import compare_outputs, describe_failures
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.runtimes.registry import misfit
from ivdr_deploy.runtimes.torch_runtime import LAYOUT_KEY, LAYOUTS
from ivdr_deploy.video.reader import VideoLimits

pytestmark = pytest.mark.gpu

REQUESTS: list[Request] = [
    ("onnx", "fp16"),
    ("torch", "fp16"),
    ("torch", "bf16"),
    ("aoti", "fp32"),
    ("aoti", "fp16"),
    ("aoti", "bf16"),
]
PLANS: list[Request] = [("trt", "fp32"), ("trt", "fp16"), ("trt", "int8"), ("trt", "fp8")]


def check_on_gpu(bundle: Path, request: Request, options: StepOptions | None = None) -> None:
    """Add a variant on this machine; it must run, at every size of batch, as torch does on the CPU."""
    held = {variant.id for variant in open_bundle(bundle).manifest.variants}
    manifest = add_variants(bundle, [request], options).manifest
    added = [variant for variant in manifest.variants if variant.id not in held]
    assert any(variant.target.device != "cpu" for variant in added)
    reference = open_model(bundle, variant="torch-fp32", device="cpu").runtime
    for variant in added:
        assert variant.precision == request[1]
        if variant.runtime == "onnxruntime" and misfit(variant, "cuda"):
            missing("ort-gpu", "this onnxruntime was built without CUDA")
        assert variant.parity, "it was built here, so it must have been run here"
        device = variant.target.device or "cuda"  # packages for the CPU are made beside
        with open_model(bundle, variant=variant.id, device=device).runtime as runtime:
            for number in (1, 2, 7, 2, 64):
                shape = (number, *TINY_CLIP.clip_shape)
                video = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
                compared = compare_outputs(
                    reference.infer(video), runtime.infer(video), precision=variant.precision
                )
                assert not describe_failures(compared), (variant.id, number)


@pytest.mark.parametrize("request_", REQUESTS, ids="-".join)
def test_variants_of_torch_and_onnx(tiny_bundle_copy: Path, request_: Request) -> None:
    check_on_gpu(tiny_bundle_copy, request_)


@pytest.mark.trt
@pytest.mark.parametrize("request_", PLANS, ids="-".join)
def test_plans(tiny_bundle_copy: Path, tmp_path: Path, request_: Request) -> None:
    (tmp_path / "videos").mkdir()
    for number in range(6):
        numbered_video(tmp_path / "videos" / f"{number}.mp4", num_frames=20 + number, size=(64, 48))
    calibration = Calibration(videos=read_video_list(tmp_path / "videos"), limits=VideoLimits())
    here = torch.cuda.get_device_capability()
    if request_[1] == "fp8" and here < (8, 9):
        options = StepOptions(calibration=calibration, compute_capabilities=["{}.{}".format(*here)])
        with pytest.raises(ConfigError, match="does not multiply fp8"):
            add_variants(tiny_bundle_copy, [request_], options)
        return
    check_on_gpu(tiny_bundle_copy, request_, StepOptions(calibration=calibration))
    if choose_provider()[0] == "tensorrt":
        (timings,) = tiny_bundle_copy.glob("tensorrt-sm*.timings")
        assert timings.stat().st_size > 1000


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_faster_layout_is_kept(tiny_bundle_copy: Path, precision: str) -> None:
    bundle = add_variants(tiny_bundle_copy, [("torch", precision)])  # type: ignore[list-item]
    build = bundle.variant(f"torch-{precision}").build
    took = {layout: float(build[f"ms_{layout}"]) for layout in LAYOUTS}
    assert build[LAYOUT_KEY] == min(took, key=lambda layout: took[layout])


def test_fp32_means_fp32(tiny_bundle: Path) -> None:
    """TF32 keeps 10 bits of each factor, and is what cuDNN takes where nobody forbids it."""
    cpu, gpu = (open_model(tiny_bundle, variant="torch-fp32", device=device) for device in ("cpu", "cuda"))
    video = np.random.default_rng(0).integers(0, 256, (4, *TINY_CLIP.clip_shape), dtype=np.uint8)
    compared = compare_outputs(cpu.runtime.infer(video), gpu.runtime.infer(video), precision="fp32")
    assert not describe_failures(compared)


def test_variants_take_turns_on_the_gpu(tiny_bundle_copy: Path) -> None:
    requests: list[Request] = [("torch", "fp16"), ("aoti", "fp16")]
    bundle = add_variants(tiny_bundle_copy, requests)
    names = ["torch-fp16", next(v.id for v in bundle.manifest.variants if v.id.startswith("aoti-fp16-sm"))]
    chosen, _ = timed_variants(bundle, names, device="cuda")
    timing = time_variants(bundle, chosen, device="cuda", threads=1, turns=LEAST_TURNS, turn_seconds=0.1)
    assert set(timing.ms) == {"torch-fp32", *names}
    assert all(timing.over_reference(name).median > 0 for name in names)
    assert all(torch.cuda.get_device_name() in what for what in timing.runtimes.values())


def test_onnx_runtime_runs_on_the_gpu_or_not_at_all(tiny_bundle: Path) -> None:
    if "CUDAExecutionProvider" not in import_onnxruntime().get_available_providers():
        missing("ort-gpu", "this onnxruntime was built without CUDA")
    with open_model(tiny_bundle, variant="onnx-fp32", device="cuda").runtime as runtime:
        assert "CUDAExecutionProvider" in runtime.description


def test_verify_judges_on_the_gpu_what_runs_on_either(tiny_bundle_copy: Path, tmp_path: Path) -> None:
    """``torch-fp32`` over the golden clips, since it stays on the CPU where others are held against it."""
    add_variants(tiny_bundle_copy, [("torch", "bf16")])
    report = verify_bundle(tiny_bundle_copy, variants=["torch-fp32"], device="cuda")
    assert report.passed
    (tmp_path / "videos").mkdir()
    numbered_video(tmp_path / "videos" / "a.mp4", num_frames=20, size=(64, 48))
    videos = read_video_list(tmp_path / "videos")
    both = verify_bundle(tiny_bundle_copy, data=videos, variants=["torch-fp32", "torch-bf16"], device="cuda")
    ran = [found.record.runtime for found in (*report.variants, *both.variants) if found.record is not None]
    gpu = torch.cuda.get_device_name()
    assert [gpu in runtime for runtime in ran] == [True, False, True]
    if "CUDAExecutionProvider" not in import_onnxruntime().get_available_providers():
        missing("ort-gpu", "this onnxruntime was built without CUDA")
    (onnx,) = verify_bundle(tiny_bundle_copy, data=videos, variants=["onnx-fp32"], device="cuda").variants
    assert onnx.record is not None
    assert "CUDAExecutionProvider" in onnx.record.runtime
