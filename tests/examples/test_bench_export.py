"""What ``make bench-export`` measures, on the smallest network and small clips; the page is that of the records."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import TINY_CLIP

from examples.demo.figures import make_figures
from examples.engines import bench_export, support_matrix
from examples.engines.bench_export import Settings, find_data, run
from examples.engines.networks import fit_classifier, set_batch_norms
from ivdr_deploy.models.backbones import BACKBONES
from ivdr_deploy.models.network import build_model
from ivdr_deploy.spec import ClipSpec, ModelSpec

SMALL = ClipSpec(num_frames=8, frame_stride=4, short_side=64, crop_size=56)


@pytest.mark.exhaustive
def test_a_backbone_is_exported_verified_and_timed_and_kept_beside_earlier_ones(tmp_path: Path) -> None:
    make_figures(tmp_path / "videos", train_actors=3, test_actors=1)
    data = find_data(tmp_path / "videos", tmp_path)
    settings = Settings(turns=6, turn_seconds=0.01, threads=1, clip=SMALL, requests=[("onnx", "int8")])
    out = tmp_path / "build" / "export.json"
    out.parent.mkdir()
    out.write_text(json.dumps({"backbones": {"earlier": {"best_over_eager": 2.0}}}))
    assert run("tiny", data, settings, out, tmp_path)
    report = json.loads(out.read_text())
    assert report["backbones"]["earlier"] == {"best_over_eager": 2.0}
    found = report["backbones"]["tiny"]
    assert found["export_seconds"] > 0
    assert found["clip"] == "8x56x56"
    int8 = next(name for name in found["variants"] if name.startswith("onnx-int8"))
    assert list(found["variants"]) == ["torch-fp32", "onnx-fp32", int8]
    assert found["order"] == list(found["variants"]) * 6
    for name in ("onnx-fp32", int8):
        measured = found["variants"][name]
        assert measured["over_eager_low"] <= measured["over_eager"] <= measured["over_eager_high"]
        for figure in ("top1_agreement", "min_cosine", "batch_flips", "confidence_shift"):
            assert measured[figure] is not None, figure
    assert found["variants"]["onnx-fp32"]["top1_agreement"] == 1.0
    passing = [name for name, one in found["variants"].items() if one["verified"] and name != "torch-fp32"]
    assert found["best_over_eager"] == max(found["variants"][name]["over_eager"] for name in passing)
    assert found["not_built"]["onnx fp16"] == "left out of this run"
    assert found["environment"]["cpu"]

    # An error costs this backbone alone.
    assert not run("mvit_v2_s", data, settings, out, tmp_path)
    report = json.loads(out.read_text())
    assert "16 frames of 224 pixels" in report["backbones"]["mvit_v2_s"]["error"]
    assert report["backbones"]["tiny"] == found
    del report["backbones"]["earlier"]  # of no machine, which no run writes
    page = support_matrix.render({"export_here.json": report})
    assert f"`{int8}`" in page
    assert "left out of this run" in page


def test_batch_norms_and_classifier_are_set_on_the_clips() -> None:
    clips = np.random.default_rng(0).integers(0, 256, (12, *TINY_CLIP.clip_shape), dtype=np.uint8)
    model = build_model(ModelSpec(backbone="tiny", num_classes=3), TINY_CLIP)
    set_batch_norms(model, clips)
    first = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm3d))
    assert not torch.equal(first.running_mean, torch.zeros_like(first.running_mean))
    assert not model.training
    targets = [place % 3 for place in range(len(clips))]
    fit_classifier(model, clips, targets)
    with torch.inference_mode():
        logits = model(torch.from_numpy(clips))["logits"]
    assert logits.argmax(dim=1).tolist() == targets


def test_every_backbone_of_convolutions_is_taken() -> None:
    assert {"tiny", "r3d_18", "r2plus1d_18", "i3d", "s3d", "mc3_18"} <= set(bench_export.BACKBONE_NAMES)
    assert "mvit_v2_s" not in bench_export.BACKBONE_NAMES


def test_the_page_is_that_of_the_committed_records() -> None:
    """Where this fails: ``make support-matrix``."""
    records = support_matrix.read_records(support_matrix.RECORDS)
    assert records, "no export_*.json in docs/results"
    page = support_matrix.PAGE.read_text(encoding="utf-8")
    assert page == support_matrix.render(records), "stale: run `make support-matrix`"
    for name in BACKBONES:
        assert f"| `{name}` |" in page


def test_a_changed_record_changes_the_page_and_every_blank_has_a_reason() -> None:
    records = support_matrix.read_records(support_matrix.RECORDS)
    page = support_matrix.render(records)
    name, record = next(iter(records.items()))
    backbone, found = next((key, value) for key, value in record["backbones"].items() if "variants" in value)
    changed = {**found, "eager_ms": found["eager_ms"] + 1000.0}
    assert support_matrix.render({**records, name: {**record, "backbones": {backbone: changed}}}) != page
    for line in page.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")][7:]
            for cell in cells:
                assert len(cell) > 2 or f"\n- {cell}: " in page, (line, cell)


def test_trained_networks_are_taken_by_name_and_a_folder_without_any_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r3d_18.safetensors").touch()
    assert bench_export._trained(tmp_path, "r3d_18") == tmp_path / "r3d_18.safetensors"
    assert bench_export._trained(tmp_path, "tiny") is None
    with pytest.raises(SystemExit) as ended:
        bench_export.main(["--backbones", "tiny", "--checkpoints", str(tmp_path)])
    assert ended.value.code
    assert "no trained network of tiny" in capfd.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("revision", "said"),
    [
        ("0123456789" * 4, "| `01234567`, 2031-02-03 |"),
        ("0123456789" * 4 + "-dirty", "| `01234567` with changes, 2031-02-03 |"),
        ("", "| of no checkout, 2031-02-03 |"),
    ],
)
def test_the_page_says_of_which_revision_and_day_a_row_is(revision: str, said: str) -> None:
    records = support_matrix.read_records(support_matrix.RECORDS)
    name, record = next(iter(records.items()))
    backbone, found = next((key, value) for key, value in record["backbones"].items() if "variants" in value)
    facts = {**found["environment"], "git_revision": revision, "time": "2031-02-03T04:05:06+00:00"}
    changed = {**found, "environment": facts}
    page = support_matrix.render({name: {**record, "backbones": {backbone: changed}}})
    (row,) = (line for line in page.splitlines() if said in line)
    assert row.startswith(f"| `{backbone}` | ")


def test_a_variant_through_which_no_video_went_has_no_pass() -> None:
    records = support_matrix.read_records(support_matrix.RECORDS)
    name, record = next(iter(records.items()))
    backbone, found = next((key, value) for key, value in record["backbones"].items() if "variants" in value)
    exported = {
        **found["variants"]["onnx-fp32"],
        "top1_agreement": None,
        "min_cosine": None,
        "verified": True,
    }
    changed = {**found, "variants": {**found["variants"], "onnx-fp32": exported}}
    page = support_matrix.render({name: {**record, "backbones": {backbone: changed}}})
    assert "], not verified over videos |" in page


def test_a_variant_that_is_missing_is_said_to_be_of_another_processor_only_where_its_pair_was_built() -> None:
    records = support_matrix.read_records(support_matrix.RECORDS)
    name, record = next(iter(records.items()))
    backbone, found = next((key, value) for key, value in record["backbones"].items() if "variants" in value)
    variant = found["variants"]["onnx-fp32"]
    here = {**found, "variants": {"aoti-fp32-cpu-avx2": variant}, "not_built": {"aoti bf16": "too small"}}
    there = {**found, "variants": {"aoti-fp32-cpu-avx512": variant}, "not_built": {"trt fp8": "too big"}}
    other = next(other for other in support_matrix.BACKBONES if other not in (backbone, "mvit_v2_s"))
    page = support_matrix.render({name: {**record, "backbones": {backbone: here, other: there}}})
    rows = [line for line in page.splitlines() if line.startswith((f"| `{backbone}` | ", f"| `{other}` | "))]
    said = dict(
        line[2:].split(": ", 1) for line in page.splitlines() if line.startswith("- ") and line[3] == ":"
    )
    reasons = {
        row.split("`")[1]: [said.get(cell, "") for cell in row.rstrip(" |").split(" | ")[7:]] for row in rows
    }
    processor = "not for the processor that measured this one"
    untried = "not tried: there was no such variant at the revision that measured this one"
    assert sorted(reasons[backbone]) == sorted(["", processor, "too small", untried])
    assert sorted(reasons[other]) == sorted(["", processor, "too big", untried])


@pytest.mark.parametrize(("names", "said"), [("", "no backbone is named"), ("tiny,big", "no backbone 'big'")])
def test_a_choice_of_no_backbone_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], names: str, said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_export.main(["--backbones", names, "--out", str(tmp_path / "r.json")])
    assert ended.value.code == 2
    assert said in capfd.readouterr().err


def test_the_page_says_which_weights_a_row_has() -> None:
    records = support_matrix.read_records(support_matrix.RECORDS)
    name, record = next(iter(records.items()))
    backbone, found = next((key, value) for key, value in record["backbones"].items() if "variants" in value)
    for network in ("trained", "random"):
        one = {**record, "backbones": {backbone: {**found, "network": network}}}
        lines = support_matrix.render({name: one}).splitlines()
        (row,) = (line for line in lines if line.startswith(f"| `{backbone}` | "))
        assert row.split(" | ")[2] == network


@pytest.mark.parametrize(("text", "shown"), [("a|b", "a/b"), ("two\nlines", "two\\u000alines")])
def test_a_text_does_not_break_the_table(text: str, shown: str) -> None:
    assert support_matrix._safe(text) == shown
