"""``python -m examples.training.bench``: how fast training runs. Needs a machine on which nothing else runs.

Turns of what is compared alternate, and the medians of their times are divided.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from examples.demo.figures import make_figures
from examples.training.methods import CONFIGS
from ivdr_deploy._console import console, exiting
from ivdr_deploy._files import atomic_path, scratch_folder
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.environment import environment_facts, instruction_sets
from ivdr_deploy.errors import TrainingError
from ivdr_deploy.models.network import build_model
from ivdr_deploy.spec import ClipSpec, ModelSpec
from ivdr_deploy.video.sampling import random_centre_clip
from train.cache import CachedVideos, Keeping, cache_videos
from train.config import PretrainConfig
from train.config_file import load_config
from train.data import Batch, draw_dual_batch
from train.distributed import joined, rank, shared
from train.loop import Step, ahead, on_device
from train.optim import build_optimizer, take_step
from train.run import prepare
from train.step import DualStep

ROOT = Path(__file__).resolve().parents[2]
TURNS = 5
DDP_TURNS = 3
BF16 = "step in bfloat16"
NO_BF16 = "not measured: this processor does not multiply bfloat16"
DECODE = DecodeOptions(workers=2)
LOADERS = {"jpeg": Keeping(), "raw": Keeping(form="raw"), "straight from video": Keeping(max_bytes=0)}

Drawn = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, write the report."""
    parser = argparse.ArgumentParser(prog="python -m examples.training.bench", description=__doc__)
    parser.add_argument("--backbone", default="r2plus1d_10")
    parser.add_argument("--batch", type=int, default=2, help="videos in a step")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--out", type=Path, default=Path("build/bench/training.json"))
    parser.add_argument("--processes-of", type=Path, help=argparse.SUPPRESS)  # a share of ``ddp2_over_1``
    given = parser.parse_args(arguments)
    with exiting("bench-training"):
        if given.processes_of:
            _share(given.processes_of, _Share(given.backbone, given.batch, given.turns))
            return
        with scratch_folder("ivdr-bench-training-") as scratch:
            make_figures(scratch / "videos", train_actors=4, test_actors=1)
            report = measure(scratch, backbone=given.backbone, batch=given.batch, turns=given.turns)
        with atomic_path(given.out) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        console.print(f"report: {given.out}", markup=False)


def measure(scratch: Path, *, backbone: str, batch: int, turns: int) -> dict[str, Any]:
    """Measure everything; returns the report."""
    facts = environment_facts()  # its load is that from before
    config = _config(scratch, backbone)
    step = _step(config, bf16=False)
    optimizer = build_optimizer(step.parameters(), config.optim)
    with ExitStack() as opened:
        loaders = {
            name: _Loader(config, keeping, scratch / name, batch, opened) for name, keeping in LOADERS.items()
        }
        held = loaders["jpeg"].draw()
        parts: dict[str, Callable[[], object]] = {
            "fwd_bwd": lambda: _forward_backward(step, batch),
            "step": lambda: _whole(step, optimizer, held),
        }
        if "bf16" in instruction_sets():
            half = _step(config, bf16=True)
            parts[BF16] = partial(_whole, half, build_optimizer(half.parameters(), config.optim), held)
        for name, loader in loaders.items():
            parts[f"draw, {name}"] = loader.draw
            parts[f"step with loader, {name}"] = partial(_whole_with, loader, step, optimizer)

        def rest() -> None:
            for loader in loaders.values():
                loader.rest()

        found = _alternately(parts, turns=turns, rest=rest)
    ratios = {
        name: {
            "loader_over_step": found["step"] / found[f"draw, {name}"],
            "headspace": found[f"step with loader, {name}"] / found["step"],
        }
        for name in loaders
    }
    return {
        "step_over_fwd_bwd": found["step"] / found["fwd_bwd"],
        **ratios["jpeg"],
        "loaders": ratios,
        "bf16_over_fp32": found["step"] / found[BF16] if BF16 in found else NO_BF16,
        **_scaling(scratch, backbone, batch),
        "seconds": found,
        "settings": {
            "backbone": backbone,
            "clip": list(config.clip.clip_shape),
            "videos": batch,
            "turns": turns,
        },
        "environment": facts,
    }


class _Loader:
    """One way to get at frames.

    It is held against the step by ``loader_over_step``, batches that are drawn in the time of a step, and
    ``headspace``, the rate of steps on a batch that is there over their rate with the loader of a run: 1 where training
    never waits.
    """

    def __init__(
        self, config: PretrainConfig, keeping: Keeping, cache: Path, batch: int, opened: ExitStack
    ) -> None:
        videos = read_video_list(config.data.train)
        self._config = config
        self._cached = opened.enter_context(
            cache_videos(videos, config.clip, cache, keeping=keeping, decode=DECODE)
        )
        self._work = _batch(config, self._cached, batch)
        self._ended, self._awaited, self._begun = threading.Semaphore(0), 0, 0
        self.drawn = opened.enter_context(closing(ahead(self._draw_ahead, repeat(self._work))))

    def take(self) -> Drawn:
        """Return the batch that was drawn ahead, while the next is drawn."""
        self._begun = self._begun + 1 if self._begun else 2  # the first one asks for two
        return next(self.drawn)

    def rest(self) -> None:
        """Wait until nothing is drawn ahead any more, so that it does not slow what is timed next."""
        while self._awaited < self._begun:
            self._ended.acquire()
            self._awaited += 1

    def _draw_ahead(self, _: Batch) -> Drawn:
        try:
            return self.draw()
        finally:
            self._ended.release()

    def draw(self) -> Drawn:
        """Draw the batch."""
        return draw_dual_batch(self._cached, self._work, self._config, draw=random_centre_clip)


