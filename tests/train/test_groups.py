"""Which videos are held out together."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from ivdr_deploy.datasets.lists import VideoItem, read_video_list
from ivdr_deploy.errors import DataError
from train.groups import PARTS, group_videos, hold_out


def items(*names: str) -> list[VideoItem]:
    """Videos in class folders."""
    return [VideoItem(Path(name), name.split("/")[0], name) for name in names]


PEOPLE = [f"{label}/{name}_{label}.avi" for label in ("run", "bend") for name in ("ida", "moshe", "eli")]
SEQUENCES = [
    f"{label}/ut1_{6 * sequence + place}_{sequence}_{label}.avi"
    for sequence in (1, 2, 3)
    for place, label in enumerate(("hug", "kick"))
]
SESSIONS = [
    f"{label}/{label.title()}_{session}_{clip}.mp4"
    for label, session in [("jump", 8), ("sit", 4), ("sit", 10), ("walk", 9)]
    for clip in (1, 2, 3)
]
UCF = [
    f"{label}/v_{label}_g0{g}_c0{c}.avi" for label in ("Archery", "Bowling") for g in (1, 2) for c in (1, 2)
]
HALF = ["a/p_1.avi", "a/p_2.avi", "b/p_3.avi", "b/q_4.avi", "b/q_5.avi"]
THIRD = [f"{name}_{clip}.avi" for name in ("a/p", "b/p", "b/q", "b/r") for clip in (1, 2)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (PEOPLE, ["ida", "moshe", "eli"] * 2),
        (SEQUENCES, ["1", "1", "2", "2", "3", "3"]),
        (PEOPLE + SEQUENCES, ["ida", "moshe", "eli"] * 2 + ["1", "1", "2", "2", "3", "3"]),
        (SESSIONS, [f"{n}" for n in ("jump/8", "sit/4", "sit/10", "walk/9") for _ in range(3)]),
        (UCF, ["g01", "g01", "g02", "g02"] * 2),
        ([*PEOPLE, "run/eli_run_2.avi"], ["ida", "moshe", "eli"] * 2 + ["eli"]),
        (
            [*SESSIONS, "sit/Sit_4_4_again.mp4"],
            [*(f"{n}" for n in ("jump/8", "sit/4", "sit/10", "walk/9") for _ in range(3)), "sit/4"],
        ),
        (["hug/ut1_3.avi", *SEQUENCES], ["hug/ut1_3.avi", "1", "1", "2", "2", "3", "3"]),
        (HALF, ["p", "p", "p", "q", "q"]),
        (THIRD, [f"{n}" for n in ("a/p", "b/p", "b/q", "b/r") for _ in range(2)]),
        (["a/IMG_1.mp4", "a/IMG_2.mp4", "b/IMG_3.mp4"], ["a/IMG_1.mp4", "a/IMG_2.mp4", "b/IMG_3.mp4"]),
    ],
    ids=[
        "people",
        "sequences",
        "both",
        "sessions",
        "ucf101",
        "second take",
        "more of a session",
        "too few words",
        "half in several classes",
        "a third in several classes",
        "counted",
    ],
)
def test_groups_come_from_the_names(names: list[str], expected: list[str]) -> None:
    groups, said = group_videos(items(*names))
    assert groups == expected
    assert ("by themselves" in said) == (expected[0] == names[0])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_column_group_goes_before_names(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"list.{kind}"
    rows = {"path": PEOPLE, "label": ["x", "y"] * 3, "group": list("ppqqrr")}
    if kind == "csv":
        lines = zip(*rows.values(), strict=True)
        path.write_text("path,label,group\n" + "".join(",".join(line) + "\n" for line in lines))
    else:
        import pyarrow as pa
        import pyarrow.parquet

        pa.parquet.write_table(pa.table(rows), path)
    videos = read_video_list(path)
    assert [item.group for item in videos.items] == list("ppqqrr")
    assert group_videos(videos.items) == (list("ppqqrr"), "column group of the list")
    bare = [*videos.items, *items("x/a.mp4")]
    with pytest.raises(DataError, match="1 of 7 videos have no group"):
        group_videos(bare)


def test_parts_share_no_group_and_every_class_stays_in_training() -> None:
    rng = np.random.default_rng(0)
    for seed in range(60):
        count = int(rng.integers(2, 40))
        groups = [str(value) for value in rng.integers(0, rng.integers(1, 12), count)]
        labels = [str(value) for value in rng.integers(0, 4, count)]
        parts = hold_out(groups, labels, seed=seed)
        assert len(parts) <= PARTS
        for part in parts:
            rest = set(range(count)) - set(part.tolist())
            assert not {groups[row] for row in part} & {groups[row] for row in rest}
            assert {labels[row] for row in rest} == set(labels)
        rows = [row for part in parts for row in part.tolist()]
        assert len(rows) == len(set(rows))


def by_definition(groups: list[str], labels: list[str], *, seed: int) -> list[list[int]]:
    """The parts, by looking through all that is held out so far for each group: the largest first, and into the part
    with fewest videos of its classes, of equals the smallest, where each class of it keeps a group outside."""
    names = list(dict.fromkeys(groups))
    rows = {name: [row for row, group in enumerate(groups) if group == name] for name in names}
    order = [names[place] for place in np.random.default_rng([seed, 2]).permutation(len(names))]
    parts: list[list[int]] = [[] for _ in range(PARTS)]
    for name in sorted(order, key=lambda name: -len(rows[name])):
        own = {labels[row] for row in rows[name]}

        def outside(part: list[int], label: str, name: str = name) -> set[str]:
            held = {groups[row] for row in part} | {name}
            return {groups[row] for row, other in enumerate(labels) if other == label} - held

        free = [part for part in parts if all(outside(part, label) for label in own)]
        if free:
            loads = [(sum(labels[row] in own for row in part), len(part)) for part in free]
            free[loads.index(min(loads))].extend(rows[name])
    return [sorted(part) for part in parts if part]


def test_parts_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for seed in range(60):
        count = int(rng.integers(2, 40))
        groups = [str(value) for value in rng.integers(0, rng.integers(1, 20), count)]
        labels = [str(value) for value in rng.integers(0, rng.integers(1, 5), count)]
        parts = [part.tolist() for part in hold_out(groups, labels, seed=seed)]
        assert parts == by_definition(groups, labels, seed=seed)
        held += len(parts) == PARTS
    assert held > 20


@pytest.mark.parametrize("classes", [2, 10_000])
def test_a_list_of_many_groups_takes_no_time(classes: int) -> None:
    labels = [str(row % classes) for row in range(20_000)]
    begin = time.process_time()
    parts = hold_out([str(row) for row in range(20_000)], labels, seed=0)
    assert time.process_time() - begin < 5.0
    assert sum(map(len, parts)) >= 10_000


def test_everything_is_held_out_once_where_that_can_be() -> None:
    groups, _ = group_videos(items(*PEOPLE, *SEQUENCES))
    labels = [item.label or "" for item in items(*PEOPLE, *SEQUENCES)]
    parts = hold_out(groups, labels, seed=0)
    assert sorted(row for part in parts for row in part.tolist()) == list(range(12))
    assert [len(part) for part in parts] == [4, 4, 4]
    assert all({labels[row] for row in part} == {"run", "bend", "hug", "kick"} for part in parts)


def test_the_only_group_of_a_class_is_never_held_out() -> None:
    names = items(*SESSIONS)
    parts = hold_out(group_videos(names)[0], [item.label or "" for item in names], seed=0)
    assert {names[row].label for part in parts for row in part.tolist()} == {"sit"}
    assert hold_out(["p", "q"], ["a", "b"], seed=0) == []
