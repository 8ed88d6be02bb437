"""What verify measured stays in the bundle: bound to the files it was measured on, and judged again without a run."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import reseal

from ivdr_deploy._files import sha256_file
from ivdr_deploy.artifacts.bundle import changed_bundle, open_bundle
from ivdr_deploy.artifacts.manifest import write_manifest
from ivdr_deploy.errors import ArtifactError, EngineIncompatibleError, FolderError
from ivdr_deploy.evaluation.records import finite_differences, keep_records, read_record
from ivdr_deploy.evaluation.verify import recheck_bundle, verify_bundle
from ivdr_deploy.evaluation.verify_report import VerifyReport
from ivdr_deploy.runtimes.ort_runtime import OrtRuntime
from ivdr_deploy.runtimes.variants import choose_variant
from ivdr_deploy.spec import canonical_json


@pytest.fixture(scope="module")
def report(bundle: Path, videos: Path) -> VerifyReport:
    return verify_bundle(bundle, data=videos / "labelled.csv")


@pytest.fixture
def kept(bundle: Path, report: VerifyReport, tmp_path: Path) -> Path:
    """A copy of the bundle that holds the records of a run."""
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    keep_records(folder, report.variants)
    return folder


def test_verifying_alone_leaves_the_bundle_as_it_is(bundle: Path, report: VerifyReport) -> None:
    assert report.passed
    assert all(variant.verification is None for variant in open_bundle(bundle).manifest.variants)


def test_a_record_comes_back_as_it_was_measured(kept: Path, report: VerifyReport) -> None:
    bundle = open_bundle(kept)
    for found in report.variants:
        variant = bundle.variant(found.id)
        assert read_record(bundle, variant) == found.record
        held = variant.verification
        assert held is not None
        assert (held.passed, held.failed, held.videos, held.data) == (True, (), 6, "labelled.csv")
        assert held.figures == found.figures()
        assert variant.verified
        assert bundle.manifest.entry(held.record).kind == "record"
    columns = report.variants[1].record.videos
    assert columns.uris == tuple(f"{index}.mp4" for index in range(6))
    assert columns.truth == ("bow", "bow", "jump", "jump", "sit", "sit")
    assert columns.expected == columns.found
    assert len(columns.hits) == len(columns.confidence) == 6


def test_rechecking_gives_the_same_verdict_and_runs_nothing(
    kept: Path, report: VerifyReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ivdr_deploy.evaluation.verify.open_variant", pytest.fail)
    before = (kept / "manifest.json").read_bytes()
    again = recheck_bundle(kept)
    assert again.variants == report.variants
    assert (again.passed, again.videos, again.data) == (True, 6, report.data)
    assert recheck_bundle(kept, variants=["onnx-fp32"]).variants == report.variants[1:]
    assert (kept / "manifest.json").read_bytes() == before


def test_rechecking_under_other_thresholds_gives_another_verdict(kept: Path) -> None:
    for name, value in (("min_cosine", 1.1), ("min_sensitivity", 1e12), ("tolerance", 1e-12)):
        report = recheck_bundle(kept, variants=["onnx-fp32"], thresholds={name: value})
        (found,) = report.variants
        assert not report.passed
        assert {check.name for check in found.failures} <= {
            "cosine",
            "sensitivity",
            "golden",
            "outputs",
            "batch",
        }
    assert open_bundle(kept).variant("onnx-fp32").verified  # a question changes nothing


def test_without_a_record_there_is_nothing_to_recheck(bundle: Path, kept: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no record"):
        recheck_bundle(bundle)
    opened = open_bundle(bundle)
    with pytest.raises(ArtifactError, match="holds no record of a verification of onnx-fp32"):
        recheck_bundle(bundle, variants=["onnx-fp32"])
    served = open_bundle(kept).copy_serving_files(kept.parent / "served", opened.variant("onnx-fp32"))
    with pytest.raises(ArtifactError, match="holds no record"):
        recheck_bundle(served.path)


def test_golden_clips_alone_make_no_record(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    keep_records(folder, verify_bundle(folder).variants)
    assert not list(folder.glob("verify-*"))


def test_a_variant_that_is_exported_again_loses_its_record(kept: Path) -> None:
    bundle = open_bundle(kept)
    old = bundle.variant("onnx-fp32")
    with changed_bundle(bundle) as draft:
        draft.add_file("model.onnx", kind="model").write_bytes(b"another")
        draft.add_variant(replace(old, verification=None))
    after = open_bundle(kept)
    assert after.variant("onnx-fp32").verification is None
    assert not (kept / "verify-onnx-fp32.json").exists()
    assert (kept / "verify-torch-fp32.json").exists()
    assert after.variant("torch-fp32").verification is not None


def test_a_record_of_other_files_is_no_record(kept: Path) -> None:
    """However true the digests: a verdict on other weights is refused, not believed."""
    (kept / "model.onnx").write_bytes(b"another")
    reseal_blindly(kept)
    with pytest.raises(ArtifactError, match="belongs to other files"):
        open_bundle(kept)


def reseal_blindly(folder: Path) -> None:
    """Write digests that fit over a manifest that refuses them."""
    values = json.loads((folder / "manifest.json").read_text())
    del values["manifest_sha256"]
    for entry in values["files"]:
        entry["sha256"] = sha256_file(folder / entry["path"])
        entry["size_bytes"] = (folder / entry["path"]).stat().st_size
    digest = hashlib.sha256(canonical_json(values).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"manifest_sha256": digest, **values}))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"batch": 1, "golden": 2, "outputs": 3}', "[" * 100_000, '{"golden": [1]}'],
)
def test_a_damaged_record_is_an_error_of_ours(kept: Path, text: str) -> None:
    (kept / "verify-onnx-fp32.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"verify-onnx-fp32\.json"):  # its digest
        recheck_bundle(kept)
    reseal(kept)
    with pytest.raises(ArtifactError, match="is not the record of a verification") as caught:
        recheck_bundle(kept)
    assert caught.value.hint
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("tolerance", [0, -1.0])
def test_a_record_with_a_tolerance_that_cannot_be_is_refused(kept: Path, tolerance: float) -> None:
    path = kept / "verify-onnx-fp32.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tolerance": tolerance}))
    reseal(kept)
    with pytest.raises(ArtifactError, match="cannot have been judged by"):
        recheck_bundle(kept)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("sensitivity", 0, "error"), "0", "has no error at all"),
        (("sensitivity", 0, "moved"), "-1", "movement of an output is -1"),
        (("sensitivity", 0, "error"), "-1", "error of an output that moves is -1"),
        (("sensitivity", 0, "moved"), "1e999", "JSON does not have"),
        (("golden", 0, "tolerance"), "Infinity", "JSON does not have"),
        (("outputs", 0, "tolerance"), "1e999", "JSON does not have"),
        (("outputs", 0, "tolerance"), "-1", "tolerance of an output is -1"),
        (("outputs", 0, "max_abs_diff"), "-5", "difference of an output is -5"),
        (("outputs", 0, "max_abs_diff"), "NaN", "JSON does not have"),
        (("outputs", 0, "min_cosine"), "1e300", "cosine of an output is 1e"),
        (("batch", "outputs", 0, "tolerance"), "-1", "tolerance of an output is -1"),
        (("batch", "max_flip_margin"), "-1", "margin of a flip over batches is -1"),
        (("videos", "confidence", 0), "NaN", "JSON does not have"),
        (("videos", "confidence", 0), "1e300", "confidence of a video is 1e"),
        (("videos", "confidence", 0), "-0.5", "confidence of a video is -0.5"),
        (("videos", "expected_confidence", 5), "1.5", "confidence of a video is 1.5"),
        (("videos", "margins", 0), "-Infinity", "JSON does not have"),
        (("videos", "margins", 0), "-1", "margin of a video is -1"),
        (("tolerance",), "Infinity", "JSON does not have"),
    ],
)
def test_a_record_of_numbers_that_nothing_measures_is_refused(
    kept: Path, place: tuple[str | int, ...], value: str, said: str
) -> None:
    """Such a number would pass whatever stands beside it, or end in an error of a library."""
    path = kept / "verify-onnx-fp32.json"
    values = json.loads(path.read_text())
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    assert inner[place[-1]] is not None
    inner[place[-1]] = "HERE"
    path.write_text(json.dumps(values).replace('"HERE"', value))
    reseal(kept)
    with pytest.raises(ArtifactError, match="is not the record of a verification") as caught:
        recheck_bundle(kept)
    assert said in caught.value.message
    assert caught.value.hint


def test_the_verdict_says_how_many_videos_it_does_not_speak_of(
    bundle: Path, videos: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    keep_records(folder, verify_bundle(folder, data=videos / "mixed.csv").variants)
    held = open_bundle(folder).variant("onnx-fp32").verification
    assert str(held) == "PASS over 2 videos of mixed.csv (2 more could not be used)"
    assert str(held) in (folder / "MODEL_CARD.md").read_text()
    assert recheck_bundle(folder).unusable == 2


def test_the_record_of_another_variant_is_refused(kept: Path) -> None:
    shutil.copyfile(kept / "verify-torch-fp32.json", kept / "verify-onnx-fp32.json")
    reseal(kept)
    with pytest.raises(ArtifactError, match="belongs to another variant than onnx-fp32"):
        recheck_bundle(kept)


def test_a_bundle_that_changed_while_it_was_verified_keeps_no_record(
    bundle: Path, report: VerifyReport, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    opened = open_bundle(folder)
    with changed_bundle(opened) as draft:
        draft.add_file("model.onnx", kind="model").write_bytes(b"another")
        draft.add_variant(opened.variant("onnx-fp32"))
    with pytest.raises(FolderError, match="was changed while it was verified: onnx-fp32"):
        keep_records(folder, report.variants)
    assert not list(folder.glob("verify-*"))


def test_an_id_that_is_no_name_of_a_file_writes_nowhere_else(
    bundle: Path, report: VerifyReport, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "deep" / "bundle"))
    manifest = open_bundle(folder).manifest
    strange = replace(manifest.variants[1], id="../../x")
    write_manifest(folder, replace(manifest, variants=(manifest.variants[0], strange)))
    found = report.variants[1]
    keep_records(folder, [replace(found, id="../../x", record=replace(found.record, variant="../../x"))])
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert recheck_bundle(folder).variants[0].id == "../../x"


def test_the_verdict_decides_what_is_taken_by_default(kept: Path, report: VerifyReport) -> None:
    bundle = open_bundle(kept)
    assert choose_variant(bundle, device="cpu")[0].id == "onnx-fp32"
    doubted = [replace(found, not_run="it was pulled") for found in report.variants[1:]]
    keep_records(kept, doubted)
    held = open_bundle(kept)
    variant, _, reason = choose_variant(held, device="cpu")
    assert variant.id == "torch-fp32"
    assert "onnx-fp32: its verification says FAIL" in reason
    assert choose_variant(held, "onnx-fp32", device="cpu")[0].id == "onnx-fp32"  # by name it is
    keep_records(kept, [replace(found, not_run="it was pulled") for found in report.variants])
    with pytest.raises(EngineIncompatibleError, match="its verification says FAIL"):
        choose_variant(open_bundle(kept), device="cpu")


def test_a_variant_that_never_ran_where_it_was_built_is_verified_by_its_record(kept: Path) -> None:
    variant = replace(open_bundle(kept).variant("onnx-fp32"), parity=())
    assert variant.verified
    assert not replace(variant, verification=None).verified
    failed = replace(variant, verification=replace(variant.verification, passed=False, failed=("batch",)))
    assert failed.unverified_reason == "its verification says FAIL (batch) over 6 videos of labelled.csv"


def test_nan_fails_the_variant_and_spares_the_videos(
    bundle: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer = OrtRuntime.infer

    def broken(self: OrtRuntime, video: np.ndarray) -> dict[str, np.ndarray]:
        outputs = infer(self, video)
        outputs["logits"] = outputs["logits"].copy()
        outputs["logits"][0, 0] = np.nan
        return outputs

    monkeypatch.setattr(OrtRuntime, "infer", broken)
    report = verify_bundle(bundle, data=videos / "labelled.csv")
    reference, exported = report.variants
    assert reference.passed
    assert report.bad_videos == ()
    assert {"finite", "golden", "outputs", "batch", "sensitivity"} <= {
        check.name for check in exported.failures
    }
    assert exported.record.not_finite == 1  # the six videos are one call
    values = report.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    keep_records(folder, report.variants)
    assert not open_bundle(folder).variant("onnx-fp32").verified
    again = recheck_bundle(folder)
    assert math.isinf(again.variants[1].golden[0].max_abs_diff)
    assert again.variants == report.variants


def test_what_is_not_finite_is_null_in_json() -> None:
    values = {"a": [1.0, math.inf, {"b": math.nan}], "c": "inf", "d": True}
    assert finite_differences(values) == {"a": [1.0, None, {"b": None}], "c": "inf", "d": True}


def test_card_says_what_was_measured(kept: Path, report: VerifyReport) -> None:
    card = (kept / "MODEL_CARD.md").read_text()
    assert "## Verified on videos" in card
    assert "PASS over 6 videos of labelled.csv" in card
    assert "| same label as the reference |  | 100.0% |" in card
    assert "`verify-onnx-fp32.json`" in card
    keep_records(kept, [replace(found, not_run="it was pulled") for found in report.variants[1:]])
    assert (
        "`onnx-fp32` is never taken unless asked for: its verification says FAIL"
        in (kept / "MODEL_CARD.md").read_text()
    )
