"""One labelled list becomes two, and no group is in both."""

from collections import Counter
from pathlib import Path

import pytest
from lists import touch

from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.errors import ConfigError, DataError
from train.__main__ import main
from train.split import split_list, write_split


def clips(folder: Path, people: str, labels: str = "run jump sit", each: int = 2) -> Path:
    names = [
        f"{label}/{name}_{label}_{number}.mp4"
        for label in labels.split()
        for name in people.split()
        for number in range(each)
    ]
    touch(folder, *names)
    return folder


@pytest.mark.parametrize("seed", range(6))
def test_a_person_is_in_one_part_and_every_class_in_both(tmp_path: Path, seed: int) -> None:
    videos = read_video_list(clips(tmp_path, "ann bea cid dan eva fay gus hal"))
    split = split_list(videos, test_share=0.25, seed=seed)
    people = [{item.path.name.split("_")[0] for item in part} for part in (split.train, split.test)]
    assert not people[0] & people[1]
    assert len(people[1]) == 2
    assert {item.uri for item in (*split.train, *split.test)} == {item.uri for item in videos.items}
    assert Counter(item.label for item in split.test) == {"run": 4, "jump": 4, "sit": 4}
    assert "such as 'ann'" in split.said
    assert split == split_list(videos, test_share=0.25, seed=seed)


def test_other_seeds_hold_out_other_people(tmp_path: Path) -> None:
    videos = read_video_list(clips(tmp_path, "ann bea cid dan eva fay gus hal"))
    held = {frozenset(split_list(videos, test_share=0.25, seed=seed).test) for seed in range(8)}
    assert len(held) > 2


def test_the_column_group_goes_before_the_names(tmp_path: Path) -> None:
    names = [f"v{number}.mp4" for number in range(12)]
    lines = [f"{name},{'ab'[number % 2]},g{number // 4}" for number, name in enumerate(names)]
    (tmp_path / "list.csv").write_text("path,label,group\n" + "\n".join(lines) + "\n")
    split = split_list(read_video_list(tmp_path / "list.csv"), test_share=0.3)
    assert split.said == "column group of the list"
    assert len({split.groups[item.uri] for item in split.test}) == 1
    assert len(split.test) == 4


def test_without_groups_single_videos_are_held_out(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{label}/{label}{number}.mp4" for label in ("a", "b") for number in range(8)))
    split = split_list(read_video_list(tmp_path), test_share=0.25)
    assert Counter(item.label for item in split.test) == {"a": 2, "b": 2}


def test_a_class_of_one_group_is_named_and_not_tested(tmp_path: Path) -> None:
    rows = [f"run{n}.mp4,run,day{n // 3}" for n in range(12)] + [f"sit{n}.mp4,sit,studio" for n in range(5)]
    (tmp_path / "list.csv").write_text("path,label,group\n" + "\n".join(rows) + "\n")
    split = split_list(read_video_list(tmp_path / "list.csv"), test_share=0.25)
    assert split.untested == ("sit",)
    assert {item.label for item in split.test} == {"run"}


def test_a_class_of_one_video_is_trained_on(tmp_path: Path) -> None:
    touch(tmp_path, "rare/r.mp4", *(f"{label}/{label}{n}.mp4" for label in ("a", "b") for n in range(8)))
    for seed in range(5):
        split = split_list(read_video_list(tmp_path), test_share=0.5, seed=seed)
        assert split.untested == ("rare",)
        assert {item.label for item in split.train} == {"a", "b", "rare"}


def test_where_every_class_is_of_one_group_nothing_is_made_up(tmp_path: Path) -> None:
    rows = [f"{label}{n}.mp4,{label},{label}day" for label in ("run", "sit") for n in range(4)]
    path = tmp_path / "list.csv"
    path.write_text("path,label,group\n" + "\n".join(rows) + "\n")
    with pytest.raises(DataError, match="no group can be held out"):
        split_list(read_video_list(path), test_share=0.25)
    assert len(split_list(read_video_list(path), test_share=0.25, by="video").test) == 2


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_of_nothing_or_all_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(ConfigError, match="share of test videos"):
        split_list(read_video_list(clips(tmp_path, "ann bea")), test_share=share)


def test_a_seed_below_0_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seed must be at least 0, found -1"):
        split_list(read_video_list(clips(tmp_path, "ann bea")), test_share=0.5, seed=-1)


def test_written_lists_name_the_same_videos_with_their_groups(tmp_path: Path) -> None:
    folder = clips(tmp_path / "clips", "ann bea cid dan")
    touch(folder, 'run/eva, "the odd"_run_0.mp4', 'run/eva, "the odd"_run_1.mp4', "sit/f\udce9_sit_0.mp4")
    split = split_list(read_video_list(folder), test_share=0.25)
    parts = [read_video_list(path) for path in write_split(split, tmp_path / "lists")]
    for part, items in zip(parts, (split.train, split.test), strict=True):
        part.require_files()
        assert [item.label for item in part.items] == [item.label for item in items]
        assert all(item.group for item in part.items)
    groups = [{item.group for item in part.items} for part in parts]
    assert not groups[0] & groups[1]


def test_the_list_itself_is_never_written_over(tmp_path: Path) -> None:
    folder = clips(tmp_path / "clips", "ann bea cid dan")
    names = sorted(folder.rglob("*.mp4"))
    path = tmp_path / "train.csv"
    path.write_text("path,label\n" + "".join(f"{name},{name.parent.name}\n" for name in names))
    before = path.read_text()
    with pytest.raises(SystemExit) as caught:
        main(["split", str(path), "-o", str(tmp_path)])
    assert caught.value.code == 10
    assert path.read_text() == before
    assert not (tmp_path / "test.csv").exists()


def test_the_command_writes_two_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = clips(tmp_path / "clips", "ann bea cid dan")
    assert main(["split", str(folder), "-o", str(tmp_path / "out"), "--test-share", "0.5"]) == 0
    assert len(read_video_list(tmp_path / "out" / "test.csv").items) == 12
    said = capsys.readouterr().err
    assert "12 videos of 2 groups to train, 12 of 2 to test" in said
    assert "next: python -m train check" in said
