import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from bundles import TINY_CLIP, TINY_LABELS, keep_variants, reseal
from full_disk import run_on_full_disk

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.checkpoint import load_checkpoint, read_checkpoint_info, save_checkpoint
from ivdr_deploy.artifacts.golden import GOLDEN_PLAN
from ivdr_deploy.errors import CheckpointError, ConfigError, ExportError, FolderError, ParityError
from ivdr_deploy.export.bundle_export import choose_outputs, export_bundle
from ivdr_deploy.models.network import build_model
from ivdr_deploy.runtimes import compare
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.spec import CheckpointInfo, ModelSpec, TrainingState
from ivdr_deploy.video.clips import load_clips


def info_with(**head_steps: int) -> CheckpointInfo:
    return CheckpointInfo(
        clip=TINY_CLIP,
        model=ModelSpec(backbone="tiny", num_classes=len(TINY_LABELS)),
        labels=TINY_LABELS,
        training=TrainingState(backbone_step=20, head_steps=head_steps),
    )


def test_the_manifest_says_what_was_trained_and_what_was_measured(bundle: Path, checkpoint: Path) -> None:
    manifest = open_bundle(bundle).manifest
    info = read_checkpoint_info(checkpoint)
    assert (manifest.clip, manifest.model, manifest.labels) == (info.clip, info.model, info.labels)
    assert (manifest.view_plan, manifest.training) == (info.view_plan, info.training)
    reference, exported = manifest.variants
    assert (reference.id, reference.derived_from, reference.parity) == ("torch-fp32", None, ())
    assert (exported.id, exported.derived_from, exported.verified) == ("onnx-fp32", "torch-fp32", True)
    assert [entry.output for entry in exported.parity] == ["logits", "feature"]
    assert all(0 < entry.max_abs_diff <= 1e-4 <= entry.tolerance for entry in exported.parity)
    assert all(entry.min_cosine > 0.99999 for entry in exported.parity)
    assert (manifest.provenance.git_revision, manifest.provenance.seed) == ("abc123", 7)
    assert manifest.provenance.packages["torch"] == "1.0"  # of the training
    assert manifest.provenance.packages["export:torch"] == torch.__version__
    assert manifest.provenance.packages["export:av"] == av.__version__


