import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import reseal

from ivdr_deploy._optional import import_onnxruntime
from ivdr_deploy.artifacts.bundle import Bundle, open_bundle
from ivdr_deploy.artifacts.checkpoint import load_checkpoint, save_checkpoint
from ivdr_deploy.artifacts.manifest import Target, Variant, write_manifest
from ivdr_deploy.decoding import DecodePool
from ivdr_deploy.errors import ArtifactError, DataError, DeviceError, EngineIncompatibleError
from ivdr_deploy.evaluation import verify
from ivdr_deploy.evaluation.verify import verify_bundle
from ivdr_deploy.export.bundle_export import export_bundle
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.base import Runtime
from ivdr_deploy.runtimes.compare import TOLERANCE
from ivdr_deploy.runtimes.loading import open_model


@pytest.fixture(scope="module")
def wrong(checkpoint: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose ONNX file, all digests in order, prefers what the trained network likes least."""
    scratch = tmp_path_factory.mktemp("wrong")
    trained = load_checkpoint(checkpoint)
    assert trained.model.classifier is not None
    with torch.no_grad():
        for parameter in trained.model.classifier.parameters():
            parameter.neg_()
    save_checkpoint(
        scratch / "turned.safetensors", model=trained.model, info=trained.info, golden=trained.golden
    )
    turned = export_bundle(scratch / "turned.safetensors", scratch / "turned")
    folder = Path(shutil.copytree(bundle, scratch / "bundle"))
    shutil.copyfile(turned.path / "model.onnx", folder / "model.onnx")
    return reseal(folder)


def test_without_a_list_the_golden_clips_decide(bundle: Path) -> None:
    report = verify_bundle(bundle)
    assert report.passed
    assert [variant.id for variant in report.variants] == ["torch-fp32", "onnx-fp32"]
    assert all({entry.output for entry in found.golden} == {"logits", "feature"} for found in report.variants)
    assert set(report.decode_mean_diff.values()) == {0.0}
    assert (report.data, report.videos, report.bad_videos) == (None, 0, ())


def test_a_labelled_list_gives_agreement_accuracy_and_retrieval(bundle: Path, videos: Path) -> None:
    report = verify_bundle(bundle, data=videos / "labelled.csv")
    assert report.passed
    assert report.videos == 6
    reference, onnx = report.variants
    assert reference.agreement is None
    assert reference.parity == ()
    assert (onnx.agreement.correct, onnx.agreement.total) == (6, 6)
    assert onnx.flips == ()
    assert {entry.output for entry in onnx.parity} == {"logits", "feature"}
    assert all(0 < entry.max_abs_diff <= 1e-4 for entry in onnx.parity)
    model = open_model(bundle)
    with model.runtime, VideoPredictor(model) as predictor:
        answers = [predictor.predict(videos / f"{i}.mp4").top(1)[0][0] for i in range(6)]
    truth = ["bow", "bow", "jump", "jump", "sit", "sit"]
    right = sum(answer == label for answer, label in zip(answers, truth, strict=True))
    assert (onnx.accuracy.correct, onnx.accuracy.total) == (right, 6)
    assert reference.recall == onnx.recall
    assert reference.recall.total == 6


def test_a_list_without_labels_gives_agreement_alone(bundle: Path, videos: Path) -> None:
    onnx = verify_bundle(bundle, data=videos / "bare.txt").variants[1]
    assert onnx.agreement.total == 6
    assert onnx.accuracy is None
    assert onnx.recall is None


def test_a_wrong_model_fails_with_its_flips_listed(wrong: Path, videos: Path) -> None:
    report = verify_bundle(wrong, data=videos / "labelled.csv")
    assert not report.passed
    reference, onnx = report.variants
    assert reference.passed
    assert not onnx.passed
    assert not all(entry.passed for entry in onnx.golden)
    assert not all(entry.passed for entry in onnx.parity)
    assert len(onnx.flips) == onnx.agreement.total - onnx.agreement.correct == 6
    for flip in onnx.flips:
        assert flip.uri.endswith(".mp4")
        assert flip.expected != flip.found
        assert flip.margin > onnx.thresholds.max_flip_margin == TOLERANCE["fp32"]
    assert not verify_bundle(wrong).passed


def test_bad_videos_are_listed_and_the_others_are_judged(bundle: Path, videos: Path) -> None:
    report = verify_bundle(bundle, data=videos / "mixed.csv")
    assert report.passed
    assert report.videos == 2
    assert [video.uri for video in report.bad_videos] == ["broken.mp4", "absent.mp4"]
    assert all(video.code and video.message for video in report.bad_videos)


def test_a_list_without_one_usable_video_is_an_error(bundle: Path, videos: Path) -> None:
    with pytest.raises(DataError, match="none of its 1 videos can be used"):
        verify_bundle(bundle, data=videos / "all_bad.csv")


def test_labels_that_the_model_does_not_know_are_named(bundle: Path, videos: Path) -> None:
    with pytest.raises(DataError, match="tango, waltz") as caught:
        verify_bundle(bundle, data=videos / "unknown.csv")
    assert "bow" in caught.value.hint


def test_a_damaged_bundle_is_refused_before_anything_runs(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (folder / "model.onnx").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        verify_bundle(folder)


def test_each_video_is_decoded_once_for_all_variants(
    bundle: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    submit = DecodePool.submit

    def counted(self, job, source, *arguments, **options):
        decoded.append(Path(source.uri).name)
        return submit(self, job, source, *arguments, **options)

    monkeypatch.setattr(DecodePool, "submit", counted)
    report = verify_bundle(bundle, data=videos / "bare.txt")
    assert decoded == [f"{index}.mp4" for index in range(6)]
    assert [found.agreement.total for found in report.variants if found.agreement] == [6]


def test_a_variant_that_did_not_run_has_not_passed(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    manifest = open_bundle(folder).manifest
    plan = replace(
        manifest.variants[1],
        id="trt-fp32-sm89",
        runtime="tensorrt",
        provider="tensorrt",
        target=Target(device="cuda", compute_capabilities=("8.9",)),
        parity=(),
    )
    write_manifest(folder, replace(manifest, variants=(*manifest.variants, plan)))
    report = verify_bundle(folder)
    assert [found.id for found in report.variants if found.not_run] == ["trt-fp32-sm89"]
    assert not report.passed
    assert verify_bundle(folder, variants=["onnx-fp32"]).passed
    with pytest.raises(ArtifactError, match="no variant 'onnx-int8'"):
        verify_bundle(folder, variants=["onnx-int8"])


def test_without_its_reference_no_video_can_be_judged(bundle: Path, videos: Path, tmp_path: Path) -> None:
    opened = open_bundle(bundle)
    served = opened.copy_serving_files(tmp_path, opened.variant("onnx-fp32"))
    assert verify_bundle(served.path).passed
    with pytest.raises(
        ArtifactError, match="no reference to compare videos with; its variants are 'onnx-fp32'"
    ):
        verify_bundle(served.path, data=videos / "labelled.csv")


def test_as_many_variants_as_a_manifest_holds_make_no_long_message(
    bundle: Path, videos: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    manifest = open_bundle(folder).manifest
    plan = replace(
        manifest.variants[1],
        runtime="tensorrt",
        provider="tensorrt",
        target=Target(
            device="cuda", compute_capabilities=tuple(f"{number}{'9' * 250}" for number in range(100))
        ),
        parity=(),
    )
    ids = [f"{number:03}{'x' * 250}" for number in range(100)]
    write_manifest(folder, replace(manifest, variants=tuple(replace(plan, id=name) for name in ids)))
    with pytest.raises(EngineIncompatibleError, match=r"\(000x.*; 019x.* and 80 more\)$") as caught:
        verify_bundle(folder)
    assert len(caught.value.message) < 40_000
    with pytest.raises(ArtifactError, match=r"its variants are '000x.*'019x.* and 80 more\.") as caught:
        verify_bundle(folder, data=videos / "labelled.csv")
    assert len(caught.value.message) < 4000


def test_the_report_is_valid_json_even_when_an_output_is_broken(
    wrong: Path, videos: Path, bundle: Path
) -> None:
    values = verify_bundle(bundle, data=videos / "labelled.csv").to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["passed"] is True
    assert values["variants"][1]["accuracy"]["total"] == 6
    assert 0 <= values["variants"][1]["accuracy"]["low"] <= values["variants"][1]["accuracy"]["value"]
    failed = verify_bundle(wrong, data=videos / "labelled.csv").to_dict()
    assert json.loads(json.dumps(failed, allow_nan=False))["passed"] is False
    assert not any(isinstance(value, float) and math.isinf(value) for value in failed["variants"][1].values())


def test_a_gpu_that_is_not_there_is_an_error_before_anything_runs(
    bundle: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "has_nvidia_driver", lambda: False)
    monkeypatch.setattr(verify, "open_variant", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(DeviceError, match="device 'cuda' was asked for, but no NVIDIA driver was found"):
        verify_bundle(bundle, data=videos / "labelled.csv", device="cuda")


def test_what_runs_on_either_device_is_judged_on_the_one_that_was_asked_for(
    bundle: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here without a GPU, behind a driver: what is for the CPU runs there, and what runs on either does not."""
    if "CUDAExecutionProvider" in import_onnxruntime().get_available_providers():
        pytest.skip("this onnxruntime can run on a GPU")
    monkeypatch.setattr(verify, "has_nvidia_driver", lambda: True)
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    report = verify_bundle(folder, data=videos / "labelled.csv", device="cuda")
    reference, onnx = report.variants
    assert (reference.passed, report.passed) == (True, False)
    assert "has no CUDAExecutionProvider" in onnx.not_run
    manifest = open_bundle(folder).manifest
    bound = replace(manifest.variants[1], target=Target(device="cpu"))
    write_manifest(folder, replace(manifest, variants=(manifest.variants[0], bound)))
    report = verify_bundle(folder, data=videos / "labelled.csv", device="cuda")
    assert report.passed
    assert report.variants[1].record is not None
    assert "CPUExecutionProvider" in report.variants[1].record.runtime


def test_a_variant_that_a_gpu_refuses_when_it_is_opened_is_not_run(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(opened: Bundle, variant: Variant, **place: Any) -> Runtime:
        if variant.id == "onnx-fp32":
            raise DeviceError("cuda was asked for, but ONNX Runtime would run Conv on the CPU")
        return open_variant(opened, variant, **place)

    open_variant = verify.open_variant
    monkeypatch.setattr(verify, "open_variant", refusing)
    report = verify_bundle(bundle)
    assert not report.passed
    assert [(found.id, found.not_run[:20]) for found in report.variants if found.not_run] == [
        ("onnx-fp32", "cuda was asked for, ")
    ]
