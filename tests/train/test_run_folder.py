"""What a second run into the same folder does, and what is left when a run is stopped or the disk is full."""

import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from clips import moving_square, write_set
from runs import equal, finetune_config, pretrain_config, state
from videos import write_video

from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.errors import CheckpointError, FolderError, VideoError
from train import finetune as finetuning
from train import loop, run
from train.__main__ import main
from train.config import DataConfig, OptimConfig
from train.finetune import finetune
from train.pretrain import pretrain
from train.state import saved_states


class StoppedError(Exception):
    """What ends a run in the middle."""


@contextmanager
def stopping_after(steps: int) -> Iterator[None]:
    """Let a run end before it takes one more step."""
    take_step, taken = loop.take_step, []

    def counted(*arguments: object, **options: object) -> None:
        if len(taken) == steps:
            raise StoppedError
        taken.append(None)
        take_step(*arguments, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", counted)
        patch.setattr(loop, "SAVE_SECONDS", 0.0)
        yield


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_same_command_goes_on_where_a_run_was_stopped(
    pretrained: Path, data: DataConfig, tmp_path: Path
) -> None:
    config = pretrain_config(tmp_path, data)
    with pytest.raises(StoppedError), stopping_after(2):
        pretrain(config)
    assert not list(tmp_path.glob("*.safetensors"))
    with stopping_after(2):  # the two that are missing
        again = pretrain(config)
    for part in ("backbone", "clip_head", "series_head"):
        assert equal(state(pretrained, part), state(again, part))
    assert (tmp_path / "metrics.csv").read_text() == (pretrained.parent / "metrics.csv").read_text()


def test_a_run_stopped_before_its_first_step_goes_on(data: DataConfig, tmp_path: Path) -> None:
    config = pretrain_config(tmp_path, data)
    with pytest.raises(StoppedError), stopping_after(0):
        pretrain(config)
    pretrain(config)
    assert len(list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))) == 4


def test_a_run_stopped_after_its_last_step_takes_none_again(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its test list is measured and its checkpoint written."""
    config = finetune_config(tmp_path, data)

    def stop(*arguments: object, **options: object) -> None:
        raise StoppedError

    monkeypatch.setattr(finetuning, "evaluate_model", stop)
    with pytest.raises(StoppedError):
        finetune(config)
    monkeypatch.undo()
    log = (tmp_path / "metrics.csv").read_text()
    with stopping_after(0):
        path = finetune(config)
    metrics = load_checkpoint(path).info.provenance.metrics
    assert metrics["test_videos"] == 6
    assert metrics["loss"] == pytest.approx(
        float(list(csv.DictReader(log.splitlines()))[-1]["loss"]), rel=1e-4
    )
    assert (tmp_path / "metrics.csv").read_text() == log


def test_a_run_that_dies_loses_about_five_minutes(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With steps of 110 seconds, the third is the first after that time."""
    take_step, taken = loop.take_step, []

    def slow(*arguments: object, **options: object) -> None:
        take_step(*arguments, **options)  # type: ignore[arg-type]
        taken.append(None)

    monkeypatch.setattr(loop, "take_step", slow)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 110.0 * len(taken)))
    optim = OptimConfig(name="adamw", lr=1e-3, epochs=7, batch_size=16)
    pretrain(pretrain_config(tmp_path, data, optim=optim, keep_states=9))
    assert [path.stem for path in saved_states(tmp_path)] == [f"state-{step:08d}" for step in (7, 6, 3, 0)]


