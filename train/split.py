"""Part one labelled list into training and test, whole groups at a time."""

from __future__ import annotations

import csv
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ivdr_deploy._console import print_text
from ivdr_deploy._files import atomic_path
from ivdr_deploy.datasets.entries import some
from ivdr_deploy.datasets.lists import VideoItem, VideoList
from ivdr_deploy.errors import ConfigError, DataError, FolderError
from train.answers import units_of
from train.method import in_range

SplitBy = Literal["group", "video"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Two parts of a list."""

    source: Path
    """The list."""

    train: tuple[VideoItem, ...]
    test: tuple[VideoItem, ...]
    groups: dict[str, str]
    """Of every video, by its uri."""

    said: str
    """How it is known which videos belong together, for people."""

    untested: tuple[str, ...]
    """Classes with no test video, since all of theirs are of one group."""


def split_list(videos: VideoList, *, test_share: float, by: SplitBy = "group", seed: int = 0) -> Split:
    """Choose whole groups for the test, so that about the same share of every class is in it.

    Every class keeps a group to train on. A class of one group has no test videos: those would show how well a
    recording is known again, not how well the class is.

    Args:
        videos: The list, labelled.
        test_share: Share of the videos of each class, above 0 and below 1.
        by: What is kept together: groups as ``train.groups`` tells them, or each video by itself.
        seed: Decides among groups.

    Raises:
        DataError: if a label is missing, or nothing can be held out.
        ConfigError: if the share or the seed is out of range.
    """
    if not 0.0 < test_share < 1.0:
        raise ConfigError(f"the share of test videos must be between 0 and 1, found {test_share}")
    in_range("seed", seed, 0)
    videos.require_labels()
    items = videos.items
    groups, said = (
        units_of(items) if by == "group" else ([item.uri for item in items], "each video by itself")
    )
    held = _held_out(groups, [str(item.label) for item in items], test_share=test_share, seed=seed)
    test = tuple(item for item, group in zip(items, groups, strict=True) if group in held)
    if not test:
        raise DataError(
            f"{videos.source}: no group can be held out for a test ({said}): every class is of one group",
            hint="`python -m train split --by video` parts single videos, and tells nothing about other recordings",
        )
    return Split(
        source=videos.source,
        train=tuple(item for item, group in zip(items, groups, strict=True) if group not in held),
        test=test,
        groups={item.uri: group for item, group in zip(items, groups, strict=True)},
        said=said,
        untested=tuple(sorted(set(videos.labels) - {str(item.label) for item in test})),
    )


def write_split(split: Split, folder: Path) -> tuple[Path, Path]:
    """Write ``train.csv`` and ``test.csv``, with whole paths and the group of each video.

    Raises:
        FolderError: if one of them is the list itself.
        OSError: if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.csv", folder / "test.csv"
    for path in paths:
        if path.exists() and split.source.exists() and path.samefile(split.source):
            raise FolderError(
                f"{path} is the list that is parted: a part of it would take its place",
                hint="give another folder for the two lists",
            )
    for path, items in zip(paths, (split.train, split.test), strict=True):
        with (
            atomic_path(path) as temporary,
            temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream,
        ):
            table = csv.writer(stream)
            table.writerow(["path", "label", "group"])
            table.writerows(
                [os.path.abspath(item.path), item.label, split.groups[item.uri]] for item in items
            )
    return paths


def say_split(split: Split) -> None:
    """Tell a person how a list was parted."""
    names = {part: {split.groups[item.uri] for item in getattr(split, part)} for part in ("train", "test")}
    print_text(
        f"parted by group ({split.said}): {len(split.train)} videos of {len(names['train'])} groups to train, "
        f"{len(split.test)} of {len(names['test'])} to test",
    )
    if split.untested:
        print_text(
            f"{len(split.untested)} classes have one group each, all of which is trained on; their accuracy stays "
            f"unknown: {some(split.untested)}",
            style="yellow",
        )


def _held_out(groups: Sequence[str], labels: Sequence[str], *, test_share: float, seed: int) -> set[str]:
    """Choose groups, in random order, that bring classes nearer to their share of test videos."""
    inside: dict[str, Counter[str]] = defaultdict(Counter)
    for group, label in zip(groups, labels, strict=True):
        inside[group][label] += 1
    left = Counter(
        label for counts in inside.values() for label in counts
    )  # groups that a class still trains on
    lacking = {label: max(1, round(test_share * count)) for label, count in Counter(labels).items()}
    names = list(inside)
    held = set()
    for place in np.random.default_rng([seed, 3]).permutation(len(names)):
        counts = inside[names[place]]
        gain = sum(min(count, max(0, lacking[label])) for label, count in counts.items())
        excess = sum(max(0, count - max(0, lacking[label])) for label, count in counts.items())
        if gain > excess and all(left[label] > 1 for label in counts):
            held.add(names[place])
            for label, count in counts.items():
                left[label] -= 1
                lacking[label] -= count
    return held or _smallest(inside, left)


def _smallest(inside: dict[str, Counter[str]], left: Counter[str]) -> set[str]:
    """Choose the smallest group that may be held out, where each is larger than the share; none if none may."""
    free = [name for name, counts in inside.items() if all(left[label] > 1 for label in counts)]
    return {min(free, key=lambda name: inside[name].total())} if free else set()
