"""Which variant of a bundle runs, on which device, and why."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bundles import keep_variants

from ivdr_deploy.artifacts.bundle import Bundle, open_bundle
from ivdr_deploy.artifacts.manifest import Target, Variant
from ivdr_deploy.environment import has_nvidia_driver
from ivdr_deploy.errors import ArtifactError, DeviceError, EngineIncompatibleError
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.runtimes.variants import choose_variant

without_gpu = pytest.mark.skipif(has_nvidia_driver(), reason="needs a machine without a GPU")


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


def with_variants(bundle: Bundle, *variants: Variant) -> Bundle:
    return replace(bundle, manifest=replace(bundle.manifest, variants=variants))


def plan(bundle: Bundle, **changes: object) -> Variant:
    """A TensorRT plan that was measured, as far as the manifest says."""
    exported = bundle.variant("onnx-fp32")
    target = Target(device="cuda", compute_capabilities=("8.9",))
    return replace(exported, id="trt-fp32-sm89", runtime="tensorrt", target=target, **changes)


def test_onnx_runtime_is_taken_before_torch(bundle: Bundle) -> None:
    assert [held.id for held in bundle.manifest.variants] == ["torch-fp32", "onnx-fp32"]
    variant, device, reason = choose_variant(bundle, device="cpu")
    assert (variant.id, device, reason) == ("onnx-fp32", "cpu", "the first verified variant that fits")


def test_an_unverified_variant_is_taken_by_name_only(bundle: Bundle) -> None:
    reference, exported = bundle.manifest.variants
    bad = replace(exported.parity[0], max_abs_diff=1.0)
    for unverified in (replace(exported, parity=()), replace(exported, parity=(bad, *exported.parity[1:]))):
        doubtful = with_variants(bundle, reference, unverified)
        variant, _, reason = choose_variant(doubtful, device="cpu")
        assert variant == reference
        assert reason.startswith("the first verified variant that fits (onnx-fp32: not verified")
        variant, _, reason = choose_variant(doubtful, "onnx-fp32", device="cpu")
        assert (variant, reason) == (unverified, "it was asked for")


def test_the_reason_says_why_others_were_not_taken(bundle: Bundle) -> None:
    several = with_variants(
        bundle, plan(bundle), replace(plan(bundle), id="trt-new", parity=()), *bundle.manifest.variants
    )
    variant, _, reason = choose_variant(several, device="cpu")
    assert variant.id == "onnx-fp32"
    assert "trt-fp32-sm89: it runs on cuda, not on cpu" in reason
    assert "trt-new: not verified" in reason
    assert "torch-fp32" not in reason  # it would fit; it comes later in the order


def test_where_nothing_fits_each_reason_is_given(bundle: Bundle) -> None:
    nothing = with_variants(bundle, plan(bundle), replace(bundle.variant("onnx-fp32"), parity=()))
    with pytest.raises(EngineIncompatibleError) as caught:
        choose_variant(nothing, device="cpu")
    assert "trt-fp32-sm89: it runs on cuda, not on cpu" in caught.value.message
    assert "onnx-fp32: not verified" in caught.value.message
    assert "ivdr doctor" in caught.value.hint
    with pytest.raises(EngineIncompatibleError, match="it holds none"):
        choose_variant(with_variants(bundle))


def test_the_device_that_was_asked_for_is_never_replaced(bundle: Bundle) -> None:
    several = with_variants(bundle, plan(bundle), *bundle.manifest.variants)
    assert choose_variant(several, "trt-fp32-sm89", device="cpu")[1] == "cpu"  # where opening it is refused


def test_an_absent_variant_is_refused(bundle: Bundle) -> None:
    with pytest.raises(ArtifactError, match="no variant 'onnx-fp16'"):
        choose_variant(bundle, "onnx-fp16")


@without_gpu
def test_a_gpu_that_is_not_there_is_never_replaced_by_the_cpu(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineIncompatibleError) as caught:
        open_model(tiny_bundle, device="cuda")
    assert "no verified variant can run here on cuda" in caught.value.message
    for name in ("onnx-fp32: this onnxruntime", "torch-fp32: "):
        assert name in caught.value.message
    with pytest.raises(DeviceError, match="no CUDAExecutionProvider"):
        open_model(tiny_bundle, variant="onnx-fp32", device="cuda")
    with pytest.raises(DeviceError, match="device 'cuda' was asked for, but"):
        open_model(tiny_bundle, variant="torch-fp32", device="cuda")
    for name in ("model.safetensors", "model.onnx"):
        with pytest.raises(DeviceError):
            open_model(tiny_bundle / name, device="cuda")


@without_gpu
def test_without_a_driver_the_cpu_is_what_there_is(bundle: Bundle) -> None:
    for name in (None, "torch-fp32", "onnx-fp32"):
        assert choose_variant(bundle, name)[1] == "cpu"
    # Opened on the device it is for, it says itself what is missing.
    assert choose_variant(with_variants(bundle, plan(bundle)), "trt-fp32-sm89")[1] == "cuda"


@pytest.mark.gpu
def test_with_a_gpu_what_runs_on_it_is_taken_first(bundle: Bundle) -> None:
    variant, device, _ = choose_variant(bundle)
    assert device == "cuda"
    assert variant.runtime in ("torch", "onnxruntime")
    assert choose_variant(bundle, device="cpu")[0].id == "onnx-fp32"
    here = "{}.{}".format(*torch.cuda.get_device_capability())
    fitting = replace(plan(bundle), target=Target(device="cuda", compute_capabilities=(here,)))
    assert choose_variant(with_variants(bundle, *bundle.manifest.variants, fitting))[0] == fitting
    foreign = replace(plan(bundle), target=Target(device="cuda", compute_capabilities=("1.0",)))
    variant, _, reason = choose_variant(with_variants(bundle, *bundle.manifest.variants, foreign))
    assert variant != foreign
    assert f"it was built for compute capability 1.0, this GPU has {here}" in reason


def test_what_is_chosen_is_what_runs(tiny_bundle_copy: Path) -> None:
    model = open_model(tiny_bundle_copy)
    assert (model.variant, model.runtime.name) == ("onnx-fp32", "onnxruntime")
    assert model.reason == "the first verified variant that fits"
    model = open_model(keep_variants(tiny_bundle_copy, "torch-fp32"))
    assert (model.variant, model.runtime.name) == ("torch-fp32", "torch")


def test_a_runtime_that_is_not_installed_is_a_reason_and_not_a_traceback(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "ivdr_deploy.runtimes.ort_runtime", raising=False)
    variant, _, reason = choose_variant(open_bundle(tiny_bundle), device="cpu")
    assert variant.id == "torch-fp32"
    assert "onnx-fp32: the package 'onnxruntime' cannot be imported" in reason
    assert "ivdr-deploy[cpu]" in reason
