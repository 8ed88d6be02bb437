"""Two ways to train, tried on held-out groups of the training list: the better one is taken, and both are shown."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import CLIP, MODEL, PLAN, finetune_config

from ivdr_deploy.artifacts.checkpoint import load_checkpoint, save_checkpoint
from ivdr_deploy.errors import DataError
from train import finetune as module
from train.config import AugmentConfig, DataConfig, FinetuneConfig, OptimConfig
from train.config_file import settings_toml
from train.finetune import finetune

LEARNS = OptimConfig(name="adamw", lr=3e-3, epochs=15, batch_size=8, schedule="cosine")
LEARNS_NOTHING = replace(LEARNS, lr=0.0, epochs=1)


@pytest.fixture
def config(pretrained: Path, data: DataConfig, tmp_path: Path) -> FinetuneConfig:
    own = replace(data, cache=str(tmp_path / "cache"))
    return finetune_config(tmp_path / "out", own, init=str(pretrained), linear_probe=True)


def against(config: FinetuneConfig, path: Path, optim: OptimConfig) -> FinetuneConfig:
    """Settings with a rival: ``tiny`` from scratch."""
    rival = FinetuneConfig(
        out="elsewhere",
        data=DataConfig(train="another list"),
        clip=CLIP,
        view_plan=PLAN,
        model=MODEL,
        optim=optim,
        augment=AugmentConfig(jitter_probability=0.0),
        log_every=100,
    )
    path.write_text(settings_toml(rival))
    return replace(config, against=str(path))


def blind(path: Path, source: Path) -> Path:
    """A checkpoint whose backbone sees nothing."""
    checkpoint = load_checkpoint(source)
    for value in checkpoint.model.backbone.parameters():
        torch.nn.init.zeros_(value)
    save_checkpoint(path, model=checkpoint.model, info=checkpoint.info, golden=checkpoint.golden)
    return path


def test_the_probe_is_taken_where_it_is_better(
    config: FinetuneConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finetune(against(config, tmp_path / "rival.toml", LEARNS_NOTHING))
    info, said = load_checkpoint(path).info, " ".join(capsys.readouterr().err.split())
    metrics = info.provenance.metrics
    assert metrics["held_out_videos"] == 16
    assert metrics["held_out_accuracy"] > metrics["held_out_accuracy_of_other"]
    assert info.provenance.config["linear_probe"]
    assert "taken: linear probe, from" in said
    assert re.search(r"not taken: tiny, 1 epochs, from random weights: [\d.]+% \(\d+/16, 95 % interval", said)
    assert "held out in 3 parts: 16 of 16 videos" in said


def test_of_equals_the_settings_themselves_are_taken(config: FinetuneConfig, tmp_path: Path) -> None:
    rival = tmp_path / "rival.toml"
    rival.write_text(settings_toml(replace(config, log_every=config.log_every + 1)))
    info = load_checkpoint(finetune(replace(config, against=str(rival)))).info
    metrics = info.provenance.metrics
    assert metrics["held_out_accuracy"] == metrics["held_out_accuracy_of_other"]
    assert info.provenance.config["log_every"] == config.log_every


def test_the_other_one_is_taken_where_it_is_better_and_its_parts_are_kept(
    config: FinetuneConfig, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, init=str(blind(tmp_path / "blind.safetensors", pretrained)))
    config = against(config, tmp_path / "rival.toml", LEARNS)
    trained = []
    train = module._train

    def noted(config, videos, test, labels, measured=None):  # type: ignore[no-untyped-def]
        shown = [] if test is None else [item.uri for item in test.items]
        trained.append(([item.uri for item in videos.items], shown))
        return train(config, videos, test, labels, measured)

    monkeypatch.setattr(module, "_train", noted)
    path = finetune(config)
    info = load_checkpoint(path).info
    metrics = info.provenance.metrics
    assert metrics["held_out_accuracy"] > 0.8 > metrics["held_out_accuracy_of_other"]
    assert not info.provenance.config["linear_probe"]
    assert info.provenance.config["data"]["train"] == config.data.train
    assert info.provenance.metrics["video_accuracy"] >= 5 / 6
    *parts, whole = trained
    assert len(parts) == 3
    assert all(not set(rest) & set(shown) and len(rest) + len(shown) == 16 for rest, shown in parts)
    assert sorted(uri for _, shown in parts for uri in shown) == sorted(whole[0])

    def stops(config, videos, test, labels, measured):  # type: ignore[no-untyped-def]
        assert len(videos.items) == 16
        assert measured.items() <= metrics.items()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_train", stops)
    with pytest.raises(KeyboardInterrupt):  # at the whole list at once
        finetune(replace(config, out=str(tmp_path / "again")))


@pytest.mark.parametrize("named", [True, False])
def test_no_video_is_decoded_twice_for_the_parts(config: FinetuneConfig, named: bool, tmp_path: Path) -> None:
    if not named:
        config = replace(config, data=replace(config.data, cache=""))
    finetune(against(config, tmp_path / "rival.toml", LEARNS_NOTHING))
    assert len(list(config.cache_dir.glob("held-out-*/checkpoint.safetensors"))) == 3
    assert len(list(config.cache_dir.rglob("*.frames"))) == 16


def test_a_list_of_which_nothing_can_be_held_out_is_refused(
    config: FinetuneConfig, data: DataConfig, tmp_path: Path
) -> None:
    folder = Path(data.train).parent
    path = tmp_path / "list.csv"
    rows = [f"{folder}/{label}{number}.mp4,{label},{label}" for label in ("up", "down") for number in (0, 1)]
    path.write_text("path,label,group\n" + "\n".join(rows) + "\n")
    config = replace(config, data=replace(config.data, train=str(path), test=""))
    with pytest.raises(DataError, match="no video can be held out"):
        finetune(against(config, tmp_path / "rival.toml", LEARNS))
    assert load_checkpoint(finetune(config)).info.provenance.metrics == {"penalty": 1e-2}
