"""``make bench-scoring``: throughput against its limit, kills, and the planning of a million inputs.

Everything is the real thing: the command is started and killed, the million are planned in a process of their own, Ray
is a cluster of this machine. The report names the machine; without ``--bundle`` a small network is scored.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from examples.demo.figures import make_figures
from examples.engines.networks import write_network
from examples.scoring.kills import as_json, kill_command, make_list, score_whole
from examples.scoring.obvious import over_reference
from examples.scoring.ray_kills import kill_ray
from ivdr_deploy._console import console, exiting
from ivdr_deploy._files import scratch_folder
from ivdr_deploy.benchmarks.report import write_report
from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.environment import decode_workers, environment_facts
from ivdr_deploy.export.bundle_export import export_bundle
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.base import LoadedModel, Runtime
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.scoring.scorer import score
from ivdr_deploy.spec import ClipSpec

CLIP_SECONDS = 0.025
"""Of a clip on the simulated accelerator, which takes no core."""

CLIP = ClipSpec(num_frames=16, frame_stride=2, short_side=128, crop_size=112)
PLANNED = 1_000_000

_PLAN = """
import json, sys, time
import ivdr_deploy.scoring.scorer
from ivdr_deploy._optional import import_pyarrow
from ivdr_deploy.datasets.lists import VideoStream
from ivdr_deploy.scoring.inputs import InputStream, Selection
from ivdr_deploy.scoring.lister import Lister

import_pyarrow()

def peak_mb():  # the figure of getrusage is that of the parent at least
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

before = peak_mb()
started = time.perf_counter()
with Lister(InputStream(VideoStream(sys.argv[1]), Selection()), set(), "run") as lister:
    shards = lister.shards()
    next(shards)
    first, early = time.perf_counter() - started, lister.total is None
    while lister.total is None:
        time.sleep(0.01)
    seconds = time.perf_counter() - started
    rss = peak_mb() - before
    count = sum(len(shard.inputs) for shard in shards) + 32
print(json.dumps({"plan_seconds_1e6": seconds, "plan_first_shard_seconds": first, "scored_before_listed": early,
                  "plan_rss_mb_1e6": rss, "planned": count,
                  "plan_cpu_seconds_1e6": time.process_time()}))
