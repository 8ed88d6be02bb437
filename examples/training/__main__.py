"""``python -m examples.training``: every method on every set, seed after seed; what is done is not done again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from examples.training.measure import measure
from examples.training.methods import METHODS, DataSet, figures, weizmann
from examples.training.report import render
from ivdr_deploy._console import console, exiting
from ivdr_deploy._files import atomic_path
from ivdr_deploy.environment import environment_facts, let_threads_sleep

SEEDS = 5
ACTORS = (20, 40)
_HOW = (
    "Written by `make results-training`. `tiny`, eight frames; settings of the demo. Every method encodes as many "
    "clips. Mean and 95 % t-interval over seeds; people of the test lists are in no training list. *probe*: "
    "softmax regression on frozen features, penalty 0.01, ten clips a video. *order pairs*: videos of classes "
    "that differ in order alone, told from the other of their pair by the probe (chance 0.5). *ranking*: segments "
    "matched on unseen people, over all orders, and over truly shuffled ones alone (an order-blind encoder: 0.5 "
    "and 0 for two slots). `supervised` is trained on the labels, so its probe and R@1 have seen them."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m examples.training", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--methods", default=";".join(METHODS), help="names, parted by ';'")
    parser.add_argument("--epochs", type=int, default=24, help="of the whole method on the figures")
    parser.add_argument("--actors", type=int, nargs=2, default=ACTORS, help="to train on, and unseen ones")
    parser.add_argument("--work", type=Path, default=Path("build/results-training"), help="runs in progress")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where page and values go")
    given = parser.parse_args(arguments)
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
        real = weizmann(given.work / "weizmann" / "lists", epochs=given.epochs)
        if real is None:
            console.print(
                "IVDR_TEST_DATA names no actions-mini: the Weizmann clips are left out", style="yellow"
            )
        sets = [one for one in (made, real) if one is not None]
        run(sets, given.methods.split(";"), seeds=given.seeds, work=given.work, out=given.out)


def run(sets: Sequence[DataSet], methods: Sequence[str], *, seeds: int, work: Path, out: Path) -> None:
    """Measure seed by seed, and write page and values after each."""
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    for seed in range(seeds):
        for data in sets:
            for name in methods:
                console.rule(f"{data.name}, {name}, seed {seed}", align="left")
                folder = work / data.name / name.replace(" ", "-") / str(seed)
                found = measure(name, METHODS[name], data, folder.absolute(), seed=seed)
                for protocol, value in found.items():
                    values.setdefault(data.name, {}).setdefault(protocol, {}).setdefault(name, []).append(
                        value
                    )
                _write(values, out)
    console.print(f"wrote {out / 'training.md'} and {out / 'training.json'}", markup=False)


def _write(values: dict[str, dict[str, dict[str, list[float]]]], out: Path) -> None:
    facts = environment_facts()
    for name, text in (
        ("training.json", json.dumps({**values, "environment": facts}, indent=2) + "\n"),
        ("training.md", render(values, how=_HOW)),
    ):
        with atomic_path(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
