"""What can be wrong with lists of videos: each kind has a name, a way to find it, and advice."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ivdr_deploy._text import QUOTED, as_text, quoted
from ivdr_deploy.datasets.entries import Entry, LeftOut, some
from ivdr_deploy.datasets.lists import VideoItem, alike, one_spelling, read_entries
from ivdr_deploy.datasets.official import CLASS_INDEX, class_names
from ivdr_deploy.errors import DataError
from train.groups import group_videos

ERRORS = frozenset(
    {
        "missing",
        "unreadable",
        "no_video_stream",
        "decode_failed",
        "too_large",
        "too_slow",
        "crashed",
        "no_label",
        "two_labels",
        "labels_alike",
        "class_only_in_test",
        "same_video_in_both",
        "same_group_in_both",
        "copies_of_two_classes",
    }
)
"""Kinds that make training fail, or its result worthless; the others are warnings."""

_UNBALANCED = 10
"""How many times as many videos the largest class may have as the smallest."""

_DIGITS = 18
"""Of a label that is taken for a number."""

_FEW = 2
"""Videos that a class should have to train on."""

HINTS = {
    "missing": "relative paths start at the folder of the list, or at --root",
    "unreadable": "check permissions and links; a file that is damaged at its beginning must be fetched again",
    "no_video_stream": "take it out of the list",
    "decode_failed": "fetch it again, or take it out of the list",
    "too_large": "cut it, or take it out of the list",
    "too_slow": "cut it, or take it out of the list",
    "crashed": "take it out of the list",
    "no_label": "give every video a label, or none",
    "two_labels": "a video has one class: remove one of the two",
    "labels_alike": "spell one class in one way",
    "class_only_in_test": "a model cannot know it: add training videos, or take it out of the test list",
    "class_only_in_train": "its accuracy stays unknown: add test videos",
    "same_video_in_both": "take it out of the training list: the test would measure memory",
    "same_group_in_both": "put a person or recording into one list only: `python -m train split` does",
    "copies_of_two_classes": "keep the copy with the right label",
    "copies": "keep one of each",
    "empty_class": "add videos, or remove the class",
    "few_videos": "add videos: one example shows no class",
    "unbalanced": "add videos of the rare classes; accuracy over all says little about them",
    "label_order": "write class names instead of numbers: logits are in the order of the names as text",
    "too_short": "the last frame is repeated; lower clip.num_frames or clip.frame_stride if many are",
    "variable_frame_rate": "sampled by time, which training and serving do alike; nothing to do if it is meant so",
    "frame_rates_differ": "set clip.target_fps, so that a clip lasts as long in every video",
    "still": "one picture for the whole video shows no action",
    "left_out": "nothing to do if it is meant so",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of fault."""

    kind: str
    what: str
    """With how many, for people."""

    examples: tuple[str, ...] = ()
    """All of them."""

    @property
    def severity(self) -> Literal["error", "warning"]:
        """Whether it makes the check fail."""
        return "error" if self.kind in ERRORS else "warning"

    @property
    def hint(self) -> str:
        """What to do."""
        return HINTS[self.kind]


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """A list as it stands there."""

    name: Literal["train", "test"]
    source: Path
    entries: tuple[Entry, ...]
    left_out: tuple[LeftOut, ...]

    def counts(self) -> Counter[str]:
        """Count the videos of every class, by the spelling that training uses."""
        return Counter(
            one_spelling(label) for label in {e.key: e.label for e in self.entries}.values() if label
        )


def read_listed(train: Path, test: Path | None, root: Path | None) -> list[Listed]:
    """Read the lists; of one list that holds two parts, both.

    Raises:
        DataError: if nothing can be read of one.
        ConfigError: if ``root`` is given for a folder.
    """
    out = []
    for name, source in (("train", train), ("test", test)):
        found, left = read_entries(source or train, root, name)  # type: ignore[arg-type]
        entries = tuple(found)
        if source is None and not _has_parts(train, root, len(entries)):
            continue
        if not entries:
            raise DataError(f"{source or train} holds no videos", hint="give a list that names some")
        out.append(Listed(name=name, source=source or train, entries=entries, left_out=left.found()))  # type: ignore[arg-type]
    return out


def _has_parts(source: Path, root: Path | None, of_test: int) -> bool:
    """Whether a list holds a training and a test part, so that fewer videos are in one than in both."""
    return 0 < of_test < sum(1 for _ in read_entries(source, root, None)[0])


def faults_of_lists(lists: Sequence[Listed]) -> list[Finding]:
    """Find what the lists alone show."""
    found = [fault for one in lists for fault in _faults_of_list(one)]
    labels = {one_spelling(entry.label) for one in lists for entry in one.entries if entry.label}
    spelled: dict[str, set[str]] = defaultdict(set)
    for one in lists:
        for entry in one.entries:
            if entry.label:
                spelled[alike(entry.label)].add(entry.label.strip())
    several = [sorted(names) for names in spelled.values() if len(names) > 1]
    found += finding(
        "labels_alike",
        "classes are spelled in several ways",
        (" and ".join(quoted(name) + _points(name, names) for name in names) for names in several),
    )
    found += finding(
        "label_order", "classes have another order than their numbers", _order_traps(lists, labels)
    )
    if len(lists) == 2:
        found += _faults_between(*lists)
    return found


