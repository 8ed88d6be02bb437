"""What a listing passes over is said by every command that lists, and a folder that could not be read is no success."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from clips import moving_square
from rights import make_too_deep
from runs import finetune_config
from videos import write_video

from train.__main__ import main
from train.config import DataConfig
from train.config_file import settings_toml
from train.finetune import finetune

UNREAD = "left out: 1 folders that cannot be read (File name too long): "


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of videos of three people."""
    folder = tmp_path_factory.mktemp("sound") / "clips"
    for seed, name in enumerate(("ann", "bea", "cid")):
        for offset, label in enumerate(("down", "up")):
            path = folder / label / f"{name}_{label}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, moving_square(label, seed=2 * seed + offset, num_frames=18), gop=6)
    return folder


@pytest.fixture
def clips(sound: Path, tmp_path: Path) -> Path:
    """A copy for one test."""
    return shutil.copytree(sound, tmp_path / "clips")


def unread(clips: Path) -> Path:
    make_too_deep(clips / "jump")
    return clips


def without_suffix(clips: Path) -> Path:
    (clips / "up" / "notes.txt").write_text("x")
    return clips


def repeated(clips: Path) -> Path:
    rows = [(path, path.parent.name) for path in sorted(clips.rglob("*.mp4"))]
    with (clips / "list.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("path", "label"), *rows, rows[0]])
    return clips / "list.csv"


PASSED_OVER = pytest.mark.parametrize(
    ("plant", "said"),
    [
        (unread, UNREAD + "jump/ddd"),
        (without_suffix, "left out: 1 without the suffix of a video: up/notes.txt"),
        (repeated, "left out: 1 repeated: "),
    ],
)


def once(capsys: pytest.CaptureFixture[str], said: str) -> bool:
    return capsys.readouterr().err.count(said) == 1


@PASSED_OVER
def test_the_one_line_says_what_its_lists_do_not_hold(
    plant: Callable[[Path], Path], said: str, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["finetune", str(plant(clips)), f"out={tmp_path / 'run'}", "init="]
    assert main([*line, "--print-config"]) == 0
    assert once(capsys, said)
    assert (tmp_path / "run" / "lists" / "train.csv").is_file()


@pytest.mark.parametrize("name", ["train", "test", "validation"])
@PASSED_OVER
def test_a_dry_run_says_it_of_each_list(
    plant: Callable[[Path], Path],
    said: str,
    name: str,
    sound: Path,
    clips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = replace(DataConfig(train=str(sound)), **{name: str(plant(clips))})
    (tmp_path / "c.toml").write_text(settings_toml(finetune_config(tmp_path / "run", data)))
    main(["finetune", "--config", str(tmp_path / "c.toml"), "--dry-run"])
    assert once(capsys, said)


@PASSED_OVER
def test_a_linear_probe_says_it_of_its_test_list(
    plant: Callable[[Path], Path],
    said: str,
    data: DataConfig,
    pretrained: Path,
    clips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lists = replace(data, test=str(plant(clips)))
    finetune(finetune_config(tmp_path / "run", lists, init=str(pretrained), linear_probe=True))
    assert once(capsys, said)


# --- a folder that could not be read


def code_of(line: list[str], clips: Path) -> int:
    """Exit code of a command on a folder."""
    return main([word.replace("CLIPS", str(clips)) for word in line])


@pytest.mark.parametrize("line", [["CLIPS"], ["SOUND", "--test", "CLIPS"]])
def test_the_doctor_does_not_pass_a_folder_that_could_not_be_read(
    line: list[str], sound: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in ("down", "up"):  # the list it goes with, of other people
        for seed in (0, 1):
            path = tmp_path / "sound" / label / f"dan{seed}_{label}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, moving_square(label, seed=20 + 2 * seed, num_frames=20), gop=6)
    words = ["check", *(word.replace("SOUND", str(tmp_path / "sound")) for word in line), "--json"]
    assert code_of(words, sound) == 0
    capsys.readouterr()
    assert code_of(words, unread(clips)) == 1
    printed = capsys.readouterr()
    (error,) = [one for one in json.loads(printed.out)["findings"] if one["severity"] == "error"]
    assert error["kind"] == "unreadable"
    assert "1 folders that cannot be read (File name too long): jump/ddd" in error["what"]
    assert printed.err.splitlines()[-1].startswith("FAIL: ")


@pytest.fixture(scope="module")
def trained(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(finetune_config(tmp_path_factory.mktemp("trained"), replace(data, test="")))


@pytest.mark.parametrize(
    "line",
    [
        ["--videos", "CLIPS"],
        ["--videos", "CLIPS", "--protocol", "order"],
        ["--videos", "CLIPS", "--protocol", "retrieval", "--gallery", "SOUND"],
        ["--videos", "SOUND", "--protocol", "retrieval", "--gallery", "CLIPS"],
        ["--videos", "SOUND", "--protocol", "knn", "--gallery", "CLIPS"],
    ],
)
def test_measuring_on_less_than_the_whole_list_is_no_success(
    line: list[str],
    trained: Path,
    sound: Path,
    clips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["evaluate", str(trained), *(word.replace("SOUND", str(sound)) for word in line), "--json"]
    words += ["--cache", str(tmp_path / "cache")] if "--gallery" in words else []
    assert code_of(words, sound) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == []
    assert code_of(words, unread(clips)) == 1
    printed = capsys.readouterr()
    (entry,) = json.loads(printed.out)["left_out"]
    assert (entry["count"], entry["unread"]) == (1, True)
    assert printed.err.count(UNREAD) == 1


def test_a_split_of_less_than_the_whole_list_is_written_and_no_success(
    sound: Path, clips: Path, tmp_path: Path
) -> None:
    line = ["split", "CLIPS", "-o", str(tmp_path / "lists")]
    assert code_of(line, sound) == 0
    assert code_of(line, unread(clips)) == 1
    assert (tmp_path / "lists" / "train.csv").is_file()


def test_a_dry_run_does_not_pass_a_folder_that_could_not_be_read(
    sound: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text(
        settings_toml(finetune_config(tmp_path / "run", DataConfig(train=str(sound))))
    )
    line = ["finetune", "--config", str(tmp_path / "c.toml"), "data.test=CLIPS", "--dry-run"]
    assert code_of(line, sound) == 0
    assert code_of(line, unread(clips)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("FAIL: nothing was trained, 0 videos are missing")
    assert said.endswith("; a folder of a list could not be read")
