"""How much of the limit a run reaches: videos per second against the slower of decoding alone and the network alone.

All of it on the same cores, in the same minutes: decoding alone and the network alone are measured before and after the
run, since the speed of a machine that others use too drifts. A collection that
takes seconds is gone through several times, as links under other names; what one pass reaches is reported beside it,
since there the first videos and the last call of the network, which have nothing to overlap with, weigh most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ivdr_deploy.datasets.lists import VideoItem, VideoList
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.environment import decode_workers
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.base import LoadedModel, Runtime
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.scoring.scorer import score
from ivdr_deploy.spec import ViewPlan

CLIP_SECONDS = 0.025
"""Of a clip on the simulated accelerator, which takes no core."""

PASSES = 6
"""Over the collection, with a network that takes little of the time."""

ONE = ViewPlan(num_clips=1)
_ENGINE_SECONDS, _LEAST_CALLS = 10.0, 3


class Accelerator:
    """A runtime that takes its time and no core."""

    def __init__(self, model: LoadedModel, video: np.ndarray) -> None:
        self.name, self.precision = model.runtime.name, model.runtime.precision
        self.description, self.call_clips = "simulated accelerator, 25 ms a clip", model.runtime.call_clips
        self.output_names = model.output_names
        self._one = {name: value[:1] for name, value in model.runtime.infer(video[:1]).items()}

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        """Wait, and answer the same for every clip."""
        time.sleep(CLIP_SECONDS * len(video))
        return {name: np.repeat(value, len(video), axis=0) for name, value in self._one.items()}

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> Accelerator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def throughput(bundles: dict[str, Path], videos: VideoList, scratch: Path) -> dict[str, Any]:
    """Measure runs against their limits.

    Args:
        bundles: By the name of the network: the first one small, the last one worth its time.
        videos: The collection.
        scratch: For links and tables.

    Returns:
        ``efficiency_cpu`` of the last network with as many clips a video as are looked at by default,
        ``efficiency_sim_accelerator``, and under ``throughput`` for each run the rates of it. Where decoding and
        network want the same cores their times add up: ``of_possible`` is the share of 1 / (1 / decode + 1 / network)
        that was reached. It is the nearer to the slower of the two, the more clips a decoded video gives.
    """
    small, *_, large = bundles
    default = ViewPlan()
    whole = f"{large}, {default.num_clips} clips a video"
    runs: dict[str, dict[str, float]] = {}
    for name, bundle, passes, plan in (
        *((f"{each}, 1 clip a video", each, PASSES if each == small else 1, ONE) for each in bundles),
        (whole, large, 1, default),
    ):
        listed = _again(videos, passes, scratch)
        change = partial(_with_plan, plan=plan)
        found = _measure(bundles[bundle], listed, scratch / f"cpu-{bundle}-{plan.num_clips}", change)
        found["of_possible"] = found["run"] * (1.0 / found["decode"] + 1.0 / found["network"])
        runs[name] = found
    for passes in (1, PASSES):
        name = "simulated accelerator" + (", one pass" if passes == 1 else "")
        listed = _again(videos, passes, scratch)
        runs[name] = _measure(bundles[small], listed, scratch / f"accelerator-{passes}", _on_accelerator)
    return {
        "efficiency_cpu": runs[whole]["efficiency"],
        "efficiency_sim_accelerator": runs["simulated accelerator"]["efficiency"],
        "throughput": runs,
    }


def _with_plan(model: LoadedModel, _: np.ndarray, *, plan: ViewPlan) -> LoadedModel:
    return replace(model, view_plan=plan)


def _on_accelerator(model: LoadedModel, sample: np.ndarray) -> LoadedModel:
    return replace(model, runtime=Accelerator(model, sample))


def _measure(
    bundle: Path, videos: VideoList, out: Path, changed: Callable[[LoadedModel, np.ndarray], LoadedModel]
) -> dict[str, float]:
    """Return videos per second of the run, of decoding alone and of the network alone, and the run's share."""
    decode = DecodeOptions(workers=decode_workers())
    opened = open_model(bundle)
    with opened.runtime:
        with VideoPredictor(opened, decode=decode) as predictor:
            sample = predictor.load(videos.items[0].source).video
        model = changed(opened, sample)
        with VideoPredictor(model, decode=decode) as predictor:
            before = _alone(predictor, videos.items, sample)
            started = time.perf_counter()
            summary = score(predictor, videos, out)
            run = summary.scored / (time.perf_counter() - started)
            after = _alone(predictor, videos.items, sample)
    if summary.failed or summary.scored != len(videos.items):
        raise RuntimeError(
            f"{summary.scored} of {len(videos.items)} videos were scored, {summary.failed} failed"
        )
    decoding, network = (2.0 / (1.0 / one + 1.0 / other) for one, other in zip(before, after, strict=True))
    return {
        "run": run,
        "decode": decoding,
        "network": network,
        "efficiency": run / min(decoding, network),
        "decode_after_over_before": after[0] / before[0],
        "network_after_over_before": after[1] / before[1],
    }


def _alone(predictor: VideoPredictor, items: Sequence[VideoItem], sample: np.ndarray) -> tuple[float, float]:
    """Return videos per second of decoding and of the network, each by itself."""
    decoding, clips = _decode_rate(predictor, items)
    return decoding, _network_rate(predictor.model.runtime, sample, clips / len(items))


def _again(videos: VideoList, passes: int, scratch: Path) -> VideoList:
    """Return the list with every video ``passes`` times, under names of its own."""
    items: list[VideoItem] = []
    for number in range(passes):
        folder = scratch / f"pass-{number}"
        folder.mkdir(exist_ok=True)
        for place, item in enumerate(videos.items):
            link = folder / f"{place}{item.path.suffix}"
            if not link.is_symlink():
                link.symlink_to(item.path.resolve())
            items.append(replace(item, path=link, uri=f"{number}/{item.uri}"))
    return replace(videos, items=tuple(items))


def _decode_rate(predictor: VideoPredictor, items: Sequence[VideoItem]) -> tuple[float, int]:
    """Return videos per second of decoding alone, and the clips of all."""
    predictor.load(items[0].source)  # starts the workers
    started = time.perf_counter()
    with ThreadPoolExecutor(2 * decode_workers()) as pool:
        clips = sum(pool.map(lambda item: len(predictor.load(item.source).video), items))
    return len(items) / (time.perf_counter() - started), clips


def _network_rate(runtime: Runtime, sample: np.ndarray, clips_per_video: float) -> float:
    """Return videos per second of the network alone, in calls as large as those of a run."""
    call = np.concatenate([sample] * (-(-runtime.call_clips // len(sample))))[: runtime.call_clips]
    runtime.infer(call)
    started, calls = time.perf_counter(), 0
    while calls < _LEAST_CALLS or time.perf_counter() - started < _ENGINE_SECONDS:
        runtime.infer(call)
        calls += 1
    return calls * len(call) / (time.perf_counter() - started) / clips_per_video
