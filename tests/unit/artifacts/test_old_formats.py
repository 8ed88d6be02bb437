"""What an older version wrote opens for ever: one small checkpoint and bundle of each, see ``data/make_formats.py``."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from ivdr_deploy.artifacts.bundle import changed_bundle, open_bundle
from ivdr_deploy.artifacts.checkpoint import read_checkpoint_info
from ivdr_deploy.artifacts.former import upgrade_manifest
from ivdr_deploy.artifacts.manifest import DIGEST_KEY, MANIFEST_FILE, ArtifactManifest, read_manifest
from ivdr_deploy.errors import ArtifactError, CheckpointError
from ivdr_deploy.records import from_dict
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.spec import FORMAT_VERSION, ClipSpec, ModelSpec, TrainingState, ViewPlan, canonical_json

FORMATS = sorted((Path(__file__).parents[2] / "data" / "formats").glob("v*.zip"))
CLIP = ClipSpec(num_frames=4, frame_stride=2, short_side=36, crop_size=32)
PLAN = ViewPlan(num_clips=3)
MODEL = ModelSpec(backbone="tiny", num_slots=2, slot_dim=4, clip_dim=4, num_classes=4)
LABELS = ("bow", "jump", "sit", "stand")
TRAINING = TrainingState(
    backbone_step=7, head_steps=dict.fromkeys(("clip_head", "series_head", "classifier"), 7)
)
OUTPUTS = ("logits", "feature", "inter", "intra")


def unpack(archive: Path, folder: Path) -> Path:
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
    return folder


@pytest.fixture(scope="module", params=FORMATS, ids=lambda path: path.stem)
def former(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``checkpoint.safetensors`` and ``bundle``."""
    return unpack(request.param, tmp_path_factory.mktemp(request.param.stem))


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The bundle of version 1, to be changed."""
    return unpack(FORMATS[0], tmp_path) / "bundle"


def test_there_is_one_of_every_format_version() -> None:
    assert [path.stem for path in FORMATS] == [f"v{number}" for number in range(1, FORMAT_VERSION + 1)]
    assert sum(path.stat().st_size for path in FORMATS) < 150_000 * len(FORMATS)


def test_a_checkpoint_says_what_it_said(former: Path) -> None:
    info = read_checkpoint_info(former / "checkpoint.safetensors")
    assert (info.clip, info.view_plan, info.model, info.labels) == (CLIP, PLAN, MODEL, LABELS)
    assert info.training == TRAINING
    assert info.training.valid_outputs() == OUTPUTS


def test_a_bundle_says_what_it_said(former: Path) -> None:
    bundle = open_bundle(former / "bundle")
    manifest = bundle.manifest
    assert (manifest.name, manifest.version, manifest.labels) == ("formats", "1.0", LABELS)
    assert (manifest.clip, manifest.view_plan, manifest.model) == (CLIP, PLAN, MODEL)
    assert manifest.contract_hash == CLIP.contract_hash
    assert (manifest.training, manifest.stale_outputs) == (TRAINING, ())
    shapes = {"logits": (4,), "feature": (96,), "inter": (4,), "intra": (2, 4)}
    assert {output.name: output.shape for output in manifest.outputs} == shapes
    reference, exported = bundle.variant("torch-fp32"), bundle.variant("onnx-fp32")
    assert len(manifest.variants) == 2
    assert manifest.reference == reference
    assert (reference.id, reference.runtime, reference.derived_from) == ("torch-fp32", "torch", None)
    assert (exported.id, exported.runtime, exported.derived_from) == (
        "onnx-fp32",
        "onnxruntime",
        "torch-fp32",
    )
    assert (reference.precision, exported.precision) == ("fp32", "fp32")
    assert (reference.files, exported.files) == (("model.safetensors",), ("model.onnx",))
    assert (reference.parity, [entry.output for entry in exported.parity]) == ((), list(OUTPUTS))
    assert all(0 <= entry.max_abs_diff < 1e-5 < 1e-4 <= entry.tolerance for entry in exported.parity)
    assert reference.verified
    assert exported.verified


def test_a_bundle_replays_its_golden_clips_on_each_variant(former: Path) -> None:
    golden = open_bundle(former / "bundle").golden()
    assert golden.video is not None
    assert golden.video.shape == (2, *CLIP.clip_shape)
    for variant in ("torch-fp32", "onnx-fp32"):
        model = open_model(former / "bundle", variant=variant)
        with model.runtime as runtime:
            assert (model.clip, model.view_plan, model.labels) == (CLIP, PLAN, LABELS)
            assert set(model.golden_max_abs_diff) == set(OUTPUTS)
            assert set(model.decode_mean_diff) == set(golden.clips)
            found = runtime.infer(golden.video)
        for name, expected in golden.expected.items():
            np.testing.assert_allclose(found[name], expected, atol=1e-5)
            assert np.abs(expected).max() > 1e-2  # there is something to compare


def test_a_checkpoint_and_an_onnx_file_open_by_themselves(former: Path) -> None:
    golden = open_bundle(former / "bundle").golden()
    for name, variant in (("checkpoint.safetensors", "torch-fp32"), ("bundle/model.onnx", "onnx-fp32")):
        model = open_model(former / name, expected_contract=CLIP)
        with model.runtime as runtime:
            assert (model.variant, model.view_plan, model.labels) == (variant, PLAN, LABELS)
            assert model.output_names == OUTPUTS
            found = runtime.infer(golden.video)
        np.testing.assert_allclose(found["logits"], golden.expected["logits"], atol=1e-5)


def test_a_former_bundle_can_be_changed_and_is_of_the_present_format_then(
    former: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(former / "bundle", tmp_path / "bundle"))
    with changed_bundle(open_bundle(folder)):
        pass
    assert json.loads((folder / MANIFEST_FILE).read_text())["format_version"] == FORMAT_VERSION
    changed, original = open_bundle(folder).manifest, open_bundle(former / "bundle").manifest
    assert (changed.variants, changed.clip, changed.view_plan) == (original.variants, CLIP, PLAN)
    open_model(folder).runtime.close()


def values_of(folder: Path) -> dict:
    return json.loads((folder / MANIFEST_FILE).read_text())


def sealed(values: dict) -> str:
    import hashlib

    content = {key: value for key, value in values.items() if key != DIGEST_KEY}
    return json.dumps({**content, DIGEST_KEY: hashlib.sha256(canonical_json(content).encode()).hexdigest()})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda values: values.update(contract_hash="0" * 64),
            "hash '000000000000' is not that of the contract",
        ),
        (lambda values: values.update(contract_hash=CLIP.contract_hash), "is not that of the contract"),
        (lambda values: values["clip"].update(num_clips=4), "is not that of the contract"),
        (lambda values: values["clip"].update(exact_size=[128, 171]), "short_side is 36 and exact_size"),
        (lambda values: values.update(clip=[]), "clip is list, expected a table"),
        (lambda values: values.pop("files"), "files: expected a list"),
        (lambda values: values.update(files=[3]), "files"),
        (lambda values: values.update(files=[{"path": 3}]), "path: expected str"),
        (lambda values: values.update(parity=[{"runtime": "torch"}]), "'precision' is missing"),
        (lambda values: values.update(parity=3), "parity: expected a list"),
        (lambda values: values["files"][0].update(runtime=None), "expected one of 'torch'"),
        (lambda values: values["files"].append(values["files"][0]), "two variants have the same id"),
    ],
)
def test_a_former_manifest_that_contradicts_itself_is_refused(first: Path, change, reason: str) -> None:
    values = values_of(first)
    change(values)
    with pytest.raises(ArtifactError) as caught:
        read_manifest(sealed(values), where="manifest.json")
    assert reason in caught.value.message
    with pytest.raises(ArtifactError, match="was changed after it was written"):
        read_manifest(json.dumps(values), where="manifest.json")


def test_a_former_plan_keeps_its_sidecar_and_runs_on_a_gpu_only(first: Path) -> None:
    values = values_of(first)
    values.pop(DIGEST_KEY)
    entry = values["files"][0]
    plan = {**entry, "path": "model.fp32.engine", "runtime": "tensorrt"}
    sidecar = {
        **entry,
        "path": "model.fp32.engine.json",
        "kind": "sidecar",
        "runtime": None,
        "precision": None,
    }
    values["files"] += [plan, sidecar]
    manifest = from_dict(ArtifactManifest, upgrade_manifest(values, where="m"), where="m")
    (variant,) = [held for held in manifest.variants if held.runtime == "tensorrt"]
    assert (variant.id, variant.derived_from) == ("trt-fp32", "onnx-fp32")
    assert variant.files == ("model.fp32.engine", "model.fp32.engine.json")
    assert variant.target.device == "cuda"
    assert not variant.verified  # it was never run where it was built


def test_a_former_onnx_file_with_another_contract_is_refused(first: Path, tmp_path: Path) -> None:
    proto = onnx.load(first / "model.onnx")
    for entry in proto.metadata_props:
        if entry.key == "ivdr.contract":
            entry.value = entry.value.replace('"frame_stride":2', '"frame_stride":4')
    onnx.save(proto, tmp_path / "changed.onnx")
    with pytest.raises(ArtifactError, match="is not that of the contract"):
        open_model(tmp_path / "changed.onnx")


def test_a_later_format_is_refused_by_name(first: Path) -> None:
    values = values_of(first)
    values["format_version"] = FORMAT_VERSION + 1
    with pytest.raises(ArtifactError, match=f"format version {FORMAT_VERSION + 1}, this ivdr reads 1 to"):
        read_manifest(sealed(values), where="manifest.json")
    checkpoint = first.parent / "checkpoint.safetensors"
    data = checkpoint.read_bytes()
    old, new = rb"\"format_version\":1", rb"\"format_version\":9"
    assert old in data
    checkpoint.write_bytes(data.replace(old, new))
    with pytest.raises(CheckpointError, match="format version 9, this ivdr reads 1 to"):
        read_checkpoint_info(checkpoint)
