"""What holds for lists of every form: labels, repeated videos, roots, names, and what is refused."""

import errno
import io
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lists import entries, refusal, touch, write

from ivdr_deploy.datasets.lists import VideoStream, read_video_list
from ivdr_deploy.errors import ConfigError, DataError


def test_missing_list_is_refused(tmp_path: Path) -> None:
    assert "no list of videos at" in refusal(tmp_path / "train.csv")


def test_video_in_place_of_a_list_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    assert "is a video, not a list" in refusal(tmp_path / "a.mp4")


def test_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00\x81")
    assert "cannot be read as text" in refusal(tmp_path / "list.txt")


def test_a_repeated_video_is_one_item_however_it_is_written(tmp_path: Path) -> None:
    lines = f"a.mp4,x\nb.mp4,x\n./sub/../a.mp4,x \n{tmp_path}/a.mp4,x\n"
    videos = read_video_list(write(tmp_path / "a.csv", f"path,label\n{lines}"))
    assert entries(videos) == [("a.mp4", "x"), ("b.mp4", "x")]
    (left,) = videos.left_out
    assert (left.reason, left.count, left.examples[0]) == ("repeated", 2, "./sub/../a.mp4")


def test_a_repeated_video_with_another_label_is_refused_naming_both(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.csv", "path,label\na.mp4,x\nb.mp4,x\n./sub/../a.mp4,y\n"))
    assert re.search(r"a\.mp4' is 'x' \(.*line 2\) and 'y' \(.*line 4\)", message)
    assert "differ" in refusal(write(tmp_path / "b.csv", "path,label\na.mp4,x\na.mp4,\n"))


def test_labels_that_differ_in_form_or_blanks_are_one_class(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    path = write(
        tmp_path / "a.csv", f"path,label\na.mp4,{composed}\nb.mp4,{decomposed}\nc.mp4, {composed}\u00a0\n"
    )
    videos = read_video_list(path)
    assert videos.labels == (composed,)
    assert videos.targets([decomposed]) == [0, 0, 0]


@pytest.mark.parametrize(
    ("one", "other"), [("Walk", "walk"), ("sit down", "sit  down"), ("file", "\ufb01le")]
)
def test_labels_that_look_alike_are_refused_showing_both(tmp_path: Path, one: str, other: str) -> None:
    message = refusal(write(tmp_path / "a.csv", f"path,label\na.mp4,{one}\nb.mp4,{other}\n"))
    assert repr(one) in message
    assert repr(other) in message
    touch(tmp_path / "folder", f"{one}/a.mp4", f"{other}/b.mp4")
    assert repr(one) in refusal(tmp_path / "folder")


def test_an_unknown_class_that_looks_like_a_known_one_is_shown_beside_it(tmp_path: Path) -> None:
    videos = read_video_list(write(tmp_path / "a.csv", "path,label\na.mp4,Walk\n"))
    with pytest.raises(DataError, match="'Walk' is 'walk' there"):
        videos.targets(["run", "walk"])


@pytest.mark.parametrize("suffix", ["json", "JSONL", "xml", "yaml"])
def test_files_of_other_kinds_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    message = refusal(write(tmp_path / f"a.{suffix}", '{"a.mp4": "walk"}\n'))
    assert f".{suffix.lower()} file" in message
    assert "csv" in message


def test_entries_that_cannot_be_looked_at_are_items(tmp_path: Path) -> None:
    long = "x" * 300 + ".mp4"
    touch(tmp_path, "a.mp4")
    videos = read_video_list(write(tmp_path / "a.csv", f"path\na.mp4\n{long}\n"))
    assert [item.uri for item in videos.items] == ["a.mp4", long]
    assert len(videos.data_hash) == 64
    with pytest.raises(DataError, match="1 of 2 videos do not exist"):
        videos.require_files()


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_list_that_cannot_be_looked_at_is_refused(tmp_path: Path, name: str) -> None:
    assert "no list of videos at" in refusal(tmp_path / name)


def test_relative_paths_start_at_the_root_that_is_given(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "path\nx/a.mp4\n/abs/b.mp4\n")
    videos = read_video_list(path, root="/data")
    assert [item.path for item in videos.items] == [Path("/data/x/a.mp4"), Path("/abs/b.mp4")]
    touch(tmp_path / "folder", "a.mp4")
    with pytest.raises(ConfigError, match="is for list files"):
        read_video_list(tmp_path / "folder", root="/data")


def test_a_path_in_a_list_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    videos = read_video_list(write(tmp_path / "a.txt", "~/a.mp4\n~b.mp4\n"))
    assert [item.path for item in videos.items] == [Path("/home/someone/a.mp4"), tmp_path / "~b.mp4"]


def test_names_that_are_not_utf8_keep_their_bytes_and_have_a_valid_uri(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9.avi"
    Path(os.fsdecode(raw)).write_bytes(b"1")
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.avi walk\n")
    (tmp_path / "list.csv").write_bytes(b"path,label\ncaf\xe9.avi,walk\n")
    for source in (tmp_path, tmp_path / "list.txt", tmp_path / "list.csv"):
        (item,) = read_video_list(source).items
        assert os.fsencode(item.path) == raw
        assert item.uri == "caf\\xe9.avi"
        read_video_list(source).require_files()


def test_a_class_folder_that_is_not_utf8_gives_a_valid_label(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    touch(tmp_path, f"{folder.name}/a.mp4", "b/b.mp4")
    assert read_video_list(tmp_path).labels == ("b", "caf\\xe9")


@pytest.mark.parametrize(
    "written", ["a.avi", "/abs/a.avi", "caf\xe9.avi", "s3://b/a.mp4", "gs://b/caf\xe9.mp4", "https://h/a.mp4"]
)
def test_a_label_in_a_list_that_is_not_utf8_is_refused(tmp_path: Path, written: str) -> None:
    path = written.encode("latin-1")
    (tmp_path / "list.csv").write_bytes(b"path,label\nb.avi,walk\n" + path + b",caf\xe9\n")
    (tmp_path / "list.txt").write_bytes(b"b.avi walk\n" + path + b" caf\xe9\n")
    assert "line 3: the label 'caf\\udce9' is not UTF-8" in refusal(tmp_path / "list.csv")
    assert "line 2: the label 'caf\\udce9' is not UTF-8" in refusal(tmp_path / "list.txt")


@pytest.mark.parametrize("place", ["s3://b", "https://h"])
def test_a_url_that_is_not_utf8_has_a_valid_uri(tmp_path: Path, place: str) -> None:
    (tmp_path / "list.csv").write_bytes(b"path,label\n" + place.encode() + b"/caf\xe9.mp4,caf\xc3\xa9\n")
    assert entries(read_video_list(tmp_path / "list.csv")) == [(f"{place}/caf\\xe9.mp4", "caf\u00e9")]


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


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "walk_test_split1.txt", "a.parquet"])
@pytest.mark.parametrize("change", ["appended", "cut off", "renamed into its place"])
def test_a_list_that_is_written_to_while_it_is_read_is_not_taken_for_whole(
    tmp_path: Path, name: str, change: str
) -> None:
    lines = [f"{index}.mp4" + (" 1" if "split" in name else "") for index in range(3000)]
    listed = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"path": lines}), listed)
    else:
        listed.write_text("\n".join([*(["path"] if name == "a.csv" else []), *lines]))
    found = iter(VideoStream(listed))
    assert next(found).uri == "0.mp4"
    before = listed.stat()
    if change == "appended":
        with listed.open("ab") as stream:
            stream.write(b"\nmore.mp4 1")
    elif change == "cut off":
        os.truncate(listed, before.st_size - 9)
    else:
        (tmp_path / "new").write_text("")
        (tmp_path / "new").rename(listed)

    if change.startswith("renamed"):
        assert len([*found]) == 2999, "the list that was opened is whole"
        return
    with pytest.raises(
        DataError, match=r"was written to while it was read|cannot be read as Parquet"
    ) as caught:
        list(found)
    assert name in str(caught.value)


def test_a_list_that_the_disk_does_not_give_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = write(tmp_path / "a.csv", "path\na.mp4\n")

    class Refusing(io.BytesIO):
        def fileno(self) -> int:
            return os.open(listed, os.O_RDONLY)

        def read(self, *_: object) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", lambda *_, **__: Refusing())
    assert f"{listed} cannot be read (Input/output error)" in refusal(listed)


def test_a_message_does_not_repeat_a_long_name(tmp_path: Path) -> None:
    name = "x" * 100_000
    assert len(refusal(write(tmp_path / "a.csv", f"path,label\n{name},a\n{name},b\n"))) < 700
