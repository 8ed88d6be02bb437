"""Variants in other precisions: made from real clips, proved before they are in, and nothing lost where they fail."""

import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import make_tiny_bundle, reseal

from ivdr_deploy import environment
from ivdr_deploy._files import sha256_file
from ivdr_deploy.artifacts.bundle import changed_bundle, open_bundle
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.environment import has_nvidia_driver
from ivdr_deploy.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    EngineIncompatibleError,
    ExportError,
    MissingDependencyError,
    ParityError,
)
from ivdr_deploy.export.bundle_export import add_variants
from ivdr_deploy.export.calibration import Calibration, calibration_clips
from ivdr_deploy.export.int8 import quantise
from ivdr_deploy.export.int8.scales import Scale
from ivdr_deploy.export.int8_steps import add_onnx_int8, add_onnx_trt
from ivdr_deploy.export.steps import STEPS, StepOptions, buildable_steps, plan_steps, requests
from ivdr_deploy.runtimes import registry
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.runtimes.variants import choose_variant
from ivdr_deploy.spec import Precision
from ivdr_deploy.video.reader import VideoLimits


def calibration(path: Path) -> StepOptions:
    return StepOptions(calibration=Calibration(videos=read_video_list(path), limits=VideoLimits()))


@pytest.fixture(scope="module")
def half_and_eighth(bundle: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with an fp16 and an int8 variant, made as on a processor without VNNI."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ivdr_deploy.export.int8_steps.instruction_sets", frozenset)
        folder = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("precisions") / "lively"))
        add_variants(folder, [("onnx", "int8"), ("onnx", "fp16")], calibration(videos))
    return folder


def test_each_precision_is_a_variant_that_was_run_and_agrees(half_and_eighth: Path, bundle: Path) -> None:
    before, after = open_bundle(bundle).manifest, open_bundle(half_and_eighth).manifest
    assert after.variants[: len(before.variants)] == before.variants
    eighth, half = after.variants[len(before.variants) :]
    assert (eighth.id, eighth.precision, eighth.derived_from) == ("onnx-int8-cpu", "int8", "onnx-fp32")
    assert (half.id, half.precision, half.derived_from) == ("onnx-fp16", "fp16", "torch-fp32")
    assert eighth.target.device == "cpu"
    assert half.verified
    assert eighth.verified
    for variant in (eighth, half):
        assert all(entry.max_abs_diff > 1e-6 for entry in variant.parity), "it computes in fp32"
    assert eighth.build["weight_bits"] == "7"
    errors = {name: float(value) for name, value in eighth.build.items() if name.startswith("error_")}
    assert len(errors) == 3
    assert errors[f"error_{eighth.build['ranges']}"] == min(errors.values())


def test_fp16_computes_the_backbone_in_half_precision_and_the_rest_in_full(half_and_eighth: Path) -> None:
    graph = onnx.load(half_and_eighth / "model-fp16.onnx").graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    convolutions = {types[node.input[1]] for node in graph.node if node.op_type == "Conv"}
    products = {types[node.input[1]] for node in graph.node if node.op_type in ("Gemm", "MatMul")}
    assert convolutions == {onnx.TensorProto.FLOAT16}
    assert products == {onnx.TensorProto.FLOAT}


def test_the_first_variant_stays_the_default_and_another_runs_on_request(half_and_eighth: Path) -> None:
    assert choose_variant(open_bundle(half_and_eighth))[0].id == "onnx-fp32"
    with open_model(half_and_eighth, variant="onnx-int8-cpu").runtime as runtime:
        assert runtime.precision == "int8"


@pytest.mark.parametrize(
    ("name", "precision"),
    [("model.onnx", "fp32"), ("model-fp16.onnx", "fp16"), ("onnx-int8-cpu.onnx", "int8")],
)
def test_a_file_by_itself_says_what_it_computes_in(half_and_eighth: Path, name: str, precision: str) -> None:
    model = open_model(half_and_eighth / name)
    with model.runtime as runtime:
        assert (model.variant, runtime.precision) == (f"onnx-{precision}", precision)
        assert runtime.description.endswith(precision)


def test_a_file_of_another_precision_is_not_judged_by_the_tolerance_of_its_variant(
    half_and_eighth: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(half_and_eighth, tmp_path / "bundle"))
    shutil.copyfile(folder / "model.onnx", folder / "onnx-int8-cpu.onnx")
    reseal(folder)
    with pytest.raises(ArtifactError, match=r"onnx-int8-cpu\.onnx computes in fp32, expected int8"):
        open_model(folder, variant="onnx-int8-cpu")