def test_the_bundle_holds_the_checkpoint_itself_and_what_it_gives(bundle: Path, checkpoint: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.variant_file(opened.variant("torch-fp32")).read_bytes() == checkpoint.read_bytes()
    golden = opened.golden()
    loaded = load_checkpoint(checkpoint)
    np.testing.assert_array_equal(golden.video, loaded.golden)
    with torch.inference_mode():
        outputs = loaded.model(torch.from_numpy(golden.video))
    assert set(golden.expected) == {"logits", "feature"}
    for name, value in golden.expected.items():
        np.testing.assert_allclose(value, outputs[name].numpy(), atol=1e-6)


def test_the_golden_videos_are_there_with_the_clips_that_this_contract_makes_of_them(bundle: Path) -> None:
    clips = open_bundle(bundle).golden().clips
    assert set(clips) == {"golden_h264.mp4", "golden_mpeg4.avi"}
    for name, recorded in clips.items():
        assert np.array_equal(load_clips(bundle / name, TINY_CLIP, GOLDEN_PLAN).video, recorded)
        assert recorded.std() > 20  # there is something to see
    assert not np.array_equal(*clips.values())


def test_the_model_card_tells_what_was_measured(bundle: Path) -> None:
    card = (bundle / "MODEL_CARD.md").read_text()
    manifest = open_bundle(bundle).manifest
    for fact in [
        "# lively 1.0",
        manifest.contract_hash,
        "[N, 4, 32, 32, 3]",
        f"{manifest.variants[1].parity[0].max_abs_diff:.1e}",
        "From a video: 2 clips, centre crop",
        "the reference is `torch-fp32`",
        "Over 4 golden clips",
        "video_accuracy: 0.75",
        "abc123",
        '"steps": 20',
        "6 labels: bow, jump",
    ]:
        assert fact in card
    assert "stale" not in card
    assert "Not verified" not in card


@pytest.mark.parametrize(
    ("head_steps", "include_stale", "expected"),
    [
        ({"classifier": 20, "series_head": 20}, False, ("logits", "feature", "inter", "intra")),
        ({"classifier": 20, "series_head": 10}, False, ("logits", "feature")),
        ({"classifier": 20, "series_head": 10}, True, ("logits", "feature", "inter", "intra")),
        ({"series_head": 20}, False, ("feature", "inter", "intra")),
        ({"series_head": 20}, True, ("feature", "inter", "intra")),  # the classifier was never trained
        ({}, True, ("feature",)),
    ],
)
def test_only_heads_that_fit_the_backbone_are_exported(head_steps, include_stale, expected) -> None:
    assert choose_outputs(info_with(**head_steps), include_stale=include_stale) == expected


def test_a_stale_head_is_exported_on_request_and_marked_over_an_older_bundle(
    bundle: Path, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(bundle, tmp_path / "again"))
    before = open_bundle(target).manifest
    # The bundle's own copy of the checkpoint is as good as the original, though its folder is being replaced.
    exported = export_bundle(
        target / "model.safetensors", target, name="lively", version="1.1", include_stale=True
    )
    assert exported.manifest.output_names == ("logits", "feature", "inter", "intra")
    assert exported.manifest.training.valid_outputs() == ("logits", "feature")
    assert exported.manifest.version == "1.1" != before.version
    assert "**stale**" in (target / "MODEL_CARD.md").read_text()
    model = open_model(target)
    assert set(model.golden_max_abs_diff) == {"logits", "feature", "inter", "intra"}
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_a_model_that_computes_something_else_is_not_written(
    checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(compare.TOLERANCE, "fp32", 1e-12)  # no export is that exact
    target = Path(shutil.copytree(bundle, tmp_path / "old"))
    with pytest.raises(ParityError, match=r"onnxruntime .* logits differs by .* \(tolerance .*e-1.\)"):
        export_bundle(checkpoint, target)
    monkeypatch.undo()
    assert open_bundle(target).manifest == open_bundle(bundle).manifest
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_diverged_network_is_not_exported(checkpoint: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    with torch.no_grad():
        loaded.model.classifier.linear.bias[0] = float("nan")
    broken = tmp_path / "broken.safetensors"
    save_checkpoint(broken, model=loaded.model, info=loaded.info, golden=loaded.golden)
    with pytest.raises(ExportError, match="NaN or infinity in logits"):
        export_bundle(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_not_a_bundle_is_never_replaced(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    shutil.copytree(bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / "notes.txt").write_text("mine")
    for name, reason in [
        ("file", "exists and is a file"),
        ("folder", "exists and is not a bundle"),
        ("bundle", r"files that are not the bundle's: 'notes\.txt'"),
    ]:
        with pytest.raises(FolderError, match=reason):
            export_bundle(checkpoint, tmp_path / name)
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "mine"
    assert (tmp_path / "bundle" / "notes.txt").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of files there")
@pytest.mark.parametrize("what", ["golden.npz", "model.onnx"])
def test_a_full_disk_is_named_by_its_folder_and_the_older_bundle_stays(
    checkpoint: Path, bundle: Path, tmp_path: Path, what: str
) -> None:
    older = open_bundle(shutil.copytree(bundle, tmp_path / "bundle"))
    found = run_on_full_disk(
        f"export_bundle({str(checkpoint)!r}, {str(older.path)!r})",
        limit=(bundle / what).stat().st_size - 1,
        before="from ivdr_deploy.export.bundle_export import export_bundle\nimport torch.onnx\nfill()",
    )
    assert found == (9, f"ivdr: {tmp_path}: File too large")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert open_bundle(older.path) == older


def test_a_folder_that_may_not_be_written_is_named_before_any_work_is_done(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can be somebody else")
    own = Path(tempfile.gettempdir())
    for folder in (tmp_path, *tmp_path.parents):
        if folder != own and folder.is_relative_to(own):
            folder.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError) as caught:
            export_bundle(tmp_path / "absent.safetensors", tmp_path / "out")
    finally:
        os.seteuid(0)
    assert caught.value.filename == str(tmp_path)


@pytest.mark.parametrize("name", ["with space", "a/b", "-x", "été"])
def test_a_name_that_cannot_be_served_is_refused(checkpoint: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"name .* cannot be served"):
        export_bundle(checkpoint, tmp_path / "out", name=name)
    with pytest.raises(ConfigError, match=r"version .* cannot be served"):
        export_bundle(checkpoint, tmp_path / "out", version=name)


def test_an_absent_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors"):
        export_bundle(tmp_path / "nothing.safetensors", tmp_path / "out")


def test_labels_stay_behind_when_the_classifier_does(bundle: Path) -> None:
    info = replace(info_with(series_head=20))
    assert "logits" not in choose_outputs(info, include_stale=False)


def test_a_network_without_slots_or_clip_head_becomes_a_bundle(checkpoint: Path, tmp_path: Path) -> None:
    """What an imported classifier is: no dual representation, and no golden clips once it is exported."""
    labels = ("walk", "run")
    spec = ModelSpec(backbone="tiny", num_slots=0, clip_dim=0, num_classes=2)
    info = CheckpointInfo(
        clip=TINY_CLIP, model=spec, labels=labels, training=TrainingState(head_steps={"classifier": 0})
    )
    source = tmp_path / "bare.safetensors"
    golden = load_checkpoint(checkpoint).golden
    save_checkpoint(source, model=build_model(spec, TINY_CLIP), info=info, golden=golden)
    bundle = export_bundle(source, tmp_path / "bare")
    assert bundle.manifest.output_names == ("logits", "feature")
    for variant in ("torch-fp32", "onnx-fp32"):
        model = open_model(bundle.path, variant=variant)
        assert model.labels == labels
        assert set(model.golden_max_abs_diff) == {"logits", "feature"}
        assert model.runtime.infer(golden)["logits"].shape == (len(golden), 2)
    keep_variants(bundle.path, "onnx-fp32")
    (bundle.path / "golden.npz").unlink()
    for name in model.decode_mean_diff:
        (bundle.path / name).unlink()
    reseal(bundle.path, model=None, training=None)
    imported = open_model(bundle.path)
    assert (imported.variant, imported.golden_max_abs_diff) == ("onnx-fp32", {})
    assert open_bundle(bundle.path).manifest.stale_outputs == ()
