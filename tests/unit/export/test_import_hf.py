"""A folder that transformers wrote becomes a bundle that runs without transformers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_folders import ARCHITECTURES, LABELS, write_folder

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.export import from_hf
from ivdr_deploy.export.importing import import_model
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


def test_what_the_configurations_say_is_in_the_manifest(folder: Path, bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert manifest.labels == LABELS
    assert (manifest.clip.clip_shape, manifest.clip.short_side) == ((4, 32, 32, 3), 36)
    assert manifest.clip.frame_stride == 3
    card = (bundle / "MODEL_CARD.md").read_text()
    assert re.search(r"^- frame stride: 3, as was asked for at import, instead of \d+$", card, re.MULTILINE)
    assert "as published" not in card
    expected = {"videomae": (0.5, 0.5), "timesformer": (0.45, 0.225), "vivit": (0.75, 0.25)}
    found = (manifest.clip.mean[0], manifest.clip.std[0])
    assert found == pytest.approx(expected.get(folder.name, (manifest.clip.mean[0], manifest.clip.std[0])))
    assert manifest.model is not None
    assert manifest.model.backbone_config["model_type"] == folder.name
    card = (bundle / "MODEL_CARD.md").read_text()
    assert "frames of 480x640: ours differs from its own by 0." in card


def test_a_clip_spans_as_much_of_the_video_as_those_that_the_weights_were_trained_on(folder: Path) -> None:
    """The configuration does not say it; as published: 16 frames 4 apart, 8 of 32, 32 of 2, and 64 of 2."""
    span = {"videomae": 16 * 4, "timesformer": 8 * 32, "vivit": 32 * 2, "vjepa2": 64 * 2}[folder.name]
    clip = from_hf.read(str(folder), None).clip
    assert (clip.num_frames, clip.frame_stride) == (4, span // 4)


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
    before = os.environ.get("PYTHONPATH")  # where the tests of a checkout find the package, if they do
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "path"), *([before] if before else [])]))
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
