"""A folder that transformers wrote becomes a bundle that runs without transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_folders import ARCHITECTURES, LABELS, write_folder

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.errors import CheckpointError, MissingDependencyError
from ivdr_deploy.export import from_hf
from ivdr_deploy.export.importing import compare_preprocessing, import_model
from ivdr_deploy.models import hf
from ivdr_deploy.results import softmax
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.serving.torchserve.archive import build_archive
from ivdr_deploy.serving.torchserve.process import serve
from ivdr_deploy.serving.torchserve.settings import EndpointSettings
from ivdr_deploy.video import open_video
from ivdr_deploy.video.clips import load_clips
from ivdr_deploy.video.sampling import place_clips, timeline

pytestmark = pytest.mark.hf

WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None
from ivdr_deploy.cli import main
main(sys.argv[1:])
"""


ONE_AND_MORE = [
    ARCHITECTURES[0],
    *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ARCHITECTURES[1:]),
]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(request.param, tmp_path_factory.mktemp("hf") / request.param)


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / folder.name
    return import_model(f"hf:{folder}", out, frame_stride=3)[0].path


@pytest.fixture
def changeable(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder("videomae", tmp_path / "model")


def test_what_the_configurations_say_is_in_the_manifest(folder: Path, bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert manifest.labels == LABELS
    assert (manifest.clip.clip_shape, manifest.clip.short_side) == ((4, 32, 32, 3), 36)
    assert manifest.clip.frame_stride == 3
    expected = {"videomae": (0.5, 0.5), "timesformer": (0.45, 0.225), "vivit": (0.75, 0.25)}
    found = (manifest.clip.mean[0], manifest.clip.std[0])
    assert found == pytest.approx(expected.get(folder.name, (manifest.clip.mean[0], manifest.clip.std[0])))
    assert manifest.model is not None
    assert manifest.model.backbone_config["model_type"] == folder.name
    card = (bundle / "MODEL_CARD.md").read_text()
    assert "frames of 480x640: ours differs from its own by 0." in card


def test_onnx_and_torch_compute_what_transformers_computes_on_its_own_clip(
    folder: Path, bundle: Path, tiny_bundle: Path
) -> None:
    import transformers

    manifest, video = open_bundle(bundle).manifest, tiny_bundle / "golden_h264.mp4"
    found = hf.ARCHITECTURES[folder.name]
    network = getattr(transformers, found.network).from_pretrained(folder).eval()
    processor = transformers.AutoVideoProcessor.from_pretrained(folder)
    with open_video(video) as reader:
        grid = timeline(reader.pts_seconds, reader.info.fps, manifest.clip)
        rows = grid[place_clips(len(grid), manifest.clip, manifest.view_plan)]
        frames = [reader.read(row.tolist()) for row in rows]
    with torch.inference_mode():
        pixels = processor(
            [torch.from_numpy(clip).permute(0, 3, 1, 2) for clip in frames], return_tensors="pt"
        )
        expected = network(**pixels).logits.numpy()
    ours = load_clips(video, manifest.clip, manifest.view_plan).video
    for variant in ("torch-fp32", "onnx-fp32"):
        opened = open_model(bundle, variant=variant)
        with opened.runtime as runtime:
            logits = runtime.infer(ours)["logits"]
        assert (logits.argmax(1) == expected.argmax(1)).all()
        np.testing.assert_allclose(logits, expected, atol=0.05 * float(expected.std()))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_onnx_agrees_with_torch_alone_and_in_a_batch(bundle: Path, count: int) -> None:
    clip = open_bundle(bundle).manifest.clip
    batch = np.random.default_rng(count).integers(0, 256, (count, *clip.clip_shape), dtype=np.uint8)
    found = {}
    for variant in ("torch-fp32", "onnx-fp32"):
        opened = open_model(bundle, variant=variant)
        with opened.runtime as runtime:
            found[variant] = runtime.infer(batch)
    for name, expected in found["torch-fp32"].items():
        np.testing.assert_allclose(found["onnx-fp32"][name], expected, atol=1e-4)


@pytest.mark.parametrize("folder", ONE_AND_MORE, indirect=True)
def test_the_bundle_runs_where_transformers_cannot_be_imported(
    bundle: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WITHOUT_TRANSFORMERS, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    video = tiny_bundle / "golden_h264.mp4"
    (tmp_path / "list.csv").write_text(f"path\n{video}\n")
    predicted = run("predict", bundle, video, "--json")
    assert predicted.returncode == 0, predicted.stderr
    assert json.loads(predicted.stdout)["predictions"][0]["label"] in LABELS
    assert run("score", bundle, tmp_path / "list.csv", "-o", tmp_path / "scores").returncode == 0
    verified = run("verify", bundle, "--variant", "onnx-fp32")
    assert (verified.returncode, "PASS" in verified.stderr) == (0, True)
    reference = run("predict", bundle, video, "--variant", "torch-fp32")
    assert (reference.returncode, "ivdr-deploy[hf]" in reference.stderr) == (6, True)


@pytest.mark.torchserve
@pytest.mark.parametrize("name", ONE_AND_MORE)
def test_the_endpoint_answers_where_transformers_cannot_be_imported(
    name: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = import_model(f"hf:{write_folder(name, tmp_path / name)}", tmp_path / "bundle")[0].path
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "transformers.py").write_text("raise ImportError('not here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    video = tiny_bundle / "golden_h264.mp4"
    with open_model(bundle).runtime as runtime:
        manifest = open_bundle(bundle).manifest
        logits = runtime.infer(load_clips(video, manifest.clip, manifest.view_plan).video)["logits"]
    archive = build_archive(bundle, model_store=tmp_path, settings=EndpointSettings()).path
    with serve(archive, run_dir=tmp_path / "run") as server:
        status, answer = server.client.predict(video)
    assert status == 200, answer
    best = LABELS[int(softmax(logits).mean(axis=0).argmax())]
    assert answer["predictions"][0]["label"] == best


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None takes a key away."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("config.json", {"model_type": "bert"}, "has the model_type 'bert'"),
        ("config.json", {"num_frames": None}, "None for 'num_frames'"),
        ("config.json", {"image_size": [32, 48]}, "for 'image_size'"),
        ("config.json", {"id2label": None}, "the key 'id2label' is missing"),
        ("config.json", {"id2label": {"0": "a", "2": "b"}}, "does not number labels from 0 on"),
        ("config.json", {"id2label": {"0": "a", "1": "a"}}, "two labels of 'id2label' are the same"),
        ("config.json", {"id2label": {"0": "a", "1": "b"}}, "do not fit|cannot be loaded|another shape"),
        ("config.json", {"hidden_size": 64}, "do not fit|cannot be loaded"),
        ("preprocessor_config.json", {"image_mean": None}, "the key 'image_mean' is missing"),
        ("preprocessor_config.json", {"resample": 3}, "resample is 3, which the contract does not express"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize is False"),
        ("preprocessor_config.json", {"do_center_crop": False}, "do_center_crop is None"),
        ("preprocessor_config.json", {"crop_size": {"height": 32, "width": 30}}, r"crop_size is \(32, 30\)"),
        ("preprocessor_config.json", {"crop_size": {"height": 24, "width": 24}}, "the network takes 32"),
        ("preprocessor_config.json", {"offset": True}, "offset is True"),
    ],
)
def test_what_is_missing_or_cannot_be_expressed_is_refused_by_name(
    changeable: Path, file: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    change_json(changeable / file, **changes)
    with pytest.raises(CheckpointError, match=said):
        import_model(f"hf:{changeable}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_exact_size_without_a_crop_is_expressed(changeable: Path) -> None:
    size = {"height": 32, "width": 32}
    change_json(changeable / "preprocessor_config.json", do_center_crop=False, size=size, crop_size=None)
    imported = from_hf.read(str(changeable), None)
    assert (imported.clip.exact_size, imported.clip.crop_size) == ((32, 32), 32)
    assert imported.own_preprocess is not None
    assert "by 0." in compare_preprocessing(imported.own_preprocess, imported.clip, enlarged=1)


@pytest.mark.parametrize("damage", ["cut", "gone", "pickle", "no json", "no folder"])
def test_damaged_folders_end_with_the_code_of_a_damaged_checkpoint(
    ivdr: Callable[..., Any], changeable: Path, damage: str, tmp_path: Path
) -> None:
    weights = changeable / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "gone":
        weights.unlink()
    elif damage == "pickle":
        weights.rename(changeable / "pytorch_model.bin")
    elif damage == "no json":
        (changeable / "config.json").write_text("{")
    else:
        shutil.rmtree(changeable)
    code, _, stderr = ivdr("import", f"hf:{changeable}", "-o", tmp_path / "out")
    assert (code, (tmp_path / "out").exists()) == (5, False), stderr


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError) as caught:
        import_model("hf:somewhere", tmp_path / "out")
    assert "ivdr-deploy[hf]" in caught.value.hint
