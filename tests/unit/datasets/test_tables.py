"""Csv and Parquet."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lists import entries, refusal, write

from ivdr_deploy.datasets.lists import read_video_list


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


@pytest.mark.parametrize("end", ["\x85", "\u2028", "\x0b", "\x1c", "\n"])
def test_a_quoted_value_may_hold_what_python_calls_a_line_end(tmp_path: Path, end: str) -> None:
    text = f'path,label\n"a{end}b.mp4","sit{end}down"\nc.mp4,run\n'
    assert entries(read_video_list(write(tmp_path / "a.csv", text))) == [
        (f"a{end}b.mp4", f"sit{end}down"),
        ("c.mp4", "run"),
    ]


def test_csv_of_path_blank_label_without_a_header_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", "x/a b.mp4 0\nx/c.mp4 12\n")
    assert entries(read_video_list(path)) == [("x/a b.mp4", "0"), ("x/c.mp4", "12")]


def test_tab_separated_columns(tmp_path: Path) -> None:
    assert entries(read_video_list(write(tmp_path / "a.tsv", "label\tpath\nwalk\ta, b.mp4\n"))) == [
        ("a, b.mp4", "walk")
    ]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_every_kind_of_path_keeps_its_group_and_its_label(tmp_path: Path, kind: str) -> None:
    written = ["a.mp4", "s3://b/a.mp4", "https://h/a.mp4", "caf\u00e9.mp4", "~/a.mp4", "../a b.mp4"]
    groups = [f"g{number}" for number in range(len(written))]
    labels = ["", "walk", "caf\u00e9", "walk", "", "walk"]
    if kind == "csv":
        lines = ["group,label,path", *map(",".join, zip(groups, labels, written, strict=True))]
        path = write(tmp_path / "a.csv", "\n".join(lines) + "\n")
    else:
        path = write_parquet(tmp_path / "a.parquet", group=groups, label=labels, path=written)
    items = read_video_list(path).items
    assert [item.uri for item in items] == written
    assert [item.group for item in items] == groups
    assert [item.label for item in items] == [label or None for label in labels]


def test_a_message_does_not_repeat_a_long_line(tmp_path: Path) -> None:
    assert len(refusal(write(tmp_path / "a.csv", "path,label\n" + "x" * 100_000 + "\n"))) < 500
    assert len(refusal(write(tmp_path / "b.csv", "x" * 100_000 + "\n"))) < 600


def test_binary_and_utf16_csv_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("path,label\na.mp4,walk\n".encode("utf-16"))
    assert "save a list as UTF-8" in refusal(tmp_path / "a.csv")


def write_parquet(file: Path, /, **columns: object) -> Path:
    pq.write_table(pa.table(columns), file)
    return file


def test_parquet_takes_path_and_label(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "a.parquet", fps=[1, 2], label=["sit, down", None], path=["x/a.mp4", "b.mp4"]
    )
    videos = read_video_list(path, root=tmp_path / "root")
    assert entries(videos) == [("x/a.mp4", "sit, down"), ("b.mp4", None)]
    assert videos.items[0].path == tmp_path / "root/x/a.mp4"
    assert entries(read_video_list(write_parquet(tmp_path / "b.parquet", path=["a"], label=[3]))) == [
        ("a", "3")
    ]
    assert entries(read_video_list(write_parquet(tmp_path / "c.parquet", path=["a"]))) == [("a", None)]


def test_unusable_parquet_is_refused(tmp_path: Path) -> None:
    assert "has the columns 'video'; expected path" in refusal(
        write_parquet(tmp_path / "a.parquet", video=["a"])
    )
    assert "row 2 is" in refusal(write_parquet(tmp_path / "b.parquet", path=["a", None]))
    assert "expected text" in refusal(write_parquet(tmp_path / "c.parquet", path=["a"], label=[0.5]))
    assert "cannot be read as Parquet" in refusal(write(tmp_path / "d.parquet", "no table"))


def test_a_column_that_is_there_twice_is_refused_in_both_forms(tmp_path: Path) -> None:
    assert "'path,label,label'" in refusal(write(tmp_path / "a.csv", "path,label,label\na,b,c\n"))
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["path", "label", "label"])
    pq.write_table(twice, tmp_path / "a.parquet")
    assert "has the column 'label'" in refusal(tmp_path / "a.parquet")
