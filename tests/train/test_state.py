"""A run that stops and goes on from its state ends with the weights of a run that never stopped."""

import csv
import os
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from clips import write_set

from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.errors import CheckpointError, FolderError, TrainingError
from ivdr_deploy.models.network import build_model
from ivdr_deploy.spec import ClipSpec, ModelSpec
from ivdr_deploy.video.sampling import random_centre_clip
from train import loop
from train.cache import CachedVideos, cache_videos
from train.config import AugmentConfig, DataConfig, FinetuneConfig, OptimConfig, PretrainConfig, RunConfig
from train.data import Batch, draw_dual_batch
from train.finetune import _batches, _build_step
from train.loop import DrawBatch, run_steps
from train.method import DualConfig
from train.run import open_state
from train.state import TrainState, load_newest, run_digest, saved_states
from train.step import DualStep, MocoStep

CLIP = ClipSpec(num_frames=4, frame_stride=3, short_side=36, crop_size=32)
MODEL = ModelSpec(backbone="tiny", clip_dim=16, slot_dim=8)
AUGMENT = AugmentConfig(plain_probability=0.2, blur_probability=0.5, flip_probability=0.5)
OPTIM = OptimConfig(name="adamw", lr=1e-3, epochs=3, batch_size=4, schedule="cosine", warmup_epochs=1)


class StoppedError(Exception):
    """What ends a run in the middle."""


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> CachedVideos:
    folder = tmp_path_factory.mktemp("data")
    videos = read_video_list(write_set(folder / "videos", per_class=4))
    return cache_videos(videos, CLIP, folder / "cache", decode=DecodeOptions(isolation="thread"))


@pytest.fixture(autouse=True)
def saved_at_every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)


def pretraining(out: Path, cached: CachedVideos, **changes: object):  # type: ignore[no-untyped-def]
    """Everything a process makes before its first step: the settings, the step, its state, and what draws batches."""
    config = replace(
        PretrainConfig(
            out=str(out),
            data=DataConfig(train="x"),
            clip=CLIP,
            model=MODEL,
            optim=OPTIM,
            augment=AUGMENT,
            log_every=1,
        ),
        **changes,  # type: ignore[arg-type]
    )
    torch.manual_seed(config.seed)
    model = build_model(MODEL, CLIP)
    kind = MocoStep if config.dual.form == "moco" else DualStep
    step = kind(model, config.dual).train()

    def draw(batch: Batch):  # type: ignore[no-untyped-def]
        return draw_dual_batch(cached, batch, config, draw=random_centre_clip)

    return config, step, open_state(config, step, cached), draw


def finetuning(out: Path, cached: CachedVideos, **changes: object):  # type: ignore[no-untyped-def]
    """With dropout, which draws from torch's own generator."""
    config = replace(
        FinetuneConfig(
            out=str(out), data=DataConfig(train="x"), clip=CLIP, model=MODEL, augment=AUGMENT, log_every=1,
            optim=replace(OPTIM, name="sgd", weight_decay=1e-3),
        ),
        **changes,  # type: ignore[arg-type]
    )  # fmt: skip
    torch.manual_seed(config.seed)
    model = build_model(replace(MODEL, num_classes=2, dropout=0.5), CLIP)
    step = _build_step(model, config).train()
    return config, step, open_state(config, step, cached), _batches(cached, [0, 1] * 4, config)


def queueing(out: Path, cached: CachedVideos, **changes: object):  # type: ignore[no-untyped-def]
    return pretraining(out, cached, dual=DualConfig(form="moco", queue_length=10), **changes)


Begin = Callable[..., tuple[RunConfig, torch.nn.Module, TrainState, DrawBatch]]


def go(
    begun: tuple[RunConfig, torch.nn.Module, TrainState, DrawBatch], *, stop_after: int | None = None
) -> TrainState:
    config, step, state, draw = begun

    def drawn(batch: Batch):  # type: ignore[no-untyped-def]
        if batch.step == stop_after:
            raise StoppedError
        return draw(batch)

    run_steps(config, step, state, drawn, count=8, description="test")
    return state


def same(one: TrainState, two: TrainState) -> bool:
    ours, theirs = one.module.state_dict(), two.module.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in ours.items()
    )


@pytest.mark.parametrize("begin", [pretraining, queueing, finetuning])
@pytest.mark.parametrize("stop_after", [1, 2, 5])
def test_resumed_run_ends_bitwise_like_the_uninterrupted_one(
    cached: CachedVideos, tmp_path: Path, begin: Begin, stop_after: int
) -> None:
    whole = go(begin(tmp_path / "whole", cached))
    assert whole.step == 6
    with pytest.raises(StoppedError):
        go(begin(tmp_path / "cut", cached), stop_after=stop_after)
    torch.manual_seed(99)  # a new process has other generators
    begun = begin(tmp_path / "cut", cached)
    state = begun[2]
    assert not same(state, whole)
    load_newest(state, tmp_path / "cut")
    assert state.step == stop_after
    assert state.epoch_position == divmod(stop_after, 2)
    assert same(go(begun), whole)
    logs = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_every_part_of_a_state_comes_back(cached: CachedVideos, tmp_path: Path) -> None:
    _, _, state, _ = pretraining(tmp_path, cached)
    state.step, state.log_bytes = 3, 70
    state.metrics, state.validation, state.averages = {"loss": 1.0}, {"knn": 0.5}, {"first_loss": 2.0}
    state.alarms = [{"name": "collapse", "step": "2"}]
    state.save(tmp_path / "state.pt")
    _, _, again, _ = pretraining(tmp_path, cached)
    again.load(tmp_path / "state.pt")
    for part in fields(TrainState):
        if part.name not in ("module", "optimizer"):
            assert getattr(again, part.name) == getattr(state, part.name), part.name