def _alternately(
    parts: dict[str, Callable[[], object]], *, turns: int, rest: Callable[[], object]
) -> dict[str, float]:
    """Return the median seconds of each part; they take turns, and each begins when ``rest`` has returned."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(turns + 1):  # the first warms up
        for name, call in parts.items():
            rest()
            seconds = _timed(call)
            if turn:
                times[name].append(seconds)
    return {name: median(values) for name, values in times.items()}


def _config(scratch: Path, backbone: str) -> PretrainConfig:
    given = [f"out={scratch / 'run'}", f"data.train={scratch / 'videos' / 'train.csv'}"]
    config = load_config(PretrainConfig, CONFIGS / "demo_pretrain.toml", given)
    clip = ClipSpec() if backbone != "tiny" else config.clip
    return replace(config, clip=clip, model=replace(config.model, backbone=backbone))


def _step(config: PretrainConfig, *, bf16: bool) -> DualStep:
    torch.manual_seed(0)
    step = DualStep(build_model(config.model, config.clip), config.dual, bf16=bf16)
    prepare(config, step, torch.device("cpu"))
    return step


def _batch(config: PretrainConfig, cached: CachedVideos, count: int) -> Batch:
    rows = np.arange(count) % len(cached)
    return Batch(rows=rows, places=np.arange(count), seed=config.seed, step=0)


def _whole(step: Step, optimizer: torch.optim.Optimizer, drawn: Drawn) -> None:
    loss, _ = step(**on_device(drawn, torch.device("cpu")))
    take_step(optimizer, [loss], lr=1e-4)


def _whole_with(loader: _Loader, step: Step, optimizer: torch.optim.Optimizer) -> None:
    _whole(step, optimizer, loader.take())


def _forward_backward(step: DualStep, batch: int) -> None:
    """Run the backbone alone on as many clips as a step encodes, forth and back."""
    shape = (batch * step.config.clips_per_video, *_shape(step.model.spec))
    feature = step.model.encode(torch.randint(0, 256, shape, dtype=torch.uint8))
    step.zero_grad(set_to_none=True)
    feature.sum().backward()  # type: ignore[no-untyped-call]


def _shape(spec: ModelSpec) -> tuple[int, ...]:
    return ClipSpec().clip_shape if spec.backbone != "tiny" else (8, 56, 56, 3)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _scaling(scratch: Path, backbone: str, batch: int) -> dict[str, float]:
    """Return how many times as many steps two processes take as one, of the network and of ``tiny``, in turns."""
    found = {}
    for name, share in (
        ("ddp2_over_1", _Share(backbone, videos=batch, steps=3)),
        ("ddp2_over_1_tiny", _Share("tiny", videos=16, steps=12)),
    ):
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(DDP_TURNS):
            for processes, taken in rates.items():
                taken.append(_rate(scratch, share, processes=processes))
        found[name] = median(rates[2]) / median(rates[1])
    return found


class _Share(NamedTuple):
    """What processes train together."""

    backbone: str
    videos: int
    """In a step of all of them."""

    steps: int
    """That are timed; one comes before."""


def _rate(scratch: Path, share: _Share, *, processes: int) -> float:
    """Return steps a second in processes that compute with one thread each, and load with the same."""
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    command += [
        "--nproc-per-node",
        str(processes),
        "-m",
        "examples.training.bench",
        "--processes-of",
        str(scratch),
        "--backbone",
        share.backbone,
        "--batch",
        str(share.videos),
        "--turns",
        str(share.steps),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TrainingError(f"{processes} processes did not train together: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def _share(scratch: Path, share: _Share) -> None:
    """Take steps as one of the processes that ``torchrun`` started; the first prints the rate."""
    torch.set_num_threads(1)
    config = _config(scratch, share.backbone)
    videos = read_video_list(config.data.train)
    cached = cache_videos(
        videos, config.clip, scratch / "cache" / str(os.getpid()), decode=DecodeOptions(workers=1)
    )
    with joined("cpu"):
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        step: Any = shared(_step(config, bf16=False))
        optimizer = build_optimizer(step.parameters(), config.optim)
        work = _batch(config, cached, share.videos).part(0, 1, rank=rank(), ranks=ranks)
        for number in range(share.steps + 1):
            if number == 1:
                start = time.perf_counter()
            _whole(step, optimizer, draw_dual_batch(cached, work, config, draw=random_centre_clip))
        if rank() == 0:
            print(share.steps / (time.perf_counter() - start))


if __name__ == "__main__":
    main()