"""


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m examples.scoring.bench_scoring", description=__doc__)
    parser.add_argument("--bundle", type=Path, help="what is scored; default: a small network, exported here")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="what goes through the obvious pipeline and ours; default: r3d_18, made here",
    )
    parser.add_argument(
        "--videos", type=Path, help="list for throughput; default: real clips, or made videos"
    )
    parser.add_argument("--kills", type=int, default=100, help="of the local engine")
    parser.add_argument(
        "--ray-kills", type=int, nargs=3, default=(20, 5, 5), metavar="N", help="of actors, drivers and nodes"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument(
        "--only", default="plan throughput reference kills ray", help="parts, with blanks between"
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/scoring.json"), help="the report")
    given = parser.parse_args(arguments)
    parts = given.only.split()
    with exiting("bench-scoring"), scratch_folder("ivdr-bench-scoring-") as scratch:
        found: dict[str, Any] = json.loads(given.out.read_text()) if given.out.is_file() else {}
        found["environment"] = environment_facts()
        if "plan" in parts:
            _keep(found, plan(scratch), given.out)
        videos = _videos(given.videos, scratch)
        bundle = given.bundle or _bundle(scratch, videos)
        if "throughput" in parts:
            _keep(found, throughput(bundle, videos, scratch), given.out)
        if "reference" in parts:
            _keep(found, over_reference(given.checkpoint, scratch), given.out)
        if "kills" in parts or "ray" in parts:
            listed = make_list(scratch / "kill-list")
            how = {"seconds": score_whole(bundle, listed, scratch), "seed": given.seed}
            if "kills" in parts:
                killed = kill_command(bundle, listed, scratch, kills=given.kills, **how)
                _keep(found, as_json(killed), given.out)
            if "ray" in parts:
                kinds = dict(zip(("actors", "drivers", "nodes"), given.ray_kills, strict=True))
                _keep(found, kill_ray(bundle, listed, scratch, **kinds, **how), given.out)
        console.print(f"report: {given.out}", markup=False)


def _keep(found: dict[str, Any], more: Mapping[str, Any], out: Path) -> None:
    found |= more
    console.print(json.dumps(dict(more)), markup=False)
    write_report(found, out)


def _videos(listed: Path | None, scratch: Path) -> VideoList:
    real = Path(os.environ.get("IVDR_TEST_DATA", "")) / "actions-dark"
    if listed is not None or real.is_dir():
        return read_video_list(listed or real)
    make_figures(scratch / "videos", train_actors=6, test_actors=2)
    return read_video_list(scratch / "videos" / "train.csv")


def _bundle(scratch: Path, videos: VideoList) -> Path:
    labelled = (
        videos
        if videos.labels
        else replace(
            videos, items=tuple(replace(item, label=f"class{i % 4}") for i, item in enumerate(videos.items))
        )
    )
    checkpoint = write_network(scratch / "network.safetensors", "tiny", labelled, CLIP)
    export_bundle(checkpoint, scratch / "bundle")
    return scratch / "bundle"


def plan(scratch: Path) -> dict[str, Any]:
    """Plan a list of a million inputs in a process of its own."""
    listed = scratch / "million.csv"
    with listed.open("w") as stream:
        stream.write("path,label\n")
        stream.writelines(f"videos/class{i % 400}/clip_{i:07d}.mp4,class{i % 400}\n" for i in range(PLANNED))
    done = subprocess.run(
        [sys.executable, "-P", "-c", _PLAN, str(listed)], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    if found.pop("planned") != PLANNED:
        raise RuntimeError("the plan does not hold every input once")
    return found


def throughput(bundle: Path, videos: VideoList, scratch: Path) -> dict[str, Any]:
    """Measure the run against the slower of decoding alone and the network alone, on the same cores."""
    decode = DecodeOptions(workers=decode_workers())
    with open_model(bundle).runtime as runtime:
        model = replace(open_model(bundle), runtime=runtime)
        with VideoPredictor(model, decode=decode) as predictor:
            sample = predictor.load(videos.items[0].source).video
    found: dict[str, Any] = {}
    for name in ("cpu", "sim_accelerator"):
        opened = open_model(bundle)
        if name == "sim_accelerator":
            opened = replace(opened, runtime=Accelerator(opened, sample))
        with opened.runtime, VideoPredictor(opened, decode=decode) as predictor:
            decoding, clips = _decode_rate(predictor, videos)
            engine = _engine_rate(opened.runtime, sample, clips / len(videos.items))
            out = scratch / f"throughput-{name}"
            started = time.perf_counter()
            summary = score(predictor, videos, out)
            rate = summary.scored / (time.perf_counter() - started)
        found[f"efficiency_{name}"] = rate / min(decoding, engine)
        if name == "cpu":  # both want the same cores, so that their times add up
            found["of_possible_cpu"] = rate * (1.0 / decoding + 1.0 / engine)
        found[f"videos_per_s_{name}"] = {"run": rate, "decode": decoding, "engine": engine}
    return found


def _decode_rate(predictor: VideoPredictor, videos: VideoList) -> tuple[float, int]:
    """Return videos per second of decoding alone, and the clips of all."""
    from concurrent.futures import ThreadPoolExecutor

    predictor.load(videos.items[0].source)  # starts the workers
    started = time.perf_counter()
    with ThreadPoolExecutor(2 * decode_workers()) as pool:
        clips = sum(pool.map(lambda item: len(predictor.load(item.source).video), videos.items))
    return len(videos.items) / (time.perf_counter() - started), clips


def _engine_rate(runtime: Runtime, sample: np.ndarray, clips_per_video: float) -> float:
    """Return videos per second of the network alone, in calls as large as those of a run."""
    call = np.concatenate([sample] * (-(-runtime.call_clips // len(sample))))[: runtime.call_clips]
    runtime.infer(call)
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < 5.0:
        runtime.infer(call)
        calls += 1
    return calls * len(call) / (time.perf_counter() - started) / clips_per_video


if __name__ == "__main__":
    main()
