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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.demo.figures import make_figures
from examples.engines.networks import write_network
from examples.scoring.kills import as_json, kill_command, make_list, score_whole
from examples.scoring.obvious import over_reference
from examples.scoring.ray_kills import kill_ray
from examples.scoring.throughput import throughput
from ivdr_deploy._console import console, exiting
from ivdr_deploy._files import scratch_folder
from ivdr_deploy.benchmarks.report import write_report
from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.environment import environment_facts
from ivdr_deploy.export.bundle_export import export_bundle
from ivdr_deploy.spec import ClipSpec

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
        bundle = given.bundle or _bundle(scratch, videos, "tiny")
        if "throughput" in parts:
            large = _bundle(scratch, videos, "r3d_18")
            bundles = {"given" if given.bundle else "tiny": bundle, "r3d_18": large}
            _keep(found, throughput(bundles, videos, scratch), given.out)
        if "reference" in parts:
            (scratch / "reference").mkdir()
            _keep(found, over_reference(given.checkpoint, scratch / "reference"), given.out)
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


def _bundle(scratch: Path, videos: VideoList, backbone: str) -> Path:
    """Export a network of random weights for the videos, in a bundle of its name."""
    labelled = (
        videos
        if videos.labels
        else replace(
            videos, items=tuple(replace(item, label=f"class{i % 4}") for i, item in enumerate(videos.items))
        )
    )
    checkpoint = write_network(scratch / f"{backbone}.safetensors", backbone, labelled, CLIP)
    export_bundle(checkpoint, scratch / backbone)
    return scratch / backbone


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


if __name__ == "__main__":
    main()
