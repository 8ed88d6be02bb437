"""Fine-tuning, run for real on small videos."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import CLIP, HEADS, MODEL, PLAN, equal, finetune_config, rewrite, state

from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.errors import CheckpointError, DataError
from ivdr_deploy.spec import ViewPlan
from ivdr_deploy.video.sampling import random_start_clip
from train.augment import Changes
from train.cache import cache_videos
from train.config import AugmentConfig, DataConfig, OptimConfig
from train.data import Batch, dual_views, single_views
from train.evaluate import evaluate
from train.finetune import _batches, finetune
from train.method import DualConfig


def test_cross_entropy_alone_makes_the_other_heads_stale(
    pretrained: Path, data: DataConfig, tmp_path: Path
) -> None:
    path = finetune(finetune_config(tmp_path, data, init=str(pretrained)))
    info = load_checkpoint(path).info
    assert info.labels == ("down", "up")
    assert info.training.backbone_step == 4 + 2
    assert info.training.head_steps == {"clip_head": 4, "series_head": 4, "classifier": 6}
    assert info.training.valid_outputs() == ("logits", "feature")
    assert not equal(state(path, "backbone"), state(pretrained, "backbone"))
    for head in ("clip_head", "series_head"):
        assert equal(state(path, head), state(pretrained, head))
    assert 0.0 <= info.provenance.metrics["video_accuracy"] <= 1.0


def test_joint_training_keeps_all_heads_valid(pretrained: Path, data: DataConfig, tmp_path: Path) -> None:
    dual = DualConfig(clip_weight=0.5, coherence_weight=0.7)
    path = finetune(finetune_config(tmp_path, data, init=str(pretrained), dual_weight=0.3, dual=dual))
    info = load_checkpoint(path).info
    assert all(info.training.is_valid(head) for head in HEADS)
    assert info.training.valid_outputs() == ("logits", "feature", "inter", "intra")
    for head in ("clip_head", "series_head"):
        assert not equal(state(path, head), state(pretrained, head))
    row = info.provenance.metrics  # the sum is under the weights of the settings
    ranks = 1.5 * (row["loss_rank_cross"] + row["loss_rank_same"])
    together = 0.5 * row["loss_clip"] + 0.7 * row["loss_coherence"] + ranks
    assert row["loss"] == pytest.approx(row["loss_label"] + 0.3 * together, rel=1e-4)


@pytest.mark.parametrize("dual_weight", [0.0, 0.1])
def test_a_clip_of_fine_tuning_lies_within_its_video_and_is_changed_as_the_settings_say(
    data: DataConfig, tmp_path: Path, dual_weight: float
) -> None:
    augment = AugmentConfig(jitter_probability=0.0, flip_probability=1.0)
    config = finetune_config(tmp_path, data, dual_weight=dual_weight, augment=augment)
    cached = cache_videos(read_video_list(data.train), CLIP, Path(data.cache))
    batch = Batch(rows=np.arange(16)[::-1], places=np.arange(16), seed=0, step=0)
    drawn = _batches(cached, list(range(16)), config)(batch)
    if dual_weight:
        expected = dual_views(cached, batch, CLIP, draw=random_start_clip)
    else:
        expected = single_views(cached, batch, CLIP, draw=random_start_clip)
    assert np.array_equal(drawn["views"], expected)
    assert drawn["truth"].tolist() == list(range(16))[::-1]  # type: ignore[union-attr]
    changes = drawn["changes"]
    assert isinstance(changes, Changes)
    assert changes.flip is not None
    assert changes.flip.all()
    assert torch.allclose(changes.color, torch.eye(3), atol=1e-6)


def test_a_classifier_for_the_same_labels_is_carried_into_the_next_stage(
    pretrained: Path, data: DataConfig, tmp_path: Path
) -> None:
    first = finetune(finetune_config(tmp_path / "first", data, init=str(pretrained)))
    still = OptimConfig(name="sgd", lr=0.0, epochs=1, batch_size=8)  # what was carried over is what is saved
    second = finetune(
        finetune_config(tmp_path / "second", data, init=str(first), dual_weight=0.1, optim=still)
    )
    assert equal(state(first, "classifier"), state(second, "classifier"))
    assert load_checkpoint(second).info.training.valid_outputs() == ("logits", "feature", "inter", "intra")


def test_linear_probe_trains_the_classifier_alone(pretrained: Path, data: DataConfig, tmp_path: Path) -> None:
    path = finetune(finetune_config(tmp_path, data, init=str(pretrained), linear_probe=True))
    info = load_checkpoint(path).info
    assert info.training.backbone_step == 4
    assert all(info.training.is_valid(head) for head in HEADS)
    assert equal(state(path, "backbone"), state(pretrained, "backbone"))  # batch statistics too
    for head in ("clip_head", "series_head"):
        assert equal(state(path, head), state(pretrained, head))
    assert state(path, "classifier")["linear.bias"].any()


def test_training_from_scratch_has_no_valid_dual_heads(data: DataConfig, tmp_path: Path) -> None:
    info = load_checkpoint(finetune(finetune_config(tmp_path, data))).info
    assert info.training.backbone_step == 2
    assert info.training.valid_outputs() == ("logits", "feature")


def test_motion_is_learned_and_evaluated_on_other_videos(data: DataConfig, tmp_path: Path) -> None:
    config = finetune_config(tmp_path, data, augment=AugmentConfig(jitter_probability=0.0))
    optim = replace(config.optim, epochs=15, lr=3e-3)
    path = finetune(replace(config, optim=optim, log_every=100))
    report = evaluate(path, data.test)
    assert report.view_plan == PLAN  # the checkpoint's
    assert report.clip_accuracy.total == 12
    report = evaluate(path, data.test, plan=ViewPlan(num_clips=10))
    assert report.view_plan == ViewPlan(num_clips=10)
    assert report.video_accuracy.total == 6
    assert report.video_accuracy.correct == 6
    assert report.clip_accuracy.total == 60
    assert {label: accuracy.total for label, accuracy in report.per_class.items()} == {"down": 3, "up": 3}
    assert load_checkpoint(path).info.provenance.metrics["video_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": replace(MODEL, slot_dim=4)}, "model.slot_dim: 8 != 4"),
        ({"clip": replace(CLIP, num_frames=8)}, "clip.num_frames: 4 != 8"),
        ({"clip": replace(CLIP, mean=(0.5, 0.5, 0.5))}, "clip.mean"),
    ],
)
def test_checkpoint_of_another_network_or_contract_is_refused(
    pretrained: Path, data: DataConfig, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        finetune(finetune_config(tmp_path, data, init=str(pretrained), **changes))


def test_stride_and_size_may_change_between_the_stages(
    pretrained: Path, data: DataConfig, tmp_path: Path
) -> None:
    clip = replace(CLIP, frame_stride=2, crop_size=24)
    path = finetune(finetune_config(tmp_path, data, init=str(pretrained), clip=clip))
    assert load_checkpoint(path).info.clip == clip


# --- bad lists


def test_class_that_only_the_test_list_has_is_refused_by_name(data: DataConfig, tmp_path: Path) -> None:
    lists = rewrite(data.train, tmp_path / "test.csv", down0="sideways")
    with pytest.raises(DataError, match="unknown to training: sideways"):
        finetune(finetune_config(tmp_path, lists))


def test_video_without_a_label_is_refused_by_name(data: DataConfig, tmp_path: Path) -> None:
    lists = rewrite(data.train, tmp_path / "test.csv", down0="")
    with pytest.raises(DataError, match=r"1 of 16 videos have no label: .*down0\.mp4"):
        finetune(finetune_config(tmp_path, replace(lists, train=lists.test, test="")))


def test_single_class_is_refused(data: DataConfig, tmp_path: Path) -> None:
    lists = rewrite(data.train, tmp_path / "l.csv", **{f"up{i}": "down" for i in range(8)})
    with pytest.raises(DataError, match="one class only, 'down'"):
        finetune(finetune_config(tmp_path, replace(lists, train=lists.test, test="")))