def _faults_of_list(one: Listed) -> list[Finding]:
    uris = {entry.key: entry.uri for entry in one.entries}
    labels: dict[str, set[str]] = defaultdict(set)
    for entry in one.entries:  # by the file, as training does: a list may write it in several ways
        labels[entry.key].add(one_spelling(entry.label or ""))
    bare = [uris[key] for key, given in labels.items() if given == {""}]
    found = finding(
        "two_labels",
        f"{one.name} videos have two labels",
        (uris[key] for key, given in labels.items() if len(given) > 1),
    )
    again = Counter(entry.key for entry in one.entries)
    repeated = sorted(uris[key] for key, count in again.items() if count > 1 and len(labels[key]) == 1)
    found += finding("copies", f"{one.name} videos are listed more than once", repeated)
    if len(bare) < len(labels):
        found += finding("no_label", f"{one.name} videos have no label", bare)
    counts = one.counts()
    found += finding("empty_class", f"{one.name} classes have no video", _empty_classes(one, counts))
    if one.name == "train":
        few = (label for label, count in sorted(counts.items()) if count < _FEW)
        found += finding("few_videos", "classes have a single training video", few)
        if counts and max(counts.values()) > _UNBALANCED * min(counts.values()):
            (most, largest), (least, smallest) = counts.most_common()[0], counts.most_common()[-1]
            said = f"{quoted(most)} has {largest} training videos and {quoted(least)} {smallest}"
            found += [Finding("unbalanced", f"classes are very unequal: {said}")]
    found += [
        Finding("unreadable" if left.unread else "left_out", f"left out of the {one.name} list: {left}")
        for left in one.left_out
    ]
    return found


def _faults_between(train: Listed, test: Listed) -> list[Finding]:
    have, asked = train.counts(), test.counts()
    found = finding(
        "class_only_in_test", "classes are in the test list only", sorted(asked.keys() - have.keys())
    )
    found += finding(
        "class_only_in_train",
        "classes are in the training list only",
        sorted(have.keys() - asked.keys() if asked else []),
    )
    keys = {entry.key: entry.uri for entry in train.entries}
    both = [entry for entry in test.entries if entry.key in keys]
    found += finding("same_video_in_both", "videos are in both lists", (entry.uri for entry in both))
    entries = [entry for entry in (*train.entries, *test.entries) if entry.label or entry.group]
    items = [
        VideoItem(entry.path, one_spelling(entry.label or ""), entry.uri, entry.group) for entry in entries
    ]
    try:
        groups, said = group_videos(items)
    except DataError:  # some have a group and some do not: those that do are compared
        groups, said = [item.group or item.uri for item in items], "column group, where it is filled"
    split = sum(1 for entry in train.entries if entry.label or entry.group)
    shared = sorted(set(groups[:split]) & set(groups[split:]))
    if shared:
        found += finding("same_group_in_both", f"groups ({said}) are in both lists", shared)
    return found


def _empty_classes(one: Listed, counts: Counter[str]) -> list[str]:
    """Return class folders without a video, and classes of an index that the list does not name."""
    if one.source.is_dir() and counts:
        folders = (
            path.name for path in sorted(one.source.iterdir()) if path.is_dir() and path.name[0] != "."
        )
        return [as_text(name) for name in folders if one_spelling(as_text(name)) not in counts]
    index = one.source.parent / CLASS_INDEX
    if index.is_file() and counts:
        return [name for name in class_names(index).values() if one_spelling(name) not in counts]
    return []


def _order_traps(lists: Sequence[Listed], labels: set[str]) -> list[str]:
    """Say where the order of class names as text, which logits have, is another than that of their numbers."""
    ordered = sorted(labels)
    found = []
    numbers = [label for label in ordered if label.isdecimal() and len(label) <= _DIGITS]
    if numbers != sorted(numbers, key=int):
        found.append(f"as text {some(numbers)}")
    for index in sorted({one.source.parent / CLASS_INDEX for one in lists if not one.source.is_dir()}):
        if index.is_file():
            named = [
                one_spelling(name)
                for _, name in sorted(class_names(index).items(), key=lambda one: int(one[0]))
            ]
            known = [name for name in named if name in labels]
            if known != sorted(known):
                place = next(place for place, name in enumerate(known) if name != sorted(known)[place])
                found.append(
                    f"{index} has {quoted(known[place])} where we have {quoted(sorted(known)[place])}"
                )
    return found


def _points(name: str, names: Sequence[str]) -> str:
    """Say which characters a name is made of where others look the same."""
    same = [other for other in names if other != name and one_spelling(other) == one_spelling(name)]
    return (
        f" ({' '.join(f'U+{ord(sign):04X}' for sign in name[:QUOTED] if not sign.isascii())})" if same else ""
    )


def finding(kind: str, what: str, examples: Iterable[str]) -> list[Finding]:
    """Return one finding, or none where there is no example."""
    found = tuple(examples)
    return [Finding(kind, f"{len(found)} {what}", found)] if found else []
