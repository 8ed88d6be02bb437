"""Text lists."""

from __future__ import annotations

from pathlib import Path

import pytest
from lists import entries, refusal, write

from ivdr_deploy.datasets.lists import read_video_list


def test_text_list_of_paths_and_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x/a.mp4 3\nmy clips/b c.avi sit down\n\n/abs/d.mp4\t7\n")
    assert entries(read_video_list(path)) == [
        ("x/a.mp4", "3"),
        ("my clips/b c.avi", "sit down"),
        ("/abs/d.mp4", "7"),
    ]


def test_text_list_of_bare_paths(tmp_path: Path) -> None:
    path = write(tmp_path / "list", "x/a.mp4\nmy clips/b c.MKV\nframes_001\n")
    assert entries(read_video_list(path)) == [
        ("x/a.mp4", None),
        ("my clips/b c.MKV", None),
        ("frames_001", None),
    ]


def test_text_line_without_a_video_suffix_splits_at_the_first_blank(tmp_path: Path) -> None:
    assert entries(read_video_list(write(tmp_path / "a.txt", "clip_1 walk\n"))) == [("clip_1", "walk")]


def test_quoted_paths_and_labels(tmp_path: Path) -> None:
    text = """"my clips/b c.avi" "sit down"\n'd e' walk\n"f.mp4 old"\n'tis.mp4 run\n"""
    assert entries(read_video_list(write(tmp_path / "a.txt", text))) == [
        ("my clips/b c.avi", "sit down"),
        ("d e", "walk"),
        ("f.mp4 old", None),
        ("'tis.mp4", "run"),
    ]


def test_comment_lines_are_no_videos_and_names_may_begin_with_their_sign(tmp_path: Path) -> None:
    text = "# made by hand\n#\n#no blank\n  ## x.mp4\na.mp4 walk\n# b.mp4 walk\n#20_clap.avi clap\n"
    assert entries(read_video_list(write(tmp_path / "a.txt", text))) == [
        ("a.mp4", "walk"),
        ("#20_clap.avi", "clap"),
    ]


@pytest.mark.parametrize("end", ["\x85", "\u2028", "\x0b", "\x0c", "\x1d"])
def test_only_line_ends_of_editors_end_a_line(tmp_path: Path, end: str) -> None:
    path = write(tmp_path / "a.txt", f"a{end}b.mp4 sit{end}down\r\nc.mp4 run\n")
    assert entries(read_video_list(path)) == [(f"a{end}b.mp4", f"sit{end}down"), ("c.mp4", "run")]


def test_a_tab_ends_a_path_without_a_suffix(tmp_path: Path) -> None:
    assert entries(read_video_list(write(tmp_path / "a.txt", "clip_1\tsit down\n"))) == [
        ("clip_1", "sit down")
    ]


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a_test_split1.txt", "classInd.txt"])
def test_a_file_without_line_ends_is_not_read_whole(tmp_path: Path, name: str) -> None:
    """There are files of many gigabytes that begin like text."""
    path = write(tmp_path / name, "path,label\n" * (name == "a.csv") + "x," * (1 << 20))
    if name == "classInd.txt":
        path = write(tmp_path / "trainlist01.txt", "Sit/a.avi 1\n")
    assert "has a line of more than 1048576 bytes" in refusal(path)


@pytest.mark.parametrize("end", ["\n", "\r"])
def test_a_list_of_short_lines_may_be_longer_than_a_line(tmp_path: Path, end: str) -> None:
    count = (1 << 21) // 1000 + 1
    path = tmp_path / "a.txt"
    path.write_bytes("".join(f"{number:0996d}.mp4{end}" for number in range(count)).encode())
    assert len(read_video_list(path).items) == count
