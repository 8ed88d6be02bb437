"""Packages compiled ahead of time: they compute what torch does, and never run where they do not fit or unasked."""

import os
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import reseal
from full_disk import run_on_full_disk

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.manifest import Target, Variant, file_entry, labels_sha256, write_manifest
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.environment import instruction_sets
from ivdr_deploy.errors import ArtifactError, EngineIncompatibleError, ExportError
from ivdr_deploy.evaluation.verify import verify_bundle
from ivdr_deploy.export import aoti_steps
from ivdr_deploy.export.aoti_steps import package_targets
from ivdr_deploy.export.bundle_export import add_variants
from ivdr_deploy.export.calibration import Calibration
from ivdr_deploy.export.steps import StepOptions
from ivdr_deploy.export.to_aoti import CPU_TARGETS, compile_package
from ivdr_deploy.models.network import build_model
from ivdr_deploy.runtimes import aoti_runtime, registry
from ivdr_deploy.runtimes.aoti_runtime import LABELS_KEY, AotiRuntime
from ivdr_deploy.runtimes.base import infer_all
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.runtimes.variants import choose_variant, open_variant
from ivdr_deploy.serving.core.settings import ServiceSettings
from ivdr_deploy.serving.torchserve.archive import build_archive
from ivdr_deploy.serving.torchserve.settings import EndpointSettings
from ivdr_deploy.spec import ClipSpec, ModelSpec
from ivdr_deploy.video.reader import VideoLimits

needs_compiler = pytest.mark.skipif(
    "avx2" not in instruction_sets() or not (shutil.which("g++") or shutil.which("clang++")),
    reason="packages for a CPU are made on x86-64 with AVX2 and a C++ compiler",
)
FITTING = Variant(
    id="aoti-fp32-cpu-avx2",
    runtime="aoti",
    precision="fp32",
    target=Target(device="cpu", instruction_set="avx2"),
    files=("aoti-fp32-cpu-avx2.pt2",),
    derived_from="torch-fp32",
    build={"torch": torch.__version__},
)


