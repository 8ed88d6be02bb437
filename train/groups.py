"""Which videos of a training list are held out together: those of one person, one recording, one session."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

import numpy as np

from ivdr_deploy._console import print_text
from ivdr_deploy._text import quoted
from ivdr_deploy.datasets.lists import VideoItem, VideoList
from ivdr_deploy.errors import DataError

PARTS = 3
"""Parts that are held out in turn."""


def group_videos(items: Sequence[VideoItem]) -> tuple[list[str], str]:
    """Say which videos belong together, and how that is known.

    The list's column ``group``, if it has one. Else, among names of equally many words (parted by ``_``, ``-``, ``.``
    and blanks), the first word that makes groups of at least two videos on average, and more than one group of some
    class. Where at least half of its values occur in several classes, as names of persons do, a group spans the
    classes; otherwise, as with sessions that are numbered within a class, it does not. A video whose name has more or
    fewer words, as that of a second take, belongs to the group that the word at the same place names, if there is one;
    else it is a group by itself.

    Args:
        items: Labelled.

    Returns:
        The group of every video, and the words for people.

    Raises:
        DataError: if the list gives a group for some videos only.
    """
    given = [item.group for item in items]
    if all(given):
        return [str(group) for group in given], "column group of the list"
    if any(given):
        bare = [item.uri for item in items if not item.group]
        raise DataError(
            f"{len(bare)} of {len(items)} videos have no group, the first is {quoted(bare[0])}",
            hint="fill the column group for every video, or leave it out",
        )
    words = [re.split(r"[_\-.\s]+", PurePath(item.uri).stem.casefold()) for item in items]
    groups = [item.uri for item in items]
    said: list[str] = []
    makers: list[tuple[int, set[str]]] = []
    lone: list[int] = []
    for count in sorted({len(one) for one in words}):
        rows = [row for row, one in enumerate(words) if len(one) == count]
        for place in range(count):
            found = _by_word([(words[row][place], str(items[row].label)) for row in rows])
            if found:
                for row, group in zip(rows, found, strict=True):
                    groups[row] = group
                said.append(f"word {place + 1} of {len(rows)} names, such as {quoted(words[rows[0]][place])}")
                makers.append((place, set(found)))
                rows = []
                break
        lone += rows
    joined = [row for row in lone if _join(groups, row, words[row], str(items[row].label), makers)]
    for many, how in ((len(joined), "by the same word"), (len(lone) - len(joined), "by themselves")):
        if many:
            said.append(f"{many} videos {how}")
    return groups, ", ".join(said)


def _join(
    groups: list[str], row: int, words: Sequence[str], label: str, makers: Sequence[tuple[int, set[str]]]
) -> bool:
    """Put a video into the group that one of its words names; says whether there is one.

    Args:
        groups: Of every video.
        row: The video.
        words: Of its name.
        label: Its class.
        makers: The place of the word that made groups, and the groups.
    """
    for place, names in makers:
        if place < len(words):
            for group in (words[place], f"{label}/{words[place]}"):
                if group in names:
                    groups[row] = group
                    return True
    return False


def _by_word(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return the groups that a word of the names makes; none if it makes no useful ones.

    Args:
        pairs: Word and label of every video.
    """
    classes: dict[str, set[str]] = {}
    for word, label in pairs:
        classes.setdefault(word, set()).add(label)
    across = 2 * sum(len(labels) > 1 for labels in classes.values()) >= len(classes)
    groups = [word if across else f"{label}/{word}" for word, label in pairs]
    kinds = {(group, label) for group, (_, label) in zip(groups, pairs, strict=True)}
    several = len(kinds) > len({label for _, label in kinds})  # some class has two
    return groups if several and len(pairs) >= 2 * len(set(groups)) else []


def held_out_parts(videos: VideoList, *, seed: int) -> list[np.ndarray]:
    """Choose the rows of the training list that are held out in turn, and say how; absent files never are."""
    groups, said = group_videos(videos.items)
    present = [row for row, item in enumerate(videos.items) if os.path.isfile(item.path)]
    names = [groups[row] for row in present]
    labels = [str(videos.items[row].label) for row in present]
    parts = [np.array(present)[part] for part in hold_out(names, labels, seed=seed)]
    held = {row for part in parts for row in part.tolist()}
    print_text(
        f"held out in {len(parts)} parts: {len(held)} of {len(present)} videos, "
        f"{len({groups[row] for row in held})} of {len(set(names))} groups ({said})",
    )
    return parts


def hold_out(groups: Sequence[str], labels: Sequence[str], *, seed: int) -> list[np.ndarray]:
    """Choose the parts of a list that are held out in turn, each group in one part at most.

    Every class keeps a group outside of each part. A group without which that cannot be is never held out: the only one
    of a class says nothing about other groups.

    Args:
        groups: Of every video.
        labels: Of every video.
        seed: Decides among groups of equal size.

    Returns:
        At most ``PARTS`` arrays of rows, none empty; together, what can be held out.
    """
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    classes = {group: Counter(labels[row] for row in rows) for group, rows in members.items()}
    groups_of = Counter(label for held in classes.values() for label in held)
    names = list(members)
    order = [names[place] for place in np.random.default_rng([seed, 2]).permutation(len(names))]
    parts = [_Part() for _ in range(PARTS)]
    for group in sorted(order, key=lambda name: -len(members[name])):
        own = classes[group]
        free = [part for part in parts if all(part.groups_of[label] + 1 < groups_of[label] for label in own)]
        if free:
            min(free, key=lambda part: part.load(own)).add(members[group], own)
    return [np.array(sorted(part.rows)) for part in parts if part.rows]


@dataclass(frozen=True, slots=True)
class _Part:
    """What is held out together so far, counted as it grows: a list may have thousands of groups."""

    rows: list[int] = field(default_factory=list)
    videos_of: Counter[str] = field(default_factory=Counter)
    groups_of: Counter[str] = field(default_factory=Counter)

    def add(self, rows: Sequence[int], videos_of: Counter[str]) -> None:
        """Hold out a group too: its rows, and its videos of each class."""
        self.rows.extend(rows)
        self.videos_of.update(videos_of)
        self.groups_of.update(videos_of.keys())

    def load(self, labels: Iterable[str]) -> tuple[int, int]:
        """Return the videos of some classes, and all."""
        return sum(self.videos_of[label] for label in labels), len(self.rows)
