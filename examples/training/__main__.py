"""``python -m examples.training``: every method on every set, seed after seed; what is done is not done again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from examples.training.measure import measured
from examples.training.methods import METHODS, DataSet, Unit, figures, real
from examples.training.report import render
from examples.training.units import side_by_side
from ivdr_deploy._console import console, exiting
from ivdr_deploy._files import atomic_path
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.environment import environment_facts, let_threads_sleep, usable_cores

SEEDS = 5
ACTORS = (20, 40)
_HOW = (
    "Written by `make results-training`. `tiny`, eight frames; settings of the demo. Every method encodes as many "
    "clips. Mean and 95 % t-interval over seeds. `figures` are drawn people, `weizmann` cyclic actions, `dark` clips "
    "of ARID, filmed in the dark; people of the test lists, in `dark` recordings, are in no training list. *probe*: "
    "softmax regression on frozen features, penalty 0.01, ten clips a video. *order pairs*: videos of classes that "
    "differ in their order alone, told from the other of their pair by the probe (chance 0.5). *ranking*: segments "
    "matched on unseen people, over all orders, and over truly shuffled ones alone (an order-blind encoder: 0.5 "
    "and 0 for two slots). *few labels*: fine-tuned as if only five people of twenty were labelled (30 videos); "
    "the pre-training has seen all. `supervised` is trained on the labels, so its probe and R@1 have seen them."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m examples.training", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--methods", default=";".join(METHODS), help="names, parted by ';'")
    parser.add_argument("--epochs", type=int, default=24, help="of the whole method on the figures")
    parser.add_argument("--actors", type=int, nargs=2, default=ACTORS, help="to train on, and unseen ones")
    parser.add_argument(
        "--at-once", type=int, default=usable_cores(), help="processes, which share the cores"
    )
    parser.add_argument("--work", type=Path, default=Path("build/results-training"), help="runs in progress")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results"), help="where page and values go at the end"
    )
    given = parser.parse_args(arguments)
    methods = given.methods.split(";")
    if unknown := [name for name in methods if name not in METHODS]:
        parser.error(f"there is no method {', '.join(unknown)}; there are: {'; '.join(METHODS)}")
    if min(given.at_once, given.seeds) < 1:
        parser.error("--at-once and --seeds are at least 1")
    let_threads_sleep()
    with exiting("results-training"):
        train_actors, test_actors = given.actors
        videos = "videos" if (train_actors, test_actors) == ACTORS else f"videos-{train_actors}-{test_actors}"
        made = figures(
            given.work / "figures" / videos,
            epochs=given.epochs,
            train_actors=train_actors,
            test_actors=test_actors,
        )
        sets = [made, *real(given.work, epochs=given.epochs)]
        if len(sets) == 1:
            console.print(
                "IVDR_TEST_DATA names no actions-mini and actions-dark: real clips are left out",
                style="yellow",
            )
        units = units_of(sets, methods, seeds=given.seeds, work=given.work)
        run(units, work=given.work, out=given.out, at_once=given.at_once)


def units_of(sets: Sequence[DataSet], methods: Sequence[str], *, seeds: int, work: Path) -> list[Unit]:
    """Return what there is to do: one set after the other, and each seed by seed."""
    return [
        Unit(method=name, data=data, folder=work / data.name / name.replace(" ", "-") / str(seed), seed=seed)
        for data in sets
        for seed in range(seeds)
        for name in methods
    ]


def run(units: Sequence[Unit], *, work: Path, out: Path, at_once: int) -> None:
    """Measure what was not measured yet; page and values go into ``work`` after each, and into ``out`` at the end."""
    missing = [unit for unit in units if measured(unit) is None]
    for number, unit in enumerate(side_by_side(missing, at_once=at_once), start=1):
        found = ", ".join(f"{protocol} {value:.3f}" for protocol, value in (measured(unit) or {}).items())
        console.print(f"{unit.title}: {found}; {number} of {len(missing)} done", markup=False)
        write(units, work)
    write(units, out)
    console.print(f"wrote {out / 'training.md'} and {out / 'training.json'}", markup=False)


def write(units: Sequence[Unit], out: Path) -> None:
    """Write page and values: of each set those before the first that is missing, so that lists are by seed."""
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    ended: set[str] = set()
    for unit in units:
        found = None if unit.data.name in ended else measured(unit)
        if found is None:
            ended.add(unit.data.name)
            continue
        for protocol, value in found.items():
            values.setdefault(unit.data.name, {}).setdefault(protocol, {}).setdefault(unit.method, []).append(
                value
            )
    for name, text in (
        ("training.json", json.dumps(values, indent=2) + "\n"),
        ("training.md", render(values, how=f"{_HOW}\n\n{_ran_on(units)}")),
    ):
        with atomic_path(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _ran_on(units: Sequence[Unit]) -> str:
    """Say on how many videos, where and with what."""
    facts = environment_facts()
    counts = {
        unit.data.name: [len(read_video_list(path).items) for path in (unit.data.train, unit.data.test)]
        for unit in units
    }
    videos = "; ".join(f"`{name}` {train} and {test}" for name, (train, test) in counts.items())
    return (
        f"Training and test videos: {videos}.\n\n{facts['time'][:10]}, {facts['cpu']}, {facts['cores']} cores, "
        f"torch {facts['packages']['torch']}, commit `{facts['git_revision'] or 'unknown'}`."
    )


if __name__ == "__main__":
    main()
