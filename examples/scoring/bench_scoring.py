"""``make bench-scoring``: throughput against its limit, kills, and the planning of a million inputs.

Everything is the real thing: the command is started and killed, the million are planned in a process of their own, Ray
is a cluster of this machine. The report is written after each part, and one of an earlier run is carried on: what was
not measured again stays, with the machine that it was measured on. Without ``--bundle`` a small network is scored.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.choices import chosen
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
PARTS = ("plan", "throughput", "reference", "kills", "ray")

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
    parser.add_argument("--only", default=" ".join(PARTS), help="parts, with blanks between")
    parser.add_argument("--out", type=Path, default=Path("build/bench/scoring.json"), help="the report")
    given = parser.parse_args(arguments)
    with exiting("bench-scoring"):
        parts = chosen(given.only, PARTS, what="part")
        with scratch_folder("ivdr-bench-scoring-") as scratch:
            _measure(parts, given, scratch)
        console.print(f"report: {given.out}", markup=False)


def _measure(parts: Sequence[str], given: argparse.Namespace, scratch: Path) -> None:
    if "plan" in parts:
        run("plan", lambda: plan(scratch), given.out)
    videos = _videos(given.videos, scratch)
    bundle = given.bundle or _bundle(scratch, videos, "tiny")
    if "throughput" in parts:
        large = _bundle(scratch, videos, "r3d_18")
        bundles = {"given" if given.bundle else "tiny": bundle, "r3d_18": large}
        run("throughput", lambda: throughput(bundles, videos, scratch), given.out)
    if "reference" in parts:
        (scratch / "reference").mkdir()
        run("reference", lambda: over_reference(given.checkpoint, scratch / "reference"), given.out)
    if "kills" in parts or "ray" in parts:
        listed = make_list(scratch / "kill-list")
        how = {"seconds": score_whole(bundle, listed, scratch), "seed": given.seed}
        if "kills" in parts:
            run(
                "kills",
                lambda: as_json(kill_command(bundle, listed, scratch, kills=given.kills, **how)),
                given.out,
            )
        if "ray" in parts:
            kinds = dict(zip(("actors", "drivers", "nodes"), given.ray_kills, strict=True))
            run("ray", lambda: kill_ray(bundle, listed, scratch, **kinds, **how), given.out)


def run(part: str, measure: Callable[[], Mapping[str, Any]], out: Path) -> None:
    """Measure one part and write it into the report; what it gave in an earlier run is gone."""
    facts = environment_facts()  # the load is that from before
    figures = dict(measure())
    report = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    kept = report.setdefault("parts", {})
    for name in kept.get(part, {}).get("figures", ()):
        report.pop(name, None)
    report |= figures
    kept[part] = {"figures": list(figures), "environment": facts}
    report["environment"] = facts
    write_report(report, out)
    console.print(json.dumps(figures), markup=False)


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
