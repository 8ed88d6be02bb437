"""``python -m examples.demo``: the whole journey, on made videos or on a folder of real clips."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from examples.demo.commands import Pattern
from examples.demo.journey import Journey
from ivdr_deploy._console import console, exiting
from ivdr_deploy._files import atomic_path
from ivdr_deploy.datasets.lists import VideoItem, read_video_list
from ivdr_deploy.environment import environment_facts
from ivdr_deploy.errors import DataError

TRAIN_ACTORS, TEST_ACTORS = 20, 10
_TEST_PATTERN = "*/actor2?.mp4"
"""The test actors are those from number 20 on."""

MINIMUM_ACCURACY = 0.70
"""On the made videos; chance is 1 in 6."""

_REAL_CLIP = ("clip.frame_stride=4", "clip.short_side=72", "clip.crop_size=64")
_REAL_FINETUNE = (*_REAL_CLIP, "optim.batch_size=8", "optim.epochs=80")
REAL_OVERRIDES = {
    "pretrain": (*_REAL_CLIP, "optim.epochs=20"),
    "finetune": _REAL_FINETUNE,
    "scratch": _REAL_FINETUNE,
    "joint": _REAL_CLIP,
}
"""Real clips vary more than the made figures: finer pictures, and more steps."""


def main() -> None:
    """Parse, run, print the table, write the report; exit 1 unless everything passed."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with train.csv and test.csv, or with one folder per class; default: made videos",
    )
    parser.add_argument(
        "--out", type=Path, help="run folder; default: runs/demo, or runs/demo-NAME with --data"
    )
    arguments = parser.parse_args()
    with exiting("demo"):
        passed = run(arguments.data, arguments.out)
    sys.exit(0 if passed else 1)


def run(data: Path | None, out: Path | None) -> bool:
    """Run the demo and leave ``report.json`` in its folder. Returns whether every step passed.

    Raises:
        FolderError: if the folder holds what no demo made.
    """
    start = time.perf_counter()
    if data is None:
        journey = Journey(out=out or Path("runs/demo"), minimum_accuracy=MINIMUM_ACCURACY)
        journey.claim_folder()
        passed = journey.step("make videos", lambda: _make_videos(journey))
    else:
        journey = Journey(out=out or Path(f"runs/demo-{data.resolve().name}"), overrides=REAL_OVERRIDES)
        journey.claim_folder()
        passed = journey.step("read videos", lambda: _split(data, journey))
    passed = passed and journey.run()
    seconds = time.perf_counter() - start
    report = {
        "pass": passed,
        "seconds": round(seconds, 1),
        **journey.facts,
        "steps": [asdict(step) for step in journey.steps],
        "environment": environment_facts(),
    }
    path = journey.out / "report.json"
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _print_table(journey, passed=passed, seconds=seconds)
    console.print(f"bundle: {journey.bundle}\nreport: {path}", markup=False)
    return passed


def _print_table(journey: Journey, *, passed: bool, seconds: float) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, title="what was made", title_justify="left")
    table.add_column("step")
    table.add_column("")
    table.add_column("seconds", justify="right")
    table.add_column("result", overflow="fold")
    for step in journey.steps:
        verdict = Text("PASS", style="green") if step.passed else Text("FAIL", style="red")
        table.add_row(step.name, verdict, f"{step.seconds:.1f}", Text(step.detail))
    console.rule(align="left")
    console.print(table)
    console.print(
        f"{'PASS' if passed else 'FAIL'} in {seconds:.0f} s", style="bold green" if passed else "bold red"
    )


def _make_videos(journey: Journey) -> str:
    from examples.demo.figures import ACTIONS, make_figures

    folder = journey.out / "data"
    make_figures(folder, train_actors=TRAIN_ACTORS, test_actors=TEST_ACTORS)
    journey.train, journey.test = folder / "train.csv", folder / "test.csv"
    journey.pattern = Pattern(folder, _TEST_PATTERN)
    return f"{(TRAIN_ACTORS + TEST_ACTORS) * len(ACTIONS)} videos of {len(ACTIONS)} actions in {folder}"


def _split(data: Path, journey: Journey) -> str:
    """Find the two lists, or make them: of every class, each fourth video is for testing."""
    journey.train, journey.test = data / "train.csv", data / "test.csv"
    if not (journey.train.is_file() and journey.test.is_file()):
        by_class: defaultdict[str, list[VideoItem]] = defaultdict(list)
        for item in read_video_list(data).items:
            if item.label is None:
                raise DataError(
                    f"{data} has neither train.csv and test.csv nor one folder per class",
                    hint="arrange it in one of the two ways",
                )
            by_class[item.label].append(item)
        if small := [label for label, items in by_class.items() if len(items) < 2]:
            raise DataError(f"{data}: a class needs at least 2 videos, {', '.join(small)} has 1")
        train = [item for items in by_class.values() for i, item in enumerate(items) if i % 4 != 1]
        test = [item for items in by_class.values() for item in items[1::4]]
        journey.train, journey.test = journey.out / "train.csv", journey.out / "test.csv"
        for path, items in ((journey.train, train), (journey.test, test)):
            with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
                rows = [(item.path.resolve(), item.label) for item in items]
                csv.writer(stream).writerows([("path", "label"), *rows])
    counts = [len(read_video_list(path).items) for path in (journey.train, journey.test)]
    return f"{counts[0]} training and {counts[1]} test videos"


if __name__ == "__main__":
    main()
