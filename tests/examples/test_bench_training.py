"""The benchmark of training: what it compares, and that it runs as it is called."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.demo.figures import make_figures
from examples.training import bench
from ivdr_deploy.datasets.lists import read_video_list
from train.cache import Keeping, cache_videos
from train.config_file import changed_settings
from train.optim import build_optimizer

ROOT = Path(__file__).resolve().parents[2]


def test_every_loader_feeds_the_same_batch_and_is_held_against_the_step(tmp_path: Path) -> None:
    make_figures(tmp_path / "videos", train_actors=1, test_actors=1)
    config = bench._config(tmp_path)
    assert "preset" not in "".join(changed_settings(config))
    step = bench._step(config, bf16=False)
    optimizer = build_optimizer(step.parameters(), config.optim)
    found = {
        name: bench._loader(config, keeping, step, optimizer, batch=2, turns=1)
        for name, keeping in bench.LOADERS.items()
    }
    for name, one in found.items():
        assert one["loader_over_step"] == pytest.approx(one["step_seconds"] / one["draw_seconds"]), name
        assert one["headspace"] == pytest.approx(one["loaded_step_seconds"] / one["step_seconds"]), name
    videos = read_video_list(config.data.train)
    views = []
    for keeping in (Keeping(), bench.LOADERS["straight from video"]):
        apart = replace(config, data=replace(config.data, cache=str(tmp_path / str(keeping.max_bytes))))
        with cache_videos(videos, config.clip, apart.cache_dir, keeping=keeping) as cached:
            assert cached.straight == (len(cached) if keeping.max_bytes == 0 else 0)
            drawn = bench.draw_dual_batch(
                cached, bench._batch(config, cached, 2), config, draw=bench.random_centre_clip
            )
            views.append(drawn["views"])
    assert torch.equal(*views)  # type: ignore[arg-type]


@pytest.mark.exhaustive
def test_the_benchmark_writes_its_report(tmp_path: Path) -> None:
    out = tmp_path / "training.json"
    line = [sys.executable, "-P", "-m", "examples.training.bench", "--backbone", "tiny", "--turns", "1"]
    environment = {**bench.os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*line, "--out", str(out)], env=environment, check=True, timeout=280)
    report = json.loads(out.read_text())
    names = ("step_over_fwd_bwd", "loader_over_step", "headspace", "ddp2_over_1")
    assert all(report[name] > 0 for name in names)
    assert report["loaders"].keys() == bench.LOADERS.keys()
