"""The dataset doctor finds what is planted, each by its name, and nothing in sets that are sound."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from clips import moving_square
from made_videos import remux
from videos import numbered_video, write_video

from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.errors import DataError
from train.__main__ import main
from train.check import CheckReport, check_lists
from train.faults import ERRORS, HINTS

LABELS = ("down", "up")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound videos in two classes, and odd ones."""
    folder = tmp_path_factory.mktemp("videos")
    for seed in range(8):
        label = LABELS[seed % 2]
        write_video(folder / f"{label}{seed // 2}.mp4", moving_square(label, seed=seed, num_frames=18), gop=6)
    numbered_video(folder / "short.mp4", num_frames=5)
    numbered_video(folder / "variable.mp4", pts_ms=[40 * k + 35 * (k // 7) for k in range(40)])
    numbered_video(folder / "fast.mp4", fps=60)
    grey = np.full((36, 48, 3), 90, np.uint8)
    write_video(folder / "still.mp4", [grey] * 20)
    whole = numbered_video(folder / "long.avi", codec="mpeg4", bframes=0, num_frames=60).read_bytes()
    (folder / "damaged.avi").write_bytes(whole[: len(whole) // 3] + bytes(len(whole) // 3) + whole[-200:])
    (folder / "text.mp4").write_text("no video at all")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "loop.mp4").symlink_to("loop.mp4")
    remux(folder / "down0.mp4", folder / "down0_again.mkv")
    return folder


def listed(path: Path, rows: dict[str, str], *, header: str = "path,label") -> Path:
    path.write_text("\n".join([header, *(f"{name},{rest}" for name, rest in rows.items())]) + "\n")
    return path


def sound(numbers: range) -> dict[str, str]:
    return {f"{label}{number}.mp4": label for number in numbers for label in LABELS}


def kinds(report: CheckReport) -> dict[str, tuple[str, ...]]:
    assert {finding.kind for finding in report.findings} <= HINTS.keys()
    out: dict[str, tuple[str, ...]] = {}
    for finding in report.findings:
        out[finding.kind] = out.get(finding.kind, ()) + finding.examples
    return out


def test_sound_lists_pass(videos: Path) -> None:
    train, test = listed(videos / "a.csv", sound(range(3))), listed(videos / "b.csv", sound(range(3, 4)))
    report = check_lists(train, test)
    assert report.findings == ()
    assert report.passed
    assert report.videos == 8


def in_training(name: str, label: str = "down") -> Callable[[Path], tuple[Path, Path]]:
    def plant(videos: Path) -> tuple[Path, Path]:
        rows = {name: label} | {key: value for key, value in sound(range(3)).items() if key != name}
        return listed(videos / "train.csv", rows), listed(videos / "test.csv", sound(range(3, 4)))

    return plant


def in_test(rows: dict[str, str]) -> Callable[[Path], tuple[Path, Path]]:
    return lambda videos: (
        listed(videos / "train.csv", sound(range(3))),
        listed(videos / "test.csv", sound(range(3, 4)) | rows),
    )


PLANTED = [
    ("unreadable", "text.mp4", in_training("text.mp4")),
    ("unreadable", "empty.mp4", in_training("empty.mp4")),
    ("unreadable", "loop.mp4", in_training("loop.mp4")),
    ("missing", "none.mp4", in_training("none.mp4")),
    ("too_short", "short.mp4 (5)", in_training("short.mp4")),
    ("variable_frame_rate", "variable.mp4", in_training("variable.mp4")),
    ("still", "still.mp4", in_training("still.mp4")),
    ("copies", "down0.mp4", in_training("down0_again.mkv")),
    ("copies_of_two_classes", "down0.mp4", in_training("down0_again.mkv", "up")),
    ("same_video_in_both", "down0.mp4", in_test({"down0_again.mkv": "down"})),
    ("same_video_in_both", "down0.mp4", in_test({"down0.mp4": "down"})),
    ("class_only_in_test", "sideways", in_test({"long.avi": "sideways"})),
    ("class_only_in_train", "sideways", in_training("long.avi", "sideways")),
    ("few_videos", "sideways", in_training("long.avi", "sideways")),
    ("labels_alike", "'Down'", in_training("long.avi", "Down")),
    ("labels_alike", "'DOWN'", in_test({"long.avi": "DOWN"})),
    ("no_label", "long.avi", in_training("long.avi", "")),
]


@pytest.mark.parametrize(("kind", "named", "plant"), PLANTED, ids=[f"{one[0]}-{one[1]}" for one in PLANTED])
def test_a_planted_fault_is_found_by_its_name(
    kind: str, named: str, plant: Callable[[Path], tuple[Path, Path]], videos: Path
) -> None:
    report = check_lists(*plant(videos))
    found = kinds(report)
    assert any(named in example for example in found[kind])
    assert report.passed == (not found.keys() & ERRORS)


def test_damage_in_the_middle_is_found_where_the_beginning_can_be_read(videos: Path) -> None:
    found = kinds(check_lists(*in_training("damaged.avi")(videos)))
    assert any(
        "damaged.avi" in name for name in (*found.get("decode_failed", ()), *found.get("unreadable", ()))
    )


def test_a_file_without_pictures_is_found(videos: Path, shared_data: Path) -> None:
    shutil.copy(shared_data / "odd" / "audio_only.m4a", videos / "sound.mp4")
    found = kinds(check_lists(*in_training("sound.mp4")(videos)))
    assert any("sound.mp4" in name for name in found["no_video_stream"])


def test_frame_rates_that_differ_are_found(videos: Path) -> None:
    report = check_lists(*in_training("fast.mp4")(videos))
    (finding,) = [one for one in report.findings if one.kind == "frame_rates_differ"]
    assert "60 (fast.mp4)" in finding.what


@pytest.mark.parametrize(
    ("again", "label"),
    [
        ("down0.mp4", "up"),
        ("./down0.mp4", "up"),
        ("{videos}/down0.mp4", "up"),
        ("{videos}/../videos/down0.mp4", "up"),
        ("./down0.mp4", ""),
    ],
)
def test_a_video_with_two_labels_is_found_however_its_path_is_written(
    again: str, label: str, videos: Path
) -> None:
    train = listed(videos / "train.csv", sound(range(2)))
    written = again.format(videos=videos).replace("/../videos/", f"/../{videos.name}/")
    with train.open("a") as stream:
        stream.write(f"{written},{label}\n")
    with pytest.raises(DataError, match="the labels of one video differ"):  # what training says
        read_video_list(train)
    report = check_lists(train)
    assert kinds(report)["two_labels"] == (written,)
    assert not {"copies", "no_label"} & kinds(report).keys()
    assert not report.passed


def test_a_video_that_is_listed_again_is_found(videos: Path) -> None:
    train = listed(videos / "train.csv", sound(range(2)))
    with train.open("a") as stream:
        stream.write("down1.mp4,down\n./up0.mp4,up\nup0.mp4,up\n")
    report = check_lists(train)
    assert kinds(report)["copies"] == ("down1.mp4", "up0.mp4")
    assert (report.passed, report.videos) == (True, 4)


def test_unequal_classes_are_found(videos: Path) -> None:
    for number in range(20):
        target = videos / f"more{number}.mp4"
        if not target.exists():
            write_video(target, moving_square("up", seed=100 + number, num_frames=16), gop=6)
    rows = {"down0.mp4": "down", "down1.mp4": "down"} | {f"more{number}.mp4": "up" for number in range(21)}
    found = check_lists(listed(videos / "train.csv", rows)).findings
    assert [one.kind for one in found if "'up' has 21" in one.what and "'down' 2" in one.what] == [
        "unbalanced"
    ]


def test_a_person_in_both_lists_is_found_by_column_and_by_name(videos: Path, tmp_path: Path) -> None:
    rows = {f"{label}{number}.mp4": f"{label},p{number}" for number in range(3) for label in LABELS}
    train = listed(videos / "train.csv", rows, header="path,label,group")
    test = listed(
        videos / "test.csv", {"down3.mp4": "down,p2", "up3.mp4": "up,p9"}, header="path,label,group"
    )
    assert kinds(check_lists(train, test))["same_group_in_both"] == ("p2",)
    bare = listed(
        videos / "bare.csv",
        {name: given.partition(",")[2] for name, given in rows.items()},
        header="path,group",
    )  # to pre-train on
    assert kinds(check_lists(bare, test))["same_group_in_both"] == ("p2",)
    lists = []
    for part, people in (("train", "ann bea cid"), ("test", "cid dan")):
        for place, name in enumerate(people.split()):
            for offset, label in enumerate(LABELS):
                seed = 200 + 10 * place + offset + 50 * (part == "test")
                path = tmp_path / part / label / f"{name}_{label}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_video(path, moving_square(label, seed=seed, num_frames=18), gop=6)
        lists.append(tmp_path / part)
    assert kinds(check_lists(*lists)) == {"same_group_in_both": ("cid",)}


def test_an_empty_class_folder_and_what_is_left_out_are_found(videos: Path, tmp_path: Path) -> None:
    for label in LABELS:
        (tmp_path / label).mkdir()
        for number in range(2):
            shutil.copy(videos / f"{label}{number}.mp4", tmp_path / label)
    (tmp_path / "jump").mkdir()
    (tmp_path / "up" / "notes.txt").write_text("x")
    report = check_lists(tmp_path)
    assert kinds(report)["empty_class"] == ("jump",)
    assert any("notes.txt" in one.what for one in report.findings if one.kind == "left_out")


def test_numbers_for_labels_are_a_trap_of_order(videos: Path) -> None:
    rows = {"down0.mp4": "2", "down1.mp4": "2", "up0.mp4": "10", "up1.mp4": "10"}
    assert kinds(check_lists(listed(videos / "train.csv", rows)))["label_order"] == ("as text 10, 2",)
    rows["up0.mp4"] = rows["up1.mp4"] = "1" * 5000  # no number that Python reads
    assert "label_order" not in kinds(check_lists(listed(videos / "train.csv", rows)))


def test_an_index_in_another_order_is_a_trap_too(videos: Path, tmp_path: Path) -> None:
    for label in ("Up", "Down"):
        (tmp_path / label).mkdir()
        for number in range(2):
            shutil.copy(
                videos / f"{label.lower()}{number}.mp4", tmp_path / label / f"v_{label}_g0{number}_c01.mp4"
            )
    (tmp_path / "classInd.txt").write_text("1 Up\n2 Down\n3 Walk\n")
    lines = [
        f"{label}/v_{label}_g0{n}_c01.mp4 {1 + (label == 'Down')}" for label in ("Up", "Down") for n in (0, 1)
    ]
    (tmp_path / "trainlist01.txt").write_text("\n".join(lines) + "\n")
    found = kinds(check_lists(tmp_path / "trainlist01.txt"))
    assert len(found["label_order"]) == 1
    assert "'Up' where we have 'Down'" in found["label_order"][0]
    assert found["empty_class"] == ("Walk",)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_found(videos: Path) -> None:
    locked = shutil.copy(videos / "down0.mp4", videos / "locked.mp4")
    Path(locked).chmod(0)
    found = kinds(check_lists(*in_training("locked.mp4")(videos)))
    assert "Permission denied" in found["unreadable"][0]


def test_a_list_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no list of videos"):
        check_lists(tmp_path / "none.csv")


def test_the_command_says_what_and_ends_with_its_verdict(
    videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = in_training("text.mp4")(videos)
    assert main(["check", str(train), "--test", str(test), "--json"]) == 1
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["passed"] is False
    (finding,) = report["findings"]
    assert (finding["kind"], finding["severity"], finding["count"]) == ("unreadable", "error", 1)
    assert printed.err.splitlines()[-1] == "FAIL: 9 videos, 1 kinds of errors, 0 kinds of warnings"
    assert main(["check", str(listed(videos / "a.csv", sound(range(3))))]) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("PASS: 6 videos")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["actions-mini", "actions-dark"])
def test_the_real_sets_pass(name: str, shared_data: Path) -> None:
    folder = shared_data / name
    report = check_lists(folder / "train.csv", folder / "test.csv")
    assert report.passed
    assert report.findings == ()
