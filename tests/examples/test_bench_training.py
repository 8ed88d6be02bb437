"""The benchmark of training: what it compares, and that it runs as it is called."""

import json
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from examples.demo.figures import make_figures
from examples.training import bench
from ivdr_deploy.environment import instruction_sets

ROOT = Path(__file__).resolve().parents[2]


def test_every_loader_feeds_the_same_batch_as_frames_as_it_says(tmp_path: Path) -> None:
    make_figures(tmp_path / "videos", train_actors=1, test_actors=1)
    config = bench._config(tmp_path, "tiny")
    with ExitStack() as opened:
        found = {
            name: bench._Loader(config, keeping, tmp_path / name, 2, opened)
            for name, keeping in bench.LOADERS.items()
        }
        views = {name: loader.draw()["views"] for name, loader in found.items()}
        assert torch.equal(views["jpeg"], views["straight from video"])
        assert not torch.equal(views["jpeg"], views["raw"])
        far = (views["jpeg"].float() - views["raw"].float()).abs().mean()
        assert far < 2.5
        for name, loader in found.items():
            for _ in range(2):
                assert torch.equal(next(loader.drawn)["views"], views[name])


def test_nothing_is_drawn_ahead_while_something_else_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the pure forward and backward pass would seem slower than it is, and a whole step no slower than that."""
    make_figures(tmp_path / "videos", train_actors=1, test_actors=1)
    config = bench._config(tmp_path, "tiny")
    slow, drawing, taken = threading.Event(), threading.Lock(), []

    def draw(loader: bench._Loader) -> dict[str, int]:
        with drawing:
            slow.wait(0.2)
            return {}

    def other() -> None:
        taken.append(drawing.acquire(blocking=False))
        drawing.release()

    monkeypatch.setattr(bench._Loader, "draw", draw)
    with ExitStack() as opened:
        loader = bench._Loader(config, bench.LOADERS["raw"], tmp_path / "raw", 2, opened)
        bench._alternately({"loader": loader.take, "other": other}, turns=2, rest=loader.rest)
        slow.set()
    assert taken == [True] * 3


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
    gain = report["bf16_over_fp32"]
    assert gain > 0 if "bf16" in instruction_sets() else gain == bench.NO_BF16