def with_package(bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose manifest says all that speaks for a package; the file is none."""
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    manifest = open_bundle(folder).manifest
    (folder / FITTING.files[0]).write_bytes(b"no package")
    package = replace(FITTING, parity=manifest.variants[1].parity)
    entry = file_entry(folder, FITTING.files[0], kind="model")
    write_manifest(
        folder, replace(manifest, variants=(*manifest.variants, package), files=(*manifest.files, entry))
    )
    return folder


@pytest.mark.slow
@needs_compiler
def test_a_compiled_package_computes_what_torch_does_in_any_batch(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    add_variants(folder, [("aoti", "fp32")])
    opened = open_bundle(folder)
    compiled = [variant for variant in opened.manifest.variants if variant.runtime == "aoti"]
    assert [variant.target.device for variant in compiled] == ["cpu"] * len(compiled)
    package = compiled[0]
    assert package.verified
    assert package.build[LABELS_KEY] == labels_sha256(opened.manifest.labels)
    video = opened.golden().video
    assert video is not None
    clips = np.concatenate([video, video[::-1]])[:7]
    with open_variant(opened, opened.variant("torch-fp32")) as reference:
        expected = infer_all(reference, clips)
    with open_variant(opened, package, threads=1) as runtime:
        for count in (1, 2, 7):
            for name, value in runtime.infer(clips[:count]).items():
                np.testing.assert_allclose(value, expected[name][:count], atol=1e-4)
    assert (
        "mismatch" not in caplog.text
    )  # torch's word on a package for fewer instructions than this machine has
    # It is verified, and yet it runs only when it is asked for.
    chosen, _, reason = choose_variant(opened)
    assert chosen.id == "onnx-fp32"
    assert f"{package.id}: it is machine code" in reason
    with open_model(folder, variant=package.id).runtime as runtime:
        assert runtime.name == "aoti"
    assert choose_variant(opened, package.id)[0] == package
    assert verify_bundle(folder, variants=[package.id]).passed


@pytest.mark.slow
@needs_compiler
def test_threads_of_a_package_do_not_meet_at_every_pixel(tmp_path: Path) -> None:
    """They would take 40 times as long as one thread alone."""
    clip = ClipSpec(num_frames=16, short_side=112, crop_size=112)
    model = build_model(ModelSpec(backbone="tiny", num_classes=5, num_slots=0, clip_dim=0), clip).eval()
    path = tmp_path / "tiny.pt2"
    compile_package(model, path, clip=clip, outputs=("logits",), device="cpu", instruction_set="avx2")
    with zipfile.ZipFile(path) as archive:
        (kernels,) = [name for name in archive.namelist() if name.endswith(".kernel.cpp")]
        lines = archive.read(kernels).decode().splitlines()
    begun = [line for line in lines if line.lstrip().startswith("#pragma omp parallel")]
    assert {len(line) - len(line.lstrip()) for line in begun} == {4}, "threads begin inside a loop"
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Conv3d)]
    assert weights
    for weight in weights:  # laid so that the package is quicker
        assert weight.is_contiguous(memory_format=torch.channels_last_3d)


@needs_compiler
@pytest.mark.parametrize("instruction_set", CPU_TARGETS)
def test_the_compiler_is_told_of_the_instructions_that_the_package_says_it_needs_and_no_more(
    instruction_set: str,
) -> None:
    """Elsewhere a package for AVX2 in which there is AVX-512 would end the process that runs it."""
    march, bits = CPU_TARGETS[instruction_set]
    compiler = shutil.which("g++") or shutil.which("clang++")
    command = [str(compiler), f"-march={march}", "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "__AVX2__" in macros
    assert ("__AVX512F__" in macros) == (instruction_set == "avx512")
    assert bits == {"avx2": 256, "avx512": 512}[instruction_set]


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif("avx512_vnni" not in instruction_sets(), reason="this processor does not multiply int8")
def test_a_package_of_8_bits_is_calibrated_proved_and_runs_in_any_batch(
    bundle: Path, videos: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    listed = Calibration(videos=read_video_list(videos), limits=VideoLimits())
    add_variants(folder, [("aoti", "int8")], StepOptions(calibration=listed))
    opened = open_bundle(folder)
    package = opened.manifest.variants[-1]
    assert (package.id, package.precision, package.verified) == ("aoti-int8-cpu", "int8", True)
    assert (package.derived_from, package.target.instruction_set) == ("onnx-fp32", "avx512_vnni")
    assert package.build[LABELS_KEY] == labels_sha256(opened.manifest.labels)
    assert package.build["calibration_data"] == listed.videos.data_hash
    assert all(entry.max_abs_diff > 1e-6 for entry in package.parity), "it computes in fp32"
    clips = opened.golden().video
    assert clips is not None
    with open_variant(opened, package, threads=1) as runtime:
        whole = infer_all(runtime, clips)
        for name, value in runtime.infer(clips[:1]).items():
            np.testing.assert_allclose(value, whole[name][:1], atol=1e-4 * np.abs(whole[name]).max())


def test_a_package_made_for_labels_in_another_order_is_refused_before_it_is_loaded(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_package(bundle, tmp_path)
    opened = open_bundle(folder)
    monkeypatch.setattr(aoti_runtime, "AotiRuntime", lambda *_, **__: "opened")
    build = FITTING.build | {LABELS_KEY: labels_sha256(opened.manifest.labels)}
    package = replace(opened.variant(FITTING.id), build=build)
    assert open_variant(opened, package) == "opened"
    reseal(
        folder,
        labels=tuple(reversed(opened.manifest.labels)),
        variants=(*opened.manifest.variants[:-1], package),
    )
    with pytest.raises(ArtifactError, match="was made for other labels, or the same in another order"):
        open_variant(open_bundle(folder), package)


def test_verify_runs_no_machine_code_that_was_not_named(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the manifest says of it: here that it was made by this torch, ran, and agreed."""
    folder = with_package(bundle, tmp_path)
    monkeypatch.setattr(aoti_runtime, "AotiRuntime", lambda *_, **__: pytest.fail("it was loaded"))
    report = verify_bundle(folder)
    (found,) = [variant for variant in report.variants if variant.id == FITTING.id]
    assert "machine code" in found.not_run
    assert f"--variant '{FITTING.id}'" in found.not_run
    assert not found.passed
    assert not report.passed
    assert all(variant.passed for variant in report.variants if variant is not found)


def test_machine_code_without_a_verdict_over_videos_is_not_archived(bundle: Path, tmp_path: Path) -> None:
    folder = with_package(bundle, tmp_path)
    assert open_bundle(folder).variant(FITTING.id).verified
    settings = EndpointSettings(service=ServiceSettings(variant=FITTING.id))
    with pytest.raises(ArtifactError, match="must not be served: it is machine code") as caught:
        build_archive(folder, model_store=tmp_path / "store", settings=settings)
    assert "--allow-unverified" in str(caught.value.hint)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"build": {"torch": "2.0.0"}}, "compiled by torch 2.0.0, installed is"),
        ({"build": {}}, "compiled by torch None"),
    ],
)
def test_a_package_of_another_torch_is_refused_before_it_is_loaded(
    change: dict, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert aoti_runtime.misfit(FITTING, "cpu") == ""
    assert expected in aoti_runtime.misfit(replace(FITTING, **change), "cpu")


@pytest.mark.parametrize(
    "target", [Target(), Target(device="cpu"), Target(instruction_set="avx2")], ids=["nothing", "cpu", "avx2"]
)
def test_a_package_of_which_nobody_says_what_it_was_compiled_for_is_refused_before_it_is_loaded(
    bundle: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aoti_runtime, "AotiRuntime", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(EngineIncompatibleError, match="does not say for which device and instructions"):
        open_variant(open_bundle(bundle), replace(FITTING, target=target))


def test_a_package_for_another_number_of_threads_is_refused_before_it_is_loaded(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aoti_runtime, "AotiRuntime", lambda *_, **__: "opened")
    variant = replace(FITTING, target=replace(FITTING.target, threads=3))
    assert open_variant(open_bundle(bundle), variant, threads=3) == "opened"
    with pytest.raises(EngineIncompatibleError, match="was made for 3 threads, and would get 2") as caught:
        open_variant(open_bundle(bundle), variant, threads=2)
    assert "OMP_NUM_THREADS=3" in caught.value.hint


@pytest.mark.parametrize("instruction_set", ["avx512", "bf16"])
def test_a_package_for_instructions_that_are_missing_is_refused_before_it_is_loaded(
    bundle: Path, instruction_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "instruction_sets", lambda: frozenset({"avx2"}))
    monkeypatch.setattr(aoti_runtime, "AotiRuntime", lambda *_, **__: pytest.fail("it was loaded"))
    variant = replace(FITTING, target=Target(device="cpu", instruction_set=instruction_set))
    with pytest.raises(EngineIncompatibleError, match=f"needs a processor with {instruction_set}"):
        open_variant(open_bundle(bundle), variant)
    with pytest.raises(EngineIncompatibleError, match=r"compiled by torch 1\.0"):
        open_variant(open_bundle(bundle), replace(FITTING, build={"torch": "1.0"}))


def test_a_package_for_another_gpu_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = replace(FITTING, target=Target(device="cuda", compute_capabilities=("8.6", "8.9")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no NVIDIA driver was found" in aoti_runtime.misfit(variant, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for here, fits in (((8, 9), True), ((9, 0), False), ((8, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda here=here: here)
        reason = aoti_runtime.misfit(variant, "cuda")
        assert (reason == "") == fits
        if not fits:
            assert reason.endswith(f"this GPU has {here[0]}.{here[1]}")


def test_a_file_that_is_no_package_is_refused(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"PK\x03\x04 but no more")
    with pytest.raises(ArtifactError, match=r"model\.pt2 cannot be loaded by torch"):
        AotiRuntime(path, clip=open_bundle(bundle).manifest.clip, output_names=("logits",), precision="fp32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there packages are for the GPU")
@needs_compiler
def test_a_full_disk_while_a_package_is_compiled_is_no_fault_of_the_compiler(
    bundle: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    before = open_bundle(folder)
    code, said = run_on_full_disk(
        f"add_variants({str(folder)!r}, [('aoti', 'fp32')])",
        limit=1000,
        before="from ivdr_deploy.export.bundle_export import add_variants\n"
        "import ivdr_deploy.export.to_aoti\n"
        "fill()",
    )
    assert (code, "File too large" in said) == (9, True), said
    assert open_bundle(folder) == before


def test_packages_are_made_only_for_what_this_processor_does_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(aoti_steps, "cpp_compiler", lambda: "g++ 12.0")
    monkeypatch.setattr(aoti_steps, "instruction_sets", lambda: frozenset({"avx2"}))
    assert [ending for ending, _ in package_targets("fp32")] == ["cpu-avx2"]
    with pytest.raises(ExportError, match="does not multiply bf16"):
        package_targets("bf16")
    monkeypatch.setattr(aoti_steps, "instruction_sets", lambda: frozenset({"avx2", "avx512", "bf16"}))
    assert [ending for ending, _ in package_targets("fp32")] == ["cpu-avx2", "cpu-avx512"]
    assert package_targets("bf16") == [("cpu", Target(device="cpu", instruction_set="bf16"))]
    with pytest.raises(ExportError, match="does not multiply int8"):
        package_targets("int8")
    monkeypatch.setattr(aoti_steps, "instruction_sets", lambda: frozenset({"avx2", "vnni", "avx512_vnni"}))
    assert package_targets("int8") == [("cpu", Target(device="cpu", instruction_set="avx512_vnni"))]
    monkeypatch.setattr(aoti_steps, "cpp_compiler", lambda: "")
    with pytest.raises(ExportError, match="needs a C\\+\\+ compiler"):
        package_targets("fp32")


def test_a_machine_with_a_gpu_makes_packages_for_its_processor_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(aoti_steps, "cpp_compiler", lambda: "g++ 12.0")
    monkeypatch.setattr(aoti_steps, "instruction_sets", lambda: frozenset({"avx2", "avx512"}))
    gpu = ("sm90", Target(device="cuda", compute_capabilities=("9.0",)))
    assert package_targets("fp32")[0] == gpu
    assert [ending for ending, _ in package_targets("fp32")] == ["sm90", "cpu-avx2", "cpu-avx512"]
    # What this processor does not do well, or not at all, is no hindrance to the GPU.
    assert package_targets("bf16") == package_targets("fp16") == [gpu]
    monkeypatch.setattr(aoti_steps, "instruction_sets", frozenset)
    assert package_targets("fp32") == [gpu]
    with pytest.raises(ExportError, match="x86-64 with AVX2"):
        package_targets("int8")