def test_what_clips_tell_of_a_graph_is_found_once_for_all_its_forms(
    bundle: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def counted(graph: Path, clips: np.ndarray, *, weight_bits: int) -> quantise.Calibrated:
        found.append((sha256_file(graph), weight_bits))
        return whole(graph, clips, weight_bits=weight_bits)

    whole = quantise.calibrate
    monkeypatch.setattr(quantise, "calibrate", counted)
    given = calibration(videos).calibration
    assert given is not None
    folders = [Path(shutil.copytree(bundle, tmp_path / "one")), make_tiny_bundle(tmp_path / "other", seed=1)]
    one, other = [sha256_file(folder / "model.onnx") for folder in folders]
    for folder, sets in ((0, {"vnni"}), (0, set()), (1, set())):
        monkeypatch.setattr(
            "ivdr_deploy.export.int8_steps.instruction_sets", lambda sets=sets: frozenset(sets)
        )
        with changed_bundle(open_bundle(folders[folder])) as draft:
            add_onnx_int8(draft, given)
            add_onnx_trt(draft, given, "int8")
    # TensorRT's form has 8 bits everywhere.
    assert found == [(one, 8), (one, 7), (one, 8), (other, 7), (other, 8)]
    assert list(given.told) == found[-1:], "graphs of former exports are kept"
    made = {variant.id: variant.build for variant in open_bundle(folders[0]).manifest.variants}
    # Six of the seven videos can be used, and each gives seven clips.
    assert {made[name]["calibration_clips"] for name in ("onnx-int8-cpu", "onnx-int8-trt")} == {"42"}


def test_a_variant_for_instructions_that_are_not_there_is_never_run(
    bundle: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    monkeypatch.setattr(registry, "instruction_sets", lambda: frozenset({"vnni"}))
    monkeypatch.setattr("ivdr_deploy.export.int8_steps.instruction_sets", lambda: frozenset({"vnni"}))
    add_variants(folder, [("onnx", "int8")], calibration(videos))
    opened = open_bundle(folder)
    made = opened.manifest.variants[-1]
    assert (made.id, made.target.instruction_set) == ("onnx-int8-cpu-vnni", "vnni")
    assert made.build["weight_bits"] == "8"
    assert registry.misfit(made, "cpu") == ""
    monkeypatch.setattr(registry, "instruction_sets", lambda: frozenset({"avx2"}))
    assert "needs a processor with vnni" in registry.misfit(made, "cpu")
    for path, variant in ((folder, made.id), (folder / made.files[0], None)):
        with pytest.raises(EngineIncompatibleError, match="needs a processor with vnni"):
            open_model(path, variant=variant)


def test_an_int8_graph_that_computes_something_else_is_refused_and_the_bundle_is_as_it_was(
    bundle: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    right = Scale.of.__func__
    # Half the range of every tensor: all that is large is cut off.
    monkeypatch.setattr(Scale, "of", classmethod(lambda cls, low, high: right(cls, low / 4, high / 4)))
    with pytest.raises(ParityError, match="does not compute what the trained network computes"):
        add_variants(folder, [("onnx", "int8")], calibration(videos))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_steps_come_after_those_they_are_made_from_and_each_once() -> None:
    assert plan_steps([("onnx", "int8")]) == [("onnx", "fp32"), ("onnx", "int8")]
    assert plan_steps([("onnx", "int8")], held=["torch-fp32", "onnx-fp32"]) == [("onnx", "int8")]
    assert plan_steps([("trt", "fp16"), ("onnx", "fp16"), ("trt", "fp32")]) == [
        ("onnx", "fp32"),
        ("onnx", "fp16"),
        ("trt", "fp16"),
        ("trt", "fp32"),
    ]


@pytest.mark.parametrize("pair", [("onnx", "bf16"), ("openvino", "fp32"), ("x" * 5000, "fp32")])
def test_an_engine_that_does_not_exist_is_named_and_the_others_listed(pair: tuple[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        requests([("onnx", "fp32"), pair])
    assert pair[1] in caught.value.message
    assert len(caught.value.message) < 300
    assert "onnx int8" in str(caught.value.hint)


@pytest.mark.skipif(has_nvidia_driver(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_of_torch_is_for_a_gpu(bundle: Path, precision: Precision) -> None:
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(ExportError, match=f"torch in {precision} is for a GPU") as caught:
        add_variants(bundle, [("torch", precision)])
    assert "aoti bf16" in caught.value.hint
    assert (bundle / "manifest.json").read_bytes() == before
    assert buildable_steps(StepOptions())[1]["torch", precision] == caught.value.message


def test_int8_without_videos_is_refused_before_anything_is_made(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    with pytest.raises(ConfigError, match="int8 and fp8 need real videos"):
        add_variants(folder, [("onnx", "fp16"), ("onnx", "int8")])
    steps, reasons = buildable_steps(StepOptions())
    assert ("onnx", "fp16") in steps
    assert "int8 and fp8 need real videos" in reasons["onnx", "int8"]


def test_without_torch_every_step_names_the_extra_that_installs_it(
    videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
        monkeypatch.setitem(sys.modules, name, None)
    for options in (StepOptions(), calibration(videos)):
        steps, reasons = buildable_steps(options)
        assert steps == []
        assert all("'torch' cannot be imported" in reason for reason in reasons.values()), reasons
    with pytest.raises(MissingDependencyError) as caught:
        STEPS["aoti", "int8"].check(calibration(videos))
    assert "ivdr-deploy[export]" in caught.value.hint


def test_calibration_clips_are_real_ones_from_all_over_the_list(bundle: Path, videos: Path) -> None:
    clip = open_bundle(bundle).manifest.clip
    clips = calibration_clips(calibration(videos).calibration, clip)
    assert clips.shape[1:] == clip.clip_shape
    assert 12 <= len(clips) <= 48
    assert len(np.unique(clips.reshape(len(clips), -1), axis=0)) > 6  # more than one clip of a video


def test_videos_that_cannot_be_used_do_not_calibrate(bundle: Path, videos: Path, tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / f"{index:02}.mp4").write_bytes(b"no video at all")
    clip = open_bundle(bundle).manifest.clip
    with pytest.raises(
        DataError, match=r"gives 0 clips, .* needs 12 \(20 of 20 videos cannot be used, the first"
    ):
        calibration_clips(calibration(tmp_path).calibration, clip)
    shutil.copytree(videos, tmp_path, dirs_exist_ok=True)
    assert len(calibration_clips(calibration(tmp_path).calibration, clip)) >= 12


def test_others_take_the_place_of_videos_that_cannot_calibrate(
    bundle: Path, videos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a long list nearly all is broken: what is not looks as if it were too little, if one tries a part only."""
    sound = [videos / f"{number}.mp4" for number in range(6)]
    rows = ["absent.mp4"] + [str(sound[0])] + [f"absent{number}.mp4" for number in range(60)]
    rows += [str(path) for path in sound[1:]] + [f"gone{number}.mp4" for number in range(80)]
    listed = "path\n" + "\n".join(rows) + "\n"
    (tmp_path / "list.csv").write_text(listed)
    clip = open_bundle(bundle).manifest.clip
    with pytest.raises(DataError, match=r"gives 6 clips, .* \(141 of 147 videos cannot be used"):
        calibration_clips(calibration(tmp_path / "list.csv").calibration, clip)
    for number in range(42):
        shutil.copyfile(sound[number % len(sound)], tmp_path / f"absent{number}.mp4")
    assert len(calibration_clips(calibration(tmp_path / "list.csv").calibration, clip)) == 48
    assert "calibration: " in caplog.text


def test_clips_to_calibrate_on_come_from_the_end_of_a_list_as_from_its_beginning(
    bundle: Path, videos: Path, tmp_path: Path
) -> None:
    """Lists are often in the order of their classes."""
    for number in range(120):
        shutil.copyfile(videos / f"{number // 60}.mp4", tmp_path / f"{number:03}.mp4")
    clips = calibration_clips(calibration(tmp_path).calibration, open_bundle(bundle).manifest.clip)
    alike = (clips == clips[0]).all(axis=(1, 2, 3, 4))
    assert len(clips) == 48
    assert 22 <= alike.sum() <= 26


def test_a_list_without_end_of_what_cannot_be_used_is_given_up(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(f"{number}.mp4" for number in range(2000)) + "\n")
    with pytest.raises(DataError, match=r"gives 0 clips, .* \(480 of 480 videos cannot be used"):
        calibration_clips(calibration(tmp_path / "list.csv").calibration, open_bundle(bundle).manifest.clip)


def test_the_instruction_sets_of_this_processor_are_those_of_the_system() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        pytest.skip("this system has no /proc/cpuinfo")
    text = flags.read_text()
    assert ("avx2" in environment.instruction_sets()) == (" avx2" in text)
    assert ("vnni" in environment.instruction_sets()) == ("avx512_vnni" in text or "avx_vnni" in text)