@pytest.mark.parametrize("becomes", ["shorter", "longer", "nothing"])
def test_a_video_that_is_replaced_or_goes_while_it_is_in_use_ends_the_run_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, becomes: str
) -> None:
    listed = write_set(tmp_path / "v", per_class=2)
    data = DataConfig(train=str(listed), cache_gib=0.0, decode_workers=1)
    optim = OptimConfig(name="adamw", lr=1e-3, epochs=40, batch_size=4)
    config = pretrain_config(tmp_path / "run", data, optim=optim)
    take_step, taken, video = loop.take_step, [], tmp_path / "v" / "up0.mp4"

    def changing(*arguments: object, **options: object) -> None:
        taken.append(None)
        take_step(*arguments, **options)  # type: ignore[arg-type]
        if len(taken) == 2:
            video.unlink()
            if becomes != "nothing":
                write_video(video, moving_square("up", seed=1, num_frames=9 if becomes == "shorter" else 30))

    monkeypatch.setattr(loop, "take_step", changing)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    with pytest.raises(VideoError, match=r"up0\.mp4") as caught:
        pretrain(config)
    if becomes != "nothing":
        assert "is another video than when the run began: it had 16 frames" in caught.value.message
    assert 2 <= len(taken) < 40
    kept = [
        f"state-{step:08d}.pt" for step in (len(taken), len(taken) - 1)
    ]  # it may be met while features are measured
    assert saved_states(tmp_path / "run")[0].name in kept
    page = (tmp_path / "run" / "page.html").read_text()
    assert "could not go on: " in page
    assert "up0.mp4" in page
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_resume_refuses_to_begin(data: DataConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = Path(__file__).parents[2] / "train" / "configs" / "demo_pretrain.toml"
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", "--resume", "--config", str(config), f"out={tmp_path}", f"data.train={data.train}"])
    assert ended.value.code
    assert "holds no training state to go on from" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_damaged_newest_state_is_named_and_the_one_before_is_taken(
    pretrained: Path, data: DataConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = pretrain_config(tmp_path, data)
    with pytest.raises(StoppedError), stopping_after(3):
        pretrain(config)
    newest, before = saved_states(tmp_path)
    newest.write_bytes(newest.read_bytes()[:1000])
    again = pretrain(config)
    said = capfd.readouterr().err
    assert f"{newest} is not a readable training state" in said
    assert f"going on after step 2 of 4, from {before}" in said
    assert newest.with_suffix(".damaged").is_file()  # no longer counted among those that are kept
    assert equal(state(pretrained, "backbone"), state(again, "backbone"))


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_states_are_kept_as_wanted(data: DataConfig, tmp_path: Path, keep: int) -> None:
    with stopping_after(4):
        pretrain(pretrain_config(tmp_path, data, keep_states=keep))
    newest_first = [f"state-{step:08d}.pt" for step in (4, 3, 2)]
    assert [path.name for path in saved_states(tmp_path)] == newest_first[:keep]


def test_a_run_that_has_ended_is_kept(data: DataConfig, tmp_path: Path) -> None:
    config = pretrain_config(tmp_path, data)
    pretrain(config)
    before = contents(tmp_path)
    with pytest.raises(
        FolderError, match=r"has ended: 4 steps are taken and checkpoint\.safetensors is written"
    ):
        pretrain(config)
    assert contents(tmp_path) == before


def test_a_run_with_other_settings_is_kept(data: DataConfig, tmp_path: Path) -> None:
    config = pretrain_config(tmp_path, data)
    with pytest.raises(StoppedError), stopping_after(2):
        pretrain(config)
    before = contents(tmp_path)
    for other in (replace(config, seed=1), replace(config, optim=replace(config.optim, lr=1e-4))):
        with pytest.raises(FolderError, match="belongs to another run") as caught:
            pretrain(other)
        assert "give another out=" in caught.value.hint
    with pytest.raises(FolderError, match="belongs to another run"):
        finetune(finetune_config(tmp_path, replace(data, test="")))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "metrics.csv"])
def test_a_folder_with_the_files_of_some_run_is_kept(data: DataConfig, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(FolderError, match=f"is used: it holds {name}"):
        pretrain(pretrain_config(tmp_path, data))
    assert contents(tmp_path) == {name: b"mine"}


def test_a_damaged_state_is_kept(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "state-00000003.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="not a readable training state"):
        pretrain(pretrain_config(tmp_path, data))
    assert contents(tmp_path) == {"state-00000003.pt": b"damaged"}


def test_two_runs_at_once_are_refused(data: DataConfig, tmp_path: Path) -> None:
    config = pretrain_config(tmp_path, data)
    with run.run_folder(config), pytest.raises(FolderError, match="another process is training into"):
        pretrain(config)


LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from runs import pretrain_config
from train import loop, state
from train.config import DataConfig
from train.pretrain import pretrain
from ivdr_deploy._console import exiting

torch.set_num_threads(1)
import train.pretrain
loop.SAVE_SECONDS = 0.0
write_checkpoint, save = train.pretrain.write_checkpoint, state.TrainState.save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def full(function):
    def limited(*arguments, **options):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        return function(*arguments, **options)
    return limited

def full_later(self, path):
    return (full(save) if self.step == 2 else save)(self, path)

if sys.argv[4] == "checkpoint":
    train.pretrain.write_checkpoint = full(write_checkpoint)
else:
    state.TrainState.save = full_later
data = DataConfig(train=sys.argv[2], cache=sys.argv[3])
with exiting("train"):
    pretrain(pretrain_config(Path("out"), data))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of files there")
@pytest.mark.parametrize(("what", "step"), [("checkpoint", 4), ("state", 1)])
def test_a_full_disk_ends_the_run_with_its_folder_named_and_the_last_state_kept(
    data: DataConfig, tmp_path: Path, pretrained: Path, what: str, step: int
) -> None:
    arguments = [str(Path(__file__).parent), data.train, data.cache, what]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert (done.returncode, last) == (9, "train: out: File too large"), done.stderr
    left = {path.name for path in (tmp_path / "out").iterdir()}
    states = {f"state-{kept:08d}.pt" for kept in ((3, 4) if what == "checkpoint" else (1,))}
    assert left == {"metrics.csv", "settings.toml", "tensorboard"} | states
    newest = tmp_path / "out" / f"state-{step:08d}.pt"
    assert torch.load(newest, weights_only=True)["step"] == step
    said = f"step {step + 1} could not be saved; out/{newest.name} is kept"
    assert (said in done.stderr) == (what == "state"), done.stderr
    again = pretrain(pretrain_config(tmp_path / "out", data))  # with space again
    assert equal(state(pretrained, "backbone"), state(again, "backbone"))
