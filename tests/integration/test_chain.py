"""The whole chain on a few made videos: train, fine-tune, export with a TensorRT plan, verify, predict, score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.demo.figures import ACTIONS, make_figures
from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.cli import main as ivdr
from ivdr_deploy.errors import DeviceError, EngineIncompatibleError
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.runtimes.registry import misfit
from ivdr_deploy.scoring import read_scores
from train.__main__ import main as train

SMALL = (
    "clip.num_frames=4",
    "view_plan.num_clips=2",
    "clip.short_side=36",
    "clip.crop_size=32",
    "optim.epochs=1",
    "optim.warmup_epochs=0",
    "optim.batch_size=6",
)


def run(*arguments: object) -> int:
    try:
        ivdr([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned checkpoint with every head valid, its data beside it."""
    folder = tmp_path_factory.mktemp("chain")
    make_figures(folder / "data", train_actors=2, test_actors=1)
    shared = [*SMALL, f"data.train={folder / 'data' / 'train.csv'}", f"data.cache={folder / 'cache'}"]
    configs = "train/configs"
    assert (
        train(["pretrain", "--config", f"{configs}/demo_pretrain.toml", *shared, f"out={folder / 'pre'}"])
        == 0
    )
    init = f"init={folder / 'pre' / 'checkpoint.safetensors'}"
    assert (
        train(["finetune", "--config", f"{configs}/demo_joint.toml", *shared, init, f"out={folder / 'ft'}"])
        == 0
    )
    return folder / "ft" / "checkpoint.safetensors"


@pytest.mark.trt
@pytest.mark.slow
def test_from_training_to_a_verified_bundle_with_a_plan_and_a_score_table(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = checkpoint.parents[1] / "data" / "test.csv"
    bundle = tmp_path / "bundle"
    assert run("export", checkpoint, "-o", bundle, "--trt") == 0
    manifest = open_bundle(bundle).manifest
    assert manifest.output_names == ("logits", "feature", "inter", "intra")
    assert manifest.labels == tuple(sorted(ACTIONS))
    (plan,) = (variant for variant in manifest.variants if variant.runtime == "tensorrt")
    assert manifest.entry(plan.files[0]).size_bytes > 100_000  # a real plan holds the weights
    reason = misfit(plan, "cuda")
    if reason:  # no GPU that it is for: it says so, and is not judged
        with pytest.raises((EngineIncompatibleError, DeviceError), match=r"driver|GPU|CUDA"):
            open_model(bundle, variant=plan.id)
        assert run("verify", bundle, "--data", data) == 1
    else:
        open_model(bundle, variant=plan.id).runtime.close()
    judged = [
        word
        for variant in manifest.variants
        if not (variant is plan and reason)
        for word in ("--variant", variant.id)
    ]
    assert run("verify", bundle, "--data", data, *judged) == 0
    capsys.readouterr()
    videos = sorted((data.parent).glob("*/actor02.mp4"))
    assert run("predict", bundle, *videos, "--json", "--top-k", 1) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    predicted = {Path(line["uri"]).parent.name: line["predictions"][0]["label"] for line in lines}
    assert len(predicted) == len(ACTIONS)
    assert (
        run("score", bundle, data, "-o", tmp_path / "scores", "--output", "inter", "--output", "intra") == 0
    )
    rows = read_scores(tmp_path / "scores").to_pylist()
    assert {row["label"]: row["labels"][0] for row in rows} == predicted
    assert all(len(row["intra"]) == 2 and len(row["intra"][0]) == 2 for row in rows)  # clips, slots
    assert all(abs(sum(x * x for x in row["inter"]) - 1) < 1e-4 for row in rows)