def test_lines_of_steps_that_are_taken_again_are_dropped(cached: CachedVideos, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        go(pretraining(tmp_path, cached), stop_after=3)
    with (tmp_path / "metrics.csv").open("a") as log:
        log.write("4,half a li")
    begun = pretraining(tmp_path, cached)
    load_newest(begun[2], tmp_path)
    go(begun)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == list("123456")


def test_state_is_saved_at_the_end_whatever_the_time(
    cached: CachedVideos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 1e9)
    with pytest.raises(StoppedError):
        go(pretraining(tmp_path, cached), stop_after=5)
    assert not saved_states(tmp_path)
    done = go(pretraining(tmp_path, cached))
    again = pretraining(tmp_path, cached)[2]
    load_newest(again, tmp_path)
    assert (again.step, same(again, done)) == (6, True)


def test_state_of_another_run_is_refused(cached: CachedVideos, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    pretraining(tmp_path, cached)[2].save(path)
    others = [
        pretraining(tmp_path, cached, optim=replace(OPTIM, lr=2e-3)),
        pretraining(tmp_path, cached, seed=1),
        pretraining(tmp_path, cached, data=DataConfig(train="x", cache_form="raw")),
        pretraining(tmp_path, replace(cached, items=cached.items[::-1])),
        pretraining(
            tmp_path, replace(cached, items=(replace(cached.items[0], label="c"), *cached.items[1:]))
        ),
    ]
    torch.save(pretraining(tmp_path, cached)[2].state_dict() | {"digest": "x\n" * 9999}, tmp_path / "long.pt")
    with pytest.raises(FolderError, match="belongs to another run") as caught:
        others[0][2].load(tmp_path / "long.pt")
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300
    for _, _, state, _ in others:
        before = {name: value.clone() for name, value in state.module.state_dict().items()}
        with pytest.raises(FolderError, match="belongs to another run"):
            state.load(path)
        assert all(torch.equal(value, before[name]) for name, value in state.module.state_dict().items())
    pretraining(tmp_path / "elsewhere", cached, log_every=5)[2].load(path)  # neither shapes the weights


def test_every_setting_that_shapes_the_weights_makes_another_run(
    cached: CachedVideos, tmp_path: Path
) -> None:
    config = pretraining(tmp_path, cached)[0]
    others = [
        replace(config, **changed)
        for changed in (
            {"seed": 1},
            {"bf16": True},
            {"optim": replace(config.optim, epochs=99)},
            {"augment": replace(config.augment, flip_probability=0.25)},
            {"dual": replace(config.dual, rank_theta=0.06)},
            {"model": replace(config.model, head_norm="both")},
            {"clip": replace(config.clip, frame_stride=2)},
            {"data": replace(config.data, cache_form="raw")},
        )
    ]
    digests = [run_digest(one, cached) for one in (config, *others)]
    assert len(set(digests)) == len(digests)
    same = replace(
        config, out="elsewhere", log_every=7, on_alarm="stop", data=replace(config.data, decode_workers=5)
    )
    assert run_digest(same, cached) == digests[0]


def test_weights_that_are_not_finite_never_replace_a_good_state(cached: CachedVideos, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    state = pretraining(tmp_path, cached)[2]
    state.save(path)
    good = path.read_bytes()
    next(state.module.parameters()).data[0] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        state.save(path)
    assert path.read_bytes() == good
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


class Command:
    """A pickle that runs a command when it is read."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (os.system, (self.command,))


def test_damaged_and_hostile_files_are_refused_and_nothing_in_them_runs(
    cached: CachedVideos, tmp_path: Path
) -> None:
    path, proof = tmp_path / "state.pt", tmp_path / "ran"
    state = pretraining(tmp_path, cached)[2]
    state.save(path)
    whole = path.read_bytes()
    torch.save({"format": Command(f"touch {proof}")}, tmp_path / "hostile")
    contents = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"hello",
        "pickle": pickle.dumps(Command(f"touch {proof}")),
        "torch pickle": (tmp_path / "hostile").read_bytes(),
    }
    for name, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a readable training state"):
            state.load(path)
        assert not proof.exists(), name
    endless = {**state.state_dict(), "step": float("inf")}
    for values in (
        [1, 2],
        {},
        {"format": 1},
        endless,
        {**state.state_dict(), "module": {"x": torch.ones(1)}},
    ):
        torch.save(values, path)
        with pytest.raises(CheckpointError):
            state.load(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="no training state at"):
        state.load(path)
