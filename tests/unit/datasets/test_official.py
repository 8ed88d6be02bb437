"""The lists that data sets are published with, in the form in which they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from lists import entries, refusal, touch, write

from ivdr_deploy.datasets.lists import VideoStream, read_video_list
from ivdr_deploy.errors import DataError


@pytest.fixture
def hmdb(tmp_path: Path) -> Path:
    """Two classes, two splits; a name that begins with the sign of comments, as in HMDB51."""
    for split, uses in (("1", (1, 2, 0)), ("2", (2, 1, 1))):
        for label in ("brush_hair", "clap"):
            names = (f"{label}_a.avi", f"#20_{label}.avi", f"{label}_c.avi")
            lines = "".join(f"{name} {use} \n" for name, use in zip(names, uses, strict=True))
            write(tmp_path / f"{label}_test_split{split}.txt", lines)
    return tmp_path


def test_hmdb_file_names_the_class_and_numbers_the_part(hmdb: Path) -> None:
    path = hmdb / "clap_test_split1.txt"
    videos = read_video_list(path)
    assert entries(videos) == [("clap_a.avi", "clap"), ("#20_clap.avi", "clap")]
    assert [str(entry) for entry in videos.left_out] == ["1 not used by the split: clap_c.avi"]
    assert entries(read_video_list(path, part="train")) == [("clap_a.avi", "clap")]
    assert entries(read_video_list(path, part="test")) == [("#20_clap.avi", "clap")]


def test_hmdb_files_of_one_split_are_one_list(hmdb: Path) -> None:
    touch(hmdb / "videos", "clap/clap_a.avi", "brush_hair/brush_hair_a.avi")
    every = hmdb / "*_test_split1.txt"
    videos = read_video_list(every, root=hmdb / "videos", part="train")
    assert entries(videos) == [("brush_hair/brush_hair_a.avi", "brush_hair"), ("clap/clap_a.avi", "clap")]
    videos.require_files()


def test_hmdb_folder_of_one_split_is_a_list_and_of_two_is_refused(hmdb: Path) -> None:
    assert "*_test_split1.txt" in refusal(hmdb)
    for path in hmdb.glob("*_test_split2.txt"):
        path.unlink()
    videos = read_video_list(hmdb, part="test")
    assert videos.labels == ("brush_hair", "clap")
    assert sum(entry.count for entry in videos.left_out) == 4


def test_hmdb_pattern_takes_what_is_named_like_its_files_and_nothing_else(hmdb: Path) -> None:
    write(hmdb / "_test_split1.txt", "no class\n")
    assert read_video_list(hmdb / "*_test_split1.txt").labels == ("brush_hair", "clap")
    assert read_video_list(hmdb / "**p_test_split1.txt").labels == ("clap",)
    assert "no list of videos at" in refusal(hmdb / "absent" / "*_test_split1.txt")


def test_hmdb_folder_of_many_splits_does_not_fill_the_message(tmp_path: Path) -> None:
    for split in range(300):
        write(tmp_path / f"clap_test_split{split}.txt", "a.avi 1\n")
    message = refusal(tmp_path)
    assert "and 297 more of HMDB51" in message
    assert len(message) < 500


def test_hmdb_line_of_another_form_is_refused(tmp_path: Path) -> None:
    assert "line 1 is 'a.avi 3'" in refusal(write(tmp_path / "clap_test_split1.txt", "a.avi 3\n"))


@pytest.fixture
def ucf(tmp_path: Path) -> Path:
    write(tmp_path / "classInd.txt", "1 ApplyEyeMakeup\r\n2 Archery\r\n\r\n")
    write(tmp_path / "trainlist01.txt", "Archery/v_Archery_g08_c01.avi 2\nApplyEyeMakeup/v_g08_c02.avi 1\n")
    write(tmp_path / "testlist01.txt", "Archery/v_Archery_g01_c01.avi\nApplyEyeMakeup/v_g01_c02.avi\n")
    return tmp_path


def test_ucf_numbers_are_those_of_the_index_and_the_test_list_has_the_folders(ucf: Path) -> None:
    assert [label for _, label in entries(read_video_list(ucf / "trainlist01.txt"))] == [
        "Archery",
        "ApplyEyeMakeup",
    ]
    test = read_video_list(ucf / "testlist01.txt", root="/data")
    assert test.labels == ("ApplyEyeMakeup", "Archery")
    assert test.items[0].path == Path("/data/Archery/v_Archery_g01_c01.avi")


def test_ucf_list_is_read_as_it_is_gone_through_and_not_held(ucf: Path) -> None:
    videos = iter(VideoStream(ucf / "trainlist01.txt"))
    assert next(videos).label == "Archery"
    with (ucf / "trainlist01.txt").open("a") as stream:
        stream.write("Archery/v_Archery_g09_c01.avi 2\n")
    with pytest.raises(DataError, match="was written to while it was read"):
        list(videos)


def test_ucf_without_an_index_takes_the_folders(ucf: Path) -> None:
    (ucf / "classInd.txt").unlink()
    for name in ("trainlist01.txt", "testlist01.txt"):
        assert read_video_list(ucf / name).labels == ("ApplyEyeMakeup", "Archery")
    write(ucf / "trainlist02.txt", "videos/a.avi 1\nvideos/b.avi 2\n")
    with pytest.raises(DataError, match="is not in"):
        read_video_list(ucf / "trainlist02.txt")
    write(ucf / "trainlist03.txt", "Archery/a.avi 1\nWalk/b.avi 1\n")
    with pytest.raises(DataError, match="class 1 is 'Archery', and the folder is 'Walk'"):
        read_video_list(ucf / "trainlist03.txt")


def test_an_index_beside_any_list_of_numbers_names_its_classes(ucf: Path) -> None:
    assert entries(read_video_list(write(ucf / "mine.txt", "videos/a.avi 2\n"))) == [
        ("videos/a.avi", "Archery")
    ]
    assert entries(read_video_list(write(ucf / "named.txt", "a.avi walk\n"))) == [("a.avi", "walk")]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("Archery/a.avi 3", "class '3' is not in"),
        ("Archery/a.avi 0", "class '0' is not in"),
        ("Archery/a.avi 1", "class 1 is 'ApplyEyeMakeup', and the folder is 'Archery'"),
        ("Walk/a.avi", "class 'Walk' is not in"),
        ("a.avi", "class '' is not in"),
    ],
)
def test_ucf_line_that_contradicts_the_index_is_refused(ucf: Path, line: str, found: str) -> None:
    assert found in refusal(write(ucf / "trainlist02.txt", line + "\n"))


def test_malformed_class_index_is_refused(ucf: Path) -> None:
    for text in ("1 a\n1 b\n", "one a\n", "1\n", "1 a\n2 a\n"):
        write(ucf / "classInd.txt", text)
        assert "classInd.txt" in refusal(ucf / "trainlist01.txt")


def test_kinetics_annotations_name_the_files(tmp_path: Path) -> None:
    text = "label,youtube_id,time_start,time_end,split\nair drumming,-0x_1,7,17,train\nclap,abc,0,10,train\n"
    touch(tmp_path, "air drumming/-0x_1_000007_000017.mp4")
    videos = read_video_list(write(tmp_path / "train.csv", text))
    assert entries(videos) == [
        ("air drumming/-0x_1_000007_000017.mp4", "air drumming"),
        ("abc_000000_000010.mp4", "clap"),
    ]
    text = "youtube_id,time_start,time_end,split\nabc,x,10,test\n"
    assert "line 2" in refusal(write(tmp_path / "bad.csv", text))


def test_numbers_that_no_list_has_are_refused_and_not_read(tmp_path: Path) -> None:
    header = "label,youtube_id,time_start,time_end,split\n"
    for start in ("9" * 400, "1e400", "-1", "", "."):
        assert "expected 5 values" in refusal(write(tmp_path / "k.csv", f"{header}sit,a,{start},2,train\n"))
    write(tmp_path / "classInd.txt", f"1 Sit\n{'9' * 5000} Stand\n")
    assert "line 2 is" in refusal(write(tmp_path / "trainlist01.txt", "Sit/a.avi 1\n"))
    write(tmp_path / "classInd.txt", "1 Sit\n")
    huge = write(tmp_path / "trainlist01.txt", f"Sit/a.avi {'9' * 5000}\n")
    assert entries(read_video_list(huge)) == [("Sit/a.avi", "9" * 5000)], "no number of a class, so a label"
