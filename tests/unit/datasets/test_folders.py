"""Folders: what is listed, what is passed over, and that it is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from lists import entries, refusal, touch
from rights import let_all_enter, without_rights

from ivdr_deploy.datasets.lists import VideoList, read_video_list


def left_out(videos: VideoList) -> dict[str, int]:
    return {entry.reason: entry.count for entry in videos.left_out}


def test_class_folders_name_the_classes(tmp_path: Path) -> None:
    touch(tmp_path, "walk/b.mp4", "walk/deep/a.AVI", "run/c.webm", "notes.txt", "run/labels.csv")
    videos = read_video_list(tmp_path)
    assert entries(videos) == [("run/c.webm", "run"), ("walk/b.mp4", "walk"), ("walk/deep/a.AVI", "walk")]
    assert videos.labels == ("run", "walk")
    assert videos.items[0].path == tmp_path / "run" / "c.webm"


def test_folder_with_videos_in_it_has_no_labels(tmp_path: Path) -> None:
    touch(tmp_path, "b.mp4", "sub/a.mp4")
    assert entries(read_video_list(tmp_path)) == [("b.mp4", None), ("sub/a.mp4", None)]


def test_hidden_files_and_folders_are_not_videos(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", ".b.mp4", ".cache/c.mp4")
    assert entries(read_video_list(tmp_path)) == [("a.mp4", None)]


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "readme.txt")
    assert "holds no videos" in refusal(tmp_path)


def test_what_is_passed_over_is_counted_by_reason_and_the_first_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", ".b.mp4", ".cache/c.mp4", "1.txt", "2.txt", "sub/3.txt", "sub/4")
    os.mkfifo(tmp_path / "pipe.mp4")
    videos = read_video_list(tmp_path)
    assert left_out(videos) == {
        "hidden": 2,
        "without the suffix of a video": 4,
        "neither files nor folders": 1,
    }
    assert str(videos.left_out[1]) == "4 without the suffix of a video: 1.txt, 2.txt, sub/3.txt and 1 more"
    assert "left out: 1 without the suffix of a video: readme" in refusal_of_only(
        tmp_path / "other", "readme"
    )


def refusal_of_only(folder: Path, name: str) -> str:
    touch(folder, name)
    return refusal(folder)


def test_linked_folders_and_files_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "videos/walk/a.mp4", "elsewhere/b.mp4", "elsewhere/deep/c.mp4", "single/d.mp4")
    (tmp_path / "videos" / "run").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "videos" / "walk" / "e.mp4").symlink_to(tmp_path / "single" / "d.mp4")
    videos = read_video_list(tmp_path / "videos")
    assert entries(videos) == [
        ("run/b.mp4", "run"),
        ("run/deep/c.mp4", "run"),
        ("walk/a.mp4", "walk"),
        ("walk/e.mp4", "walk"),
    ]
    assert not videos.left_out


def test_links_are_followed_once_and_real_names_come_first(tmp_path: Path) -> None:
    touch(tmp_path, "z/walk/x.mp4")
    (tmp_path / "a").symlink_to(tmp_path / "z")
    (tmp_path / "z" / "up").symlink_to(tmp_path)
    (tmp_path / "z" / "walk" / "again.mp4").symlink_to("x.mp4")
    videos = read_video_list(tmp_path)
    assert entries(videos) == [("z/walk/x.mp4", "z")]
    assert left_out(videos) == {"links to folders that are listed already": 2, "repeated": 1}


def test_a_link_from_another_class_to_a_listed_video_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "walk/x.mp4")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "x.mp4").symlink_to(tmp_path / "walk" / "x.mp4")
    message = refusal(tmp_path)
    assert "'walk'" in message
    assert "'run'" in message


def test_a_link_that_leads_nowhere_is_an_item_if_it_is_named_like_a_video(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    (tmp_path / "b.mp4").symlink_to("absent.mp4")
    (tmp_path / "c").symlink_to("absent")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    videos = read_video_list(tmp_path)
    assert [uri for uri, _ in entries(videos)] == ["a.mp4", "b.mp4", "loop.mp4"]
    assert left_out(videos) == {"links that lead nowhere (No such file or directory)": 1}
    assert videos.data_hash


@pytest.fixture
def open_path(tmp_path: Path) -> Path:
    """A folder that every user may enter."""
    return let_all_enter(tmp_path)


def test_folders_without_permission_are_counted_and_the_rest_is_listed(open_path: Path) -> None:
    touch(open_path, "videos/good/a.mp4", "videos/locked/b.mp4", "videos/names_only/c.mp4")
    (open_path / "videos/locked").chmod(0)
    (open_path / "videos/names_only").chmod(0o444)  # can be listed, and nothing in it looked at
    with without_rights():
        videos = read_video_list(open_path / "videos")
        assert len(videos.data_hash) == 64
    (open_path / "videos/locked").chmod(0o755)
    (open_path / "videos/names_only").chmod(0o755)
    assert [uri for uri, _ in entries(videos)] == ["good/a.mp4", "names_only/c.mp4"]
    assert left_out(videos) == {"folders that cannot be read (Permission denied)": 1}
    assert [entry.unread for entry in videos.left_out] == [True]


def test_a_folder_that_cannot_be_read_is_refused(open_path: Path) -> None:
    touch(open_path, "locked/b.mp4")
    (open_path / "locked").chmod(0)
    with without_rights():
        assert "cannot be read (Permission denied)" in refusal(open_path / "locked")
        assert "no list of videos at" in refusal(open_path / "locked" / "b.csv")
    (open_path / "locked").chmod(0o755)
