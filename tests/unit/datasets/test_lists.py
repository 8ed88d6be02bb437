"""Every accepted form of a list, and every wrong one with its reason."""

from pathlib import Path

import pytest

from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.errors import DataError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def entries(videos: VideoList) -> list[tuple[str, str | None]]:
    return [(item.uri, item.label) for item in videos.items]


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_video_list(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- folders


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


# --- csv


def test_csv_takes_path_and_label_from_any_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufefffps,label,path\n25,walk,x/a.mp4\n\n30,"sit, down",/abs/b.mp4\n')
    videos = read_video_list(path)
    assert entries(videos) == [("x/a.mp4", "walk"), ("/abs/b.mp4", "sit, down")]
    assert [item.path for item in videos.items] == [tmp_path / "x/a.mp4", Path("/abs/b.mp4")]


def test_csv_without_labels_and_with_empty_labels(tmp_path: Path) -> None:
    assert entries(read_video_list(write(tmp_path / "a.csv", "path\na.mp4\n"))) == [("a.mp4", None)]
    assert entries(read_video_list(write(tmp_path / "b.csv", "path,label\na.mp4,\n"))) == [("a.mp4", None)]


def test_wrong_csv_header_is_shown_beside_the_expected_one(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.csv", "video,class\na.mp4,walk\n"))
    assert "'video,class'" in message
    assert "path" in message
    assert "label" in message


def test_csv_line_of_another_length_is_named(tmp_path: Path) -> None:
    assert "line 3" in refusal(write(tmp_path / "a.csv", "path,label\na.mp4,walk\nb.mp4\n"))


def test_csv_with_a_header_only_holds_no_videos(tmp_path: Path) -> None:
    assert "holds no videos" in refusal(write(tmp_path / "a.csv", "path,label\n"))


def test_empty_csv_is_refused(tmp_path: Path) -> None:
    assert "expected a header" in refusal(write(tmp_path / "a.csv", ""))


# --- text


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


# --- what goes wrong


def test_missing_list_is_refused(tmp_path: Path) -> None:
    assert "no list of videos at" in refusal(tmp_path / "train.csv")


def test_video_in_place_of_a_list_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    assert "is a video, not a list" in refusal(tmp_path / "a.mp4")


def test_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00\x81")
    assert "cannot be read as text" in refusal(tmp_path / "list.txt")


def test_repeated_videos_are_refused_however_they_are_written(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.csv", "path,label\na.mp4,x\nb.mp4,x\n./sub/../a.mp4,y\n"))
    assert "1 videos occur more than once" in message
    assert "a.mp4" in message


def test_absent_files_are_counted_and_the_first_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    lines = "".join(f"{name}.mp4,x\n" for name in "abcdefg")
    videos = read_video_list(write(tmp_path / "a.csv", f"path,label\n{lines}"))
    with pytest.raises(DataError, match=r"6 of 7 videos do not exist: .*b\.mp4.* and 3 more"):
        videos.require_files()


def test_missing_labels_are_counted_and_the_first_named(tmp_path: Path) -> None:
    videos = read_video_list(write(tmp_path / "a.csv", "path,label\na.mp4,x\nb.mp4,\n"))
    with pytest.raises(DataError, match=r"1 of 2 videos have no label: b\.mp4"):
        videos.require_labels()


def test_targets_are_positions_and_unknown_classes_are_named(tmp_path: Path) -> None:
    videos = read_video_list(write(tmp_path / "a.csv", "path,label\na.mp4,x\nb.mp4,y\n"))
    assert videos.targets(["w", "y", "x"]) == [2, 1]
    with pytest.raises(DataError, match="1 classes are unknown to training: y"):
        videos.targets(["x", "z"])


def test_data_hash_follows_names_labels_and_sizes_but_not_the_place(tmp_path: Path) -> None:
    def hashed(folder: str, label: str = "walk", content: bytes = b"1") -> str:
        touch(tmp_path, f"{folder}/a.mp4")
        (tmp_path / folder / "a.mp4").write_bytes(content)
        return read_video_list(write(tmp_path / folder / "l.csv", f"path,label\na.mp4,{label}\n")).data_hash

    same = hashed("one")
    assert same == hashed("two")
    assert same != hashed("three", label="run")
    assert same != hashed("four", content=b"22")
