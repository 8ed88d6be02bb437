"""Pre-training, run for real on small videos."""

import csv
import shutil
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import batch
from runs import CLIP, MODEL, PLAN, equal, pretrain_config, state

from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.errors import MissingDependencyError, TrainingError
from ivdr_deploy.models.network import VideoModel, build_model
from ivdr_deploy.video.sampling import random_centre_clip
from train import pretrain as module
from train import run
from train.cache import cache_videos
from train.config import AugmentConfig, DataConfig, OptimConfig
from train.data import Batch, draw_dual_batch
from train.loop import DrawBatch
from train.method import DualConfig
from train.optim import learning_rate
from train.pretrain import pretrain
from train.step import MocoStep


def test_pretraining_leaves_a_checkpoint_that_says_what_it_is(pretrained: Path, data: DataConfig) -> None:
    checkpoint = load_checkpoint(pretrained)
    info = checkpoint.info
    assert info.clip == CLIP
    assert info.view_plan == PLAN
    assert info.model == MODEL
    assert info.labels == ()
    assert info.training.backbone_step == 4  # 16 videos in batches of 8, twice
    assert info.training.valid_outputs() == ("feature", "inter", "intra")
    assert checkpoint.golden.shape == (4, *CLIP.clip_shape)
    provenance = info.provenance
    assert provenance.seed == 0
    assert len(provenance.data_hash) == 64
    assert provenance.packages["torch"] == metadata.version("torch")
    assert provenance.config["data"]["train"] == data.train
    assert provenance.metrics["loss"] > 0


