import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import TINY_CLIP, TINY_LABELS, reseal

from ivdr_deploy.artifacts.bundle import (
    GOLDEN_FILE,
    MANIFEST_FILE,
    open_bundle,
    read_manifest,
    stale_outputs,
    write_manifest,
)
from ivdr_deploy.errors import ArtifactError
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.spec import TrainingState

LISTED = ["model.onnx", "model.safetensors", "golden.npz", "MODEL_CARD.md"]


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def edit_manifest(folder: Path, change) -> None:
    """Change the JSON of a manifest and leave its digest as it was."""
    values = json.loads((folder / MANIFEST_FILE).read_text())
    change(values)
    (folder / MANIFEST_FILE).write_text(json.dumps(values))


def test_open_bundle_reads_what_export_wrote(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    assert bundle.manifest.clip == TINY_CLIP
    assert bundle.manifest.labels == TINY_LABELS
    assert sorted(entry.path for entry in bundle.manifest.files) == sorted(LISTED)
    video, expected = bundle.golden()
    assert video.dtype == np.uint8
    assert video.shape[1:] == TINY_CLIP.clip_shape
    assert {name: value.shape[1:] for name, value in expected.items()} == {
        output.name: output.shape for output in bundle.manifest.outputs
    }


def test_unlisted_files_are_ignored(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    assert open_bundle(folder).manifest.name == "tiny"


@pytest.mark.parametrize("name", LISTED)
def test_one_changed_byte_is_refused_and_the_file_is_named(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name} was changed") as caught:
        open_bundle(folder)
    assert "ivdr export" in caught.value.hint


@pytest.mark.parametrize("name", LISTED)
def test_a_file_that_is_cut_short_or_missing_is_named(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=rf"{name} has {len(content) - 1} bytes"):
        open_bundle(folder)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name} is listed in the manifest, but missing"):
        open_bundle(folder)


def test_no_changed_byte_of_the_manifest_changes_what_is_read(tiny_bundle: Path) -> None:
    content = (tiny_bundle / MANIFEST_FILE).read_bytes()
    original = read_manifest(content, where="m")
    accepted = 0
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        try:
            manifest = read_manifest(bytes(changed), where="m")
        except ArtifactError:
            continue
        accepted += 1
        assert manifest == original
    assert accepted < len(content) / 10  # a digit of the layout at most, never one of the content


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["labels"].reverse(),
        lambda values: values["clip"].update(frame_stride=3),
        lambda values: values.update(contract_hash="0" * 64),
        lambda values: values["files"].pop(),
        lambda values: values.pop("manifest_sha256"),
    ],
    ids=["labels", "contract", "hash", "files", "digest"],
)
def test_an_edited_manifest_is_refused(folder: Path, change) -> None:
    edit_manifest(folder, change)
    with pytest.raises(ArtifactError, match=r"manifest\.json was changed after it was written"):
        open_bundle(folder)


def test_another_format_version_says_which_one_is_read(folder: Path) -> None:
    edit_manifest(folder, lambda values: values.update(format_version=99, invented_later=1))
    with pytest.raises(ArtifactError, match="format version 99, this ivdr reads 1"):
        open_bundle(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"name": "a web app"}'])
def test_something_else_called_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        open_bundle(tmp_path)


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
def test_a_listed_path_outside_the_bundle_is_refused(folder: Path, path: str) -> None:
    manifest = open_bundle(folder).manifest
    first = replace(manifest.files[0], path=path)
    write_manifest(folder, replace(manifest, files=(first, *manifest.files[1:])))
    with pytest.raises(ArtifactError, match="outside the bundle"):
        open_bundle(folder)


def test_golden_clips_are_never_unpickled(folder: Path) -> None:
    np.savez(folder / GOLDEN_FILE, video=np.array([object()], dtype=object))
    reseal(folder)
    with pytest.raises(ArtifactError, match=r"golden\.npz cannot be read"):
        open_bundle(folder).golden()


def test_golden_clips_must_cover_every_output(folder: Path) -> None:
    video, expected = open_bundle(folder).golden()
    del expected["intra"]
    np.savez(folder / GOLDEN_FILE, video=video, **expected)
    reseal(folder)
    with pytest.raises(ArtifactError, match=r"expected .*'intra'"):
        open_bundle(folder).golden()


def test_model_file_names_what_there_is(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    assert bundle.model_file("onnxruntime") == tiny_bundle / "model.onnx"
    assert bundle.model_file("torch") == tiny_bundle / "model.safetensors"
    with pytest.raises(
        ArtifactError, match=r"no fp32 model for tensorrt; .* onnxruntime fp32, torch fp32"
    ) as caught:
        bundle.model_file("tensorrt")
    assert "--trt" in caught.value.hint
    with pytest.raises(ArtifactError, match="no int8 model"):
        bundle.model_file("onnxruntime", "int8")


def test_serving_files_are_a_bundle_of_one_model(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    copied = bundle.copy_serving_files(tmp_path, runtime="onnxruntime")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["MODEL_CARD.md", "golden.npz", "manifest.json", "model.onnx"]
    )
    assert open_bundle(tmp_path) == copied
    assert replace(copied.manifest, files=bundle.manifest.files) == bundle.manifest
    assert open_model(tmp_path).golden_max_abs_diff == open_model(tiny_bundle).golden_max_abs_diff


def test_stale_outputs_are_those_whose_head_the_backbone_left_behind(tiny_bundle: Path) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    assert stale_outputs(manifest) == []
    moved_on = TrainingState(backbone_step=2, head_steps={"classifier": 2, "series_head": 1})
    assert stale_outputs(replace(manifest, training=moved_on)) == ["inter", "intra"]
