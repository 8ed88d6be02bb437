"""A bundle is exactly what was written, or it is refused, and the file is named."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import TINY_CLIP, TINY_LABELS, TINY_PLAN, reseal

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.manifest import MANIFEST_FILE, write_manifest
from ivdr_deploy.errors import ArtifactError
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.spec import TrainingState

VIDEOS = ["golden_h264.mp4", "golden_mpeg4.avi"]
LISTED = ["model.onnx", "model.safetensors", "golden.npz", "MODEL_CARD.md", *VIDEOS]


def test_open_bundle_reads_what_export_wrote(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    manifest = bundle.manifest
    assert (manifest.clip, manifest.view_plan, manifest.labels) == (TINY_CLIP, TINY_PLAN, TINY_LABELS)
    assert sorted(entry.path for entry in manifest.files) == sorted(LISTED)
    assert [(held.id, held.derived_from) for held in manifest.variants] == [
        ("torch-fp32", None),
        ("onnx-fp32", "torch-fp32"),
    ]
    assert manifest.reference == bundle.variant("torch-fp32")
    assert all(held.verified for held in manifest.variants)
    golden = bundle.golden()
    assert golden.video is not None
    assert golden.video.dtype == np.uint8
    assert golden.video.shape[1:] == TINY_CLIP.clip_shape
    assert {name: value.shape[1:] for name, value in golden.expected.items()} == {
        output.name: output.shape for output in manifest.outputs
    }
    assert {name: value.shape for name, value in golden.clips.items()} == dict.fromkeys(
        VIDEOS, (2, *TINY_CLIP.clip_shape)
    )


def test_unlisted_files_are_ignored(tiny_bundle_copy: Path) -> None:
    (tiny_bundle_copy / "notes.txt").write_text("mine")
    assert open_bundle(tiny_bundle_copy).manifest.name == "tiny"


@pytest.mark.parametrize("name", LISTED)
def test_one_changed_byte_is_refused_and_the_file_is_named(tiny_bundle_copy: Path, name: str) -> None:
    content = bytearray((tiny_bundle_copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tiny_bundle_copy / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name} was changed") as caught:
        open_bundle(tiny_bundle_copy)
    assert "ivdr export" in caught.value.hint


@pytest.mark.parametrize("name", LISTED)
def test_a_file_that_is_cut_short_or_missing_is_named(tiny_bundle_copy: Path, name: str) -> None:
    content = (tiny_bundle_copy / name).read_bytes()
    (tiny_bundle_copy / name).write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=rf"{name} has {len(content) - 1} bytes"):
        open_bundle(tiny_bundle_copy)
    (tiny_bundle_copy / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name} is listed in the manifest, but missing"):
        open_bundle(tiny_bundle_copy)


def test_what_is_no_bundle_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, what in [
        (tmp_path, "a folder without"),
        (tmp_path / "file", "not a folder"),
        (tmp_path / "x", "absent"),
    ]:
        with pytest.raises(ArtifactError, match=what):
            open_bundle(path)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd"])
def test_a_listed_path_outside_the_bundle_is_refused(tiny_bundle_copy: Path, path: str) -> None:
    manifest = open_bundle(tiny_bundle_copy).manifest
    document = replace(manifest.entry("MODEL_CARD.md"), path=path)
    others = tuple(entry for entry in manifest.files if entry.path != "MODEL_CARD.md")
    write_manifest(tiny_bundle_copy, replace(manifest, files=(document, *others)))
    with pytest.raises(ArtifactError, match="outside the bundle"):
        open_bundle(tiny_bundle_copy)


def test_an_absent_variant_is_named_with_those_there_are(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    assert bundle.variant_file(bundle.variant("onnx-fp32")) == tiny_bundle / "model.onnx"
    assert bundle.variant_file(bundle.variant("torch-fp32")) == tiny_bundle / "model.safetensors"
    with pytest.raises(
        ArtifactError, match=r"no variant 'trt-fp32'; its variants are: 'torch-fp32', 'onnx-fp32'"
    ) as caught:
        bundle.variant("trt-fp32")
    assert "`ivdr export BUNDLE --engine trt --precision" in caught.value.hint  # -o would replace the bundle
    with pytest.raises(ArtifactError) as caught:
        bundle.variant("x" * 10_000)
    assert len(caught.value.message) < 400


def test_serving_files_are_a_bundle_of_one_variant(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    copied = bundle.copy_serving_files(tmp_path, bundle.variant("onnx-fp32"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {MANIFEST_FILE, *LISTED} - {"model.safetensors"}
    )
    assert open_bundle(tmp_path) == copied
    assert copied.manifest.variants == (bundle.variant("onnx-fp32"),)
    assert copied.manifest.reference is None
    whole = bundle.manifest
    assert replace(copied.manifest, files=whole.files, variants=whole.variants) == whole
    served, original = open_model(tmp_path), open_model(tiny_bundle)
    assert served.variant == "onnx-fp32"
    assert served.golden_max_abs_diff == original.golden_max_abs_diff
    assert served.decode_mean_diff == original.decode_mean_diff != {}


def test_a_bundle_without_anything_golden_opens_and_proves_nothing(tiny_bundle_copy: Path) -> None:
    """Legal for imported models."""
    for name in ("golden.npz", *VIDEOS):
        (tiny_bundle_copy / name).unlink()
    reseal(tiny_bundle_copy)
    golden = open_bundle(tiny_bundle_copy).golden()
    assert (golden.video, golden.expected, golden.clips) == (None, {}, {})
    model = open_model(tiny_bundle_copy)
    assert (model.golden_max_abs_diff, model.decode_mean_diff) == ({}, {})
    assert model.runtime.infer(np.zeros((1, *TINY_CLIP.clip_shape), np.uint8))["logits"].shape == (1, 6)


def test_stale_outputs_are_those_whose_head_the_backbone_left_behind(tiny_bundle: Path) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    assert manifest.stale_outputs == ()
    moved_on = TrainingState(backbone_step=2, head_steps={"classifier": 2, "series_head": 1})
    assert replace(manifest, training=moved_on).stale_outputs == ("inter", "intra")
    assert replace(manifest, training=None).stale_outputs == ()  # an imported model has no such state


def test_a_moved_bundle_is_the_same_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(tiny_bundle, tmp_path / "elsewhere"))
    assert open_bundle(moved).manifest == open_bundle(tiny_bundle).manifest