def test_pretraining_logs_every_step_to_csv_and_tensorboard(pretrained: Path, data: DataConfig) -> None:
    rows = list(csv.DictReader((pretrained.parent / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert rows[0].keys() >= {
        "loss", "loss_clip", "loss_coherence", "loss_rank_cross", "loss_rank_same", "clip_top1", "rank_accuracy",
        "slot_cosine", "clamped_share", "inter_norm", "lr", "rank_accuracy_same", "swapped_accuracy",
        "swapped_accuracy_same", "alignment", "uniformity", "effective_rank", "order_score",
        "knn_accuracy",
    }  # fmt: skip
    optim = pretrain_config(pretrained.parent, data).optim  # the rate of each step is the one of the schedule
    rates = [learning_rate(optim, step=step, epoch_steps=2) for step in range(4)]
    assert [float(row["lr"]) for row in rows] == pytest.approx(rates, rel=1e-4)
    for row in rows:
        parts = [float(row[name]) for name in ("loss_clip", "loss_coherence")]
        parts += [1.5 * float(row[name]) for name in ("loss_rank_cross", "loss_rank_same")]
        assert float(row["loss"]) == pytest.approx(sum(parts), rel=1e-4)
    assert list(pretrained.parent.glob("tensorboard/*/events.out.tfevents.*"))


def test_what_fits_into_the_cache_makes_no_difference_to_the_weights(
    pretrained: Path, data: DataConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    straight = replace(data, cache=str(tmp_path / "cache"), cache_gib=0.0)
    again = pretrain(pretrain_config(tmp_path / "run", straight))
    assert "16 training videos, 0 skipped, 16 of them decoded in every step" in capfd.readouterr().err
    assert "for want of room in the cache" in (tmp_path / "run" / "page.html").read_text()
    assert not list((tmp_path / "cache").rglob("*.frames"))
    for part in ("backbone", "clip_head", "series_head"):
        assert equal(state(pretrained, part), state(again, part))
    raw = pretrain(pretrain_config(tmp_path / "raw", replace(data, cache_form="raw")))
    assert not equal(state(pretrained, "backbone"), state(raw, "backbone"))


def test_same_seed_gives_the_same_weights_and_another_seed_others(
    pretrained: Path, data: DataConfig, tmp_path: Path
) -> None:
    again = pretrain(pretrain_config(tmp_path / "again", data))
    other = pretrain(pretrain_config(tmp_path / "other", data, seed=1))
    assert equal(state(pretrained, "backbone"), state(again, "backbone"))
    assert not equal(state(pretrained, "backbone"), state(other, "backbone"))


class StoppedError(Exception):
    """What ends a run before its first step."""


def test_a_clip_of_pretraining_may_lie_around_any_frame_of_its_video(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off either end too: those of fine-tuning lie within."""
    first, drawn = Batch(rows=np.arange(16), places=np.arange(16), seed=0, step=0), []

    def stopped(config: object, step: object, state: object, draw: DrawBatch, **rest: object) -> None:
        drawn.append(draw(first)["views"])
        raise StoppedError

    monkeypatch.setattr(module, "run_steps", stopped)
    config = pretrain_config(tmp_path, data)
    with pytest.raises(StoppedError):
        pretrain(config)
    cached = cache_videos(read_video_list(data.train), CLIP, Path(data.cache))
    expected = draw_dual_batch(cached, first, config, draw=random_centre_clip)["views"]
    assert torch.equal(drawn[0], expected)  # type: ignore[arg-type]


def test_a_batch_in_parts_lets_the_copy_follow_as_far_as_one_at_once(
    data: DataConfig, tmp_path: Path
) -> None:
    config = pretrain_config(tmp_path, data, dual=DualConfig(form="moco", queue_length=8, momentum=0.25))
    for accumulate in (1, 2):
        optim = replace(config.optim, accumulate=accumulate)
        step = module._build_step(build_model(MODEL, CLIP), replace(config, optim=optim))
        assert isinstance(step, MocoStep)
        before = [value.clone() for value in step.key.parameters()]
        with torch.no_grad():
            for value in step.model.parameters():
                value += 1.0
        for _ in range(accumulate):
            step(*batch(2, 2), torch.arange(2))
        for value, old in zip(step.key.parameters(), before, strict=True):
            torch.testing.assert_close(value, old + 0.75)


def test_losses_without_weight_leave_their_heads_untrained(data: DataConfig, tmp_path: Path) -> None:
    path = pretrain(pretrain_config(tmp_path, data, dual=DualConfig(coherence_weight=0.0, rank_weight=0.0)))
    assert load_checkpoint(path).info.training.valid_outputs() == ("feature",)


def test_paper_augmentation_bf16_and_three_slots_run(data: DataConfig, tmp_path: Path) -> None:
    augment = AugmentConfig(plain_probability=0.2, blur_probability=0.5, reverse_probability=0.5)
    config = pretrain_config(
        tmp_path,
        data,
        augment=augment,
        bf16=True,
        clip=replace(CLIP, num_frames=6),
        model=replace(MODEL, num_slots=3),
    )
    path = pretrain(replace(config, optim=replace(config.optim, epochs=1)))
    assert np.isfinite(load_checkpoint(path).info.provenance.metrics["loss"])


@pytest.mark.parametrize(
    ("instructions", "dtype"),
    [
        ({"avx2", "avx512", "vnni"}, torch.float32),
        ({"avx2", "avx512", "bf16"}, torch.bfloat16),
        (set(), torch.bfloat16),
    ],
)
def test_bf16_runs_only_where_the_processor_multiplies_it(
    data: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    instructions: set[str],
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(run, "instruction_sets", lambda: frozenset(instructions))
    seen = set()
    encode = VideoModel.encode

    def encoded(model: VideoModel, video: torch.Tensor) -> torch.Tensor:
        feature = encode(model, video)
        if torch.is_grad_enabled():  # a training step, not a check
            seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return feature

    monkeypatch.setattr(VideoModel, "encode", encoded)
    config = pretrain_config(tmp_path, data, bf16=True)
    try:
        pretrain(replace(config, optim=replace(config.optim, epochs=1)))
    except TrainingError:  # torch on a processor that only acts as if
        assert dtype is torch.bfloat16
    assert seen == {dtype}
    assert ("computes in float32" in capfd.readouterr().err) == (dtype is torch.float32)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_backbone_learns_what_one_that_is_not_does(
    pretrained: Path, data: DataConfig, tmp_path: Path
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    compiled = pretrain(pretrain_config(tmp_path, data, compile=True))
    assert state(compiled, "backbone").keys() == state(pretrained, "backbone").keys()
    one, two = (load_checkpoint(path).info.provenance.metrics["loss"] for path in (pretrained, compiled))
    assert two == pytest.approx(one, rel=0.02)


def test_training_that_diverges_stops_with_an_error_and_no_checkpoint(
    data: DataConfig, tmp_path: Path
) -> None:
    config = pretrain_config(tmp_path, data)
    with pytest.raises(TrainingError, match="the loss is nan"):
        pretrain(replace(config, optim=replace(config.optim, name="sgd", lr=1e30, epochs=4)))
    assert not list(tmp_path.glob("*.safetensors"))
    state = torch.load(tmp_path / "state-00000000.pt", weights_only=True)  # the one before the first step
    assert state["step"] == 0
    assert all(value.isfinite().all() for value in state["module"].values())


def test_a_last_step_that_ruins_the_weights_is_noticed(data: DataConfig, tmp_path: Path) -> None:
    """Its loss was computed before it, and is finite."""
    config = pretrain_config(tmp_path, data)
    optim = OptimConfig(name="sgd", lr=3e38, weight_decay=1e6, epochs=1, batch_size=16)
    with pytest.raises(TrainingError, match="weights are not finite after step 1"):
        pretrain(replace(config, optim=optim))
    assert not list(tmp_path.glob("*.safetensors"))


def test_missing_tensorboard_is_named(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependencyError, match="pip install --group train"):
        pretrain(pretrain_config(tmp_path, data))
