"""Which variant of a bundle runs, on which device, and why."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bundles import keep_variants

from ivdr_deploy.artifacts.bundle import Bundle, open_bundle
from ivdr_deploy.artifacts.manifest import Target, Variant
from ivdr_deploy.artifacts.speed import Machine, Speed, this_machine
from ivdr_deploy.environment import has_nvidia_driver
from ivdr_deploy.errors import ArtifactError, ConfigError, DeviceError, EngineIncompatibleError
from ivdr_deploy.runtimes import variants
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.runtimes.variants import choose_variant, open_variant

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


def test_a_gpu_comes_before_the_cpu_and_there_tensorrt_before_onnx_runtime_and_that_before_torch(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine on which each of them would run."""
    monkeypatch.setattr(variants, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(
        variants, "misfit", lambda held, device: "" if held.target.device in (None, device) else "elsewhere"
    )
    reference, exported = bundle.manifest.variants
    for_cpu = replace(exported, id="onnx-int8-cpu", target=Target(device="cpu"))
    for held, expected in (
        ((reference, exported, plan(bundle)), ("trt-fp32-sm89", "cuda")),
        ((reference, exported), ("onnx-fp32", "cuda")),
        ((for_cpu, reference), ("torch-fp32", "cuda")),
        ((for_cpu,), ("onnx-int8-cpu", "cpu")),
    ):
        variant, device, _ = choose_variant(with_variants(bundle, *held))
        assert (variant.id, device) == expected
    assert choose_variant(bundle, "torch-fp32")[1] == "cuda"


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


def test_many_variants_and_large_numbers_make_no_long_message(bundle: Bundle) -> None:
    """As many as a manifest may hold, each with as long a name; a real bundle has all of its variants named."""
    many = [replace(plan(bundle), id=f"{number:03}{'x' * 250}") for number in range(100)]
    foreign = with_variants(bundle, *many)
    with pytest.raises(EngineIncompatibleError, match=r"; 019x.* and 80 more") as caught:
        choose_variant(foreign, device="cpu")
    assert len(caught.value.message) < 4000
    with pytest.raises(ArtifactError, match=r"'019x.* and 80 more") as caught:
        choose_variant(foreign, "onnx-fp32")
    assert len(caught.value.message) < 4000
    exported, large = bundle.variant("onnx-fp32"), 10**4000
    wide = replace(exported, target=Target(device="cpu", threads=large))
    with pytest.raises(EngineIncompatibleError, match="was made for 1000") as caught:
        open_variant(with_variants(bundle, wide), wide)
    assert len(str(caught.value)) < 700


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


def timed(bundle: Bundle, name: str, over: float, machine: Machine, *, spread: float = 0.05) -> Variant:
    """A variant of the bundle with a speed, as far as the manifest says."""
    held = bundle.variant(name)
    speed = Speed(
        machine=machine,
        variant_sha256=bundle.manifest.variant_sha256(held),
        reference="torch-fp32",
        over_reference=over,
        low=over * (1 - spread),
        high=over * (1 + spread),
        ms_per_clip=100.0 / over,
        turns=9,
        batch=1,
        clip_shape=bundle.manifest.clip.clip_shape,
        runtime="as it was",
        measured_at="2026-11-25T12:00:00+00:00",
    )
    return replace(held, speed=speed)


def chosen(bundle: Bundle, *variants: Variant, threads: int | None = None) -> tuple[str, str]:
    variant, _, reason = choose_variant(with_variants(bundle, *variants), device="cpu", threads=threads)
    return variant.id, reason


def test_the_fastest_by_what_was_measured_on_this_kind_of_machine_is_taken(bundle: Bundle) -> None:
    here = this_machine("cpu")
    torch_, onnx = timed(bundle, "torch-fp32", 3.0, here), timed(bundle, "onnx-fp32", 1.5, here)
    middle = replace(onnx, id="onnx-other", speed=replace(onnx.speed, over_reference=2.0, low=1.9, high=2.1))
    name, reason = chosen(bundle, onnx, middle, torch_)
    assert name == "torch-fp32"
    assert reason.startswith(
        "the fastest verified variant that fits: 3.00 [2.85, 3.15] times as fast as torch-fp32, 33.3 ms"
    )
    assert reason.endswith("onnx-fp32, the first, 1.50 times")
    # Not by chance: its interval must lie above that of the first in the order.
    name, reason = chosen(bundle, onnx, timed(bundle, "torch-fp32", 1.6, here))
    assert name == "onnx-fp32"
    assert "none was measured to be surely faster" in reason


def test_a_speed_of_another_machine_or_number_of_threads_is_not_used(bundle: Bundle) -> None:
    here = this_machine("cpu")
    for other in (
        replace(here, processor="another"),
        replace(here, instruction_sets=("avx2", "vnni", "x")),
        replace(here, threads=here.threads + 1),
        replace(here, device="cuda"),
    ):
        slow, fast = timed(bundle, "onnx-fp32", 1.0, other), timed(bundle, "torch-fp32", 9.0, other)
        assert chosen(bundle, slow, fast) == ("onnx-fp32", "the first verified variant that fits")
        mixed = timed(bundle, "onnx-fp32", 1.0, here)
        assert chosen(bundle, mixed, fast)[0] == "onnx-fp32"
    slow, fast = (timed(bundle, name, over, here) for name, over in (("onnx-fp32", 1.0), ("torch-fp32", 9.0)))
    assert chosen(bundle, slow, fast, threads=here.threads + 1)[0] == "onnx-fp32"
    assert chosen(bundle, slow, fast, threads=here.threads)[0] == "torch-fp32"
    # Nor one of calls with more clips, which tell more of how busy a processor is kept than of how fast it is.
    assert fast.speed is not None
    assert chosen(bundle, slow, replace(fast, speed=replace(fast.speed, batch=8)))[0] == "onnx-fp32"
    # Where the first in the order was never timed there is nothing to compare with.
    assert chosen(bundle, replace(slow, speed=None), fast)[0] == "onnx-fp32"


def test_a_machine_of_which_nothing_is_known_is_like_no_other(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = replace(this_machine("cpu"), processor="")
    slow, fast = (
        timed(bundle, name, over, unknown) for name, over in (("onnx-fp32", 1.0), ("torch-fp32", 9.0))
    )
    monkeypatch.setattr("ivdr_deploy.artifacts.speed.cpu_model", lambda: "")
    assert this_machine("cpu") == unknown
    assert chosen(bundle, slow, fast) == ("onnx-fp32", "the first verified variant that fits")
    assert "on an unknown 'cpu' device" in str(fast.speed)


def test_a_faster_variant_that_is_unverified_or_machine_code_is_not_taken(bundle: Bundle) -> None:
    here = this_machine("cpu")
    first, fast = timed(bundle, "onnx-fp32", 1.0, here), timed(bundle, "onnx-fp32", 9.0, here)
    unverified = replace(fast, id="onnx-new", parity=())
    compiled = replace(fast, id="aoti-fp32", runtime="aoti", build={"torch": torch.__version__})
    elsewhere = replace(fast, id="onnx-vnni", target=Target(instruction_set="none-has-this"))
    reference = timed(bundle, "torch-fp32", 1.0, here)
    assert chosen(bundle, reference, first, unverified, compiled, elsewhere)[0] == "onnx-fp32"
    assert chosen(bundle, reference, first, replace(fast, id="onnx-good"))[0] == "onnx-good"


def test_a_speed_that_cannot_be_is_refused(bundle: Bundle) -> None:
    speed = timed(bundle, "onnx-fp32", 2.0, this_machine("cpu")).speed
    for change in (
        {"low": 3.0},
        {"ms_per_clip": float("nan")},
        {"high": float("inf")},
        {"over_reference": 0.0},
    ):
        with pytest.raises(ConfigError, match="cannot have been measured"):
            replace(speed, **change)
