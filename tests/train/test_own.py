"""One line for labelled videos: what it chooses, and that it trains, tests and says how good that is."""

import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import make_tiny_checkpoint
from clips import moving_square
from videos import write_video

from ivdr_deploy.artifacts.checkpoint import load_checkpoint, save_checkpoint
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.errors import ConfigError, DataError
from train.__main__ import main
from train.own import own_config


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of videos of five people."""
    folder = tmp_path_factory.mktemp("own") / "clips"
    for seed, name in enumerate(("ann", "bea", "cid", "dan", "eva")):
        for offset, label in enumerate(("down", "up")):
            path = folder / label / f"{name}_{label}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, moving_square(label, seed=2 * seed + offset), gop=8)
    return folder


def imported(path: Path) -> Path:
    """A checkpoint that says it was trained elsewhere."""
    made = load_checkpoint(make_tiny_checkpoint(path))
    provenance = replace(made.info.provenance, origin={"weights": "elsewhere"}, config={})
    save_checkpoint(
        path, model=made.model, info=replace(made.info, provenance=provenance), golden=made.golden
    )
    return path


def test_nothing_trained_yet_means_from_scratch_and_says_what_would_help(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = own_config(str(clips), [f"out={tmp_path / 'run'}"], runs=tmp_path / "runs")
    assert config.init == ""
    assert not config.linear_probe
    assert (Path(config.data.train).name, Path(config.data.test).name) == ("train.csv", "test.csv")
    said = capsys.readouterr().err
    assert "starts from random weights" in said
    assert "8 videos of 4 groups to train, 2 of 1 to test" in said


def test_an_imported_model_goes_before_own_pretraining_and_a_named_one_before_both(
    clips: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    (runs / "pre").mkdir(parents=True)
    shutil.copy(pretrained, runs / "pre" / "checkpoint.safetensors")
    settings = [f"out={tmp_path / 'run'}"]
    own = own_config(str(clips), settings, runs=runs)
    assert own.init == str(runs / "pre" / "checkpoint.safetensors")
    assert own.clip == load_checkpoint(pretrained).info.clip
    assert (own.linear_probe, own.model.num_slots) == (False, 2)
    (runs / "i3d").mkdir()
    imported(runs / "i3d" / "checkpoint.safetensors")
    probe = own_config(str(clips), settings, runs=runs)
    assert probe.init == str(runs / "i3d" / "checkpoint.safetensors")
    assert probe.linear_probe
    assert Path(probe.against).is_file()
    assert "2 found" in capsys.readouterr().err
    named = own_config(str(clips), [*settings, f"init={pretrained}"], runs=runs)
    assert named.init == str(pretrained)
    assert own_config(str(clips), [*settings, "init="], runs=runs).init == ""


def test_a_damaged_checkpoint_is_passed_over_by_name(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "bad").mkdir(parents=True)
    (tmp_path / "runs" / "bad" / "checkpoint.safetensors").write_bytes(b"nothing")
    assert own_config(str(clips), [f"out={tmp_path / 'run'}"], runs=tmp_path / "runs").init == ""
    assert "not a start:" in capsys.readouterr().err


def test_a_test_list_that_is_given_is_taken(clips: Path, tmp_path: Path) -> None:
    config = own_config(str(clips), [f"out={tmp_path / 'run'}", f"data.test={clips}"], runs=tmp_path / "runs")
    assert (config.data.train, config.data.test) == (str(clips), str(clips))
    assert not (tmp_path / "run").exists()


def test_a_list_with_two_parts_is_not_split(clips: Path, tmp_path: Path) -> None:
    for label in ("down", "up"):
        lines = [f"{name}_{label}.mp4 {1 + (name == 'eva')}" for name in ("ann", "bea", "cid", "eva")]
        (tmp_path / f"{label}_test_split1.txt").write_text("\n".join(lines) + "\n")
    config = own_config(
        str(tmp_path), [f"out={tmp_path / 'run'}", f"data.root={clips}"], runs=tmp_path / "runs"
    )
    assert config.data.train == config.data.test == str(tmp_path)


def test_home_folder_and_quotes_are_read_as_in_settings(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(clips.parent))
    names = sorted(str(path.relative_to(clips)) for path in clips.rglob("*.mp4"))
    listed = tmp_path / "list.csv"
    listed.write_text("path,label\n" + "".join(f"{name},{Path(name).parent}\n" for name in names))
    config = own_config(str(listed), [f'out="{tmp_path / "run"}"', "data.root=~/clips", 'init=""'])
    assert config.data.train == str(tmp_path / "run" / "lists" / "train.csv")
    read_video_list(config.data.train).require_files()


def test_settings_win_over_what_is_chosen(clips: Path, tmp_path: Path) -> None:
    settings = [f"out={tmp_path / 'run'}", "optim.epochs=3", "model.backbone=tiny", "seed=4"]
    config = own_config(str(clips), settings, runs=tmp_path / "runs")
    assert (config.optim.epochs, config.seed) == (3, 4)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["finetune"], 2, "neither a list of videos nor --config"),
        (["finetune", "clips"], 2, "no run folder is named"),
        (["finetune", "a", "b", "out=x"], 2, "is no setting"),
        (["finetune", "nowhere", "out=x"], 3, "no list of videos at nowhere"),
        (["finetune", "CLIPS", "out=x", "seed=one"], 2, "seed must be a whole number"),
    ],
)
def test_a_line_that_says_too_little_is_refused(
    words: list[str], code: int, message: str, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([word.replace("CLIPS", str(clips)) for word in words])
    assert caught.value.code == code
    assert message in capsys.readouterr().err


def test_one_class_is_nothing_to_learn(clips: Path, tmp_path: Path) -> None:
    with pytest.raises((DataError, ConfigError)):
        own_config(str(clips / "up"), [f"out={tmp_path / 'run'}"], runs=tmp_path / "runs")


def test_the_settings_can_be_printed_and_read_again(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", str(clips), f"out={tmp_path / 'run'}", "init=", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert tomllib.loads(printed)["data"]["train"] == str(tmp_path / "run" / "lists" / "train.csv")
    (tmp_path / "c.toml").write_text(printed)
    assert main(["finetune", "--config", str(tmp_path / "c.toml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def test_the_line_trains_tests_and_says_what_is_next(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["finetune", str(clips), f"out={tmp_path / 'run'}", "init=", "optim.epochs=2"]
    more = shutil.copytree(clips, tmp_path / "more")
    for label in ("down", "up"):
        for name in ("fay", "gus", "hal"):
            shutil.copy(clips / label / f"ann_{label}.mp4", more / label / f"{name}_{label}.mp4")
    assert main(line) == 0
    said = capsys.readouterr().err
    assert "test list: video accuracy " in said
    assert "95 % interval" in said
    assert f"next: ivdr export {tmp_path / 'run' / 'checkpoint.safetensors'}" in said
    assert (tmp_path / "run" / "page.html").is_file()
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors").info.labels == ("down", "up")
    lists = {path: path.read_bytes() for path in (tmp_path / "run" / "lists").iterdir()}
    with pytest.raises(SystemExit) as caught:  # the same line again, with more clips: the run has ended
        main([line[0], str(more), *line[2:]])
    assert caught.value.code == 10
    assert {path: path.read_bytes() for path in lists} == lists  # its test videos stay those it never saw
