"""The training step as a module: what it computes, and what it trains."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from batches import CLIP, OFF, batch, first_view, network, random_crops, scenes
from torch import Tensor, nn

from train import losses
from train.augment import apply_changes, draw_changes
from train.config import DualConfig, OptimConfig
from train.data import draw_permutations
from train.optim import build_optimizer, take_step
from train.step import DualOutputs, DualStep, JointStep, LabelStep, dual_loss, encode_views

# --- what it computes


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_loss_is_that_of_the_losses_put_together_by_hand(slots: int) -> None:
    """Segments are cut, moved and put back by loops here, with nothing of the step or its permutation code."""
    config = DualConfig(clip_weight=0.3, coherence_weight=0.7, rank_weight=2.0)
    model = network(slots)
    views, changes, permutation = batch(6, slots)
    loss, metrics = DualStep(copy.deepcopy(model), config)(views, changes, permutation)

    video = apply_changes(views.flatten(0, 1), changes).view(3, 6, *CLIP.clip_shape)
    third = video[2]
    length = CLIP.num_frames // slots
    shuffled = torch.empty_like(third)
    for row in range(6):
        for place in range(slots):
            taken = int(permutation[row, place])
            shuffled[row, place * length : (place + 1) * length] = third[
                row, taken * length : (taken + 1) * length
            ]
    assert model.clip_head is not None
    assert model.series_head is not None
    feature = model.encode(video.flatten(0, 1))  # batch norm sees the three views together
    clips = model.clip_head(feature).view(3, 6, -1)
    q = model.series_head(feature).view(3, 6, slots, -1)
    given = model.series_head(model.encode(shuffled))
    p = torch.empty_like(given)
    for row, place in itertools.product(range(6), range(slots)):
        p[row, int(permutation[row, place])] = given[row, place]
    cross, same = (losses.shuffle_rank(view, p, theta=0.05, clamp=5.0) for view in (q[0], q[2]))
    expected = (
        0.3 * losses.nt_xent(clips[0], clips[1], temperature=0.07)
        + 0.7 * losses.temporal_coherent(q[0], q[1], temperature=0.07)
        + 2.0 * (0.5 * cross + 0.5 * same)
    )
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(metrics["loss_rank_cross"], cross.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(metrics["loss_rank_same"], same.detach(), atol=1e-5, rtol=1e-5)


class SegmentMeans(nn.Module):
    """A backbone that knows order: the mean colours of each segment, one after the other."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots = slots

    def forward(self, x: Tensor) -> Tensor:
        means = x.unflatten(2, (self.slots, -1)).mean(dim=(3, 4, 5))  # (N, 3, S)
        return means.mT.flatten(1)[..., None, None, None]  # (N, S*3, 1, 1, 1)


class Slots(nn.Module):
    """A series head that hands the segments' means on."""

    def forward(self, feature: Tensor) -> Tensor:
        return nn.functional.normalize(feature.unflatten(1, (-1, 3)), dim=-1)


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_an_encoder_that_follows_segments_ranks_perfectly_whatever_the_order(slots: int) -> None:
    """Holds only if the clip is shuffled, and put back by the inverse of the same order."""
    model = network(slots)
    model.backbone, model.series_head = SegmentMeans(slots), Slots()  # type: ignore[assignment]
    model.clip_head = nn.Identity()  # type: ignore[assignment]
    views = random_crops(scenes(1), np.random.default_rng(0)).repeat(1, math.factorial(slots), 1, 1, 1, 1)
    orders = torch.tensor(list(itertools.permutations(range(slots))))
    changes = draw_changes(OFF, 3 * len(orders), rng=np.random.default_rng(0))
    outputs = encode_views(model, views, changes, orders, bf16=False)
    torch.testing.assert_close(outputs.shuffled, outputs.slots[2], atol=1e-5, rtol=0)
    encoded: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: encoded.append(inputs[0]))
    encode_views(model, views, changes, orders, bf16=False)
    _, shuffled = encoded
    assert len(
        {round(float((clip * torch.arange(12.0)[None, :, None, None]).sum()), 2) for clip in shuffled}
    ) == (math.factorial(slots))  # every order gave another clip


def test_outputs_are_view_major_unit_vectors() -> None:
    model = network().eval()  # a video's outputs depend on it alone
    views, changes, permutation = batch(5, augment=OFF)
    outputs = encode_views(model, views, changes, permutation, bf16=False)
    assert outputs.feature.shape == (3, 5, model.feature_dim)
    assert outputs.clip.shape == (3, 5, 16)
    assert outputs.slots.shape == (3, 5, 3, 8)
    assert outputs.shuffled.shape == (5, 3, 8)
    torch.testing.assert_close(outputs.clip.norm(dim=-1), torch.ones(3, 5))
    torch.testing.assert_close(outputs.slots.norm(dim=-1), torch.ones(3, 5, 3))
    for view in range(3):
        plain = model(views[view])
        torch.testing.assert_close(outputs.slots[view], plain["intra"], atol=1e-4, rtol=0)
        torch.testing.assert_close(outputs.clip[view], plain["clip"], atol=1e-4, rtol=0)


def test_label_step_is_cross_entropy_of_the_changed_clips() -> None:
    model = network(classes=2)
    views, changes, _ = batch(4)
    views, changes = views[0], first_view(changes, 4)
    truth = torch.tensor([0, 1, 1, 0])
    loss, metrics = LabelStep(copy.deepcopy(model))(views, changes, truth)
    logits = model(apply_changes(views, changes))["logits"]
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, truth))
    assert metrics["train_accuracy"] == (logits.argmax(dim=1) == truth).float().mean()


def test_joint_step_adds_the_dual_losses_to_the_cross_entropy_of_every_view() -> None:
    model, config = network(classes=2), DualConfig()
    arguments, truth = batch(4), torch.tensor([0, 1, 1, 0])
    loss, metrics = JointStep(copy.deepcopy(model), config, dual_weight=0.1)(*arguments, truth)
    outputs = encode_views(model, *arguments, bf16=False)
    assert model.classifier is not None
    label = sum(nn.functional.cross_entropy(model.classifier(view), truth) for view in outputs.feature) / 3
    torch.testing.assert_close(loss, label + 0.1 * dual_loss(outputs, config)[0])
    assert {"loss_label", "train_accuracy", "loss_clip", "rank_accuracy"} <= set(metrics)


# --- the dual loss of given embeddings


def random_outputs() -> DualOutputs:
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        return nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)

    return DualOutputs(unit(3, 4, 7), unit(3, 4, 16), unit(3, 4, 3, 8), unit(4, 3, 8))


def test_clamp_of_zero_is_no_clamp() -> None:
    outputs = random_outputs()
    _, metrics = dual_loss(outputs, DualConfig(rank_clamp=0.0))
    free = losses.shuffle_rank(outputs.slots[0], outputs.shuffled, theta=0.05, clamp=None)
    torch.testing.assert_close(metrics["loss_rank_cross"], free)


@pytest.mark.parametrize("slots", [1, 2])
def test_slot_metrics_are_there_when_slots_can_differ(slots: int) -> None:
    outputs = random_outputs()
    fewer = outputs._replace(slots=outputs.slots[:, :, :slots], shuffled=outputs.shuffled[:, :slots])
    _, metrics = dual_loss(fewer, DualConfig(rank_weight=float(slots > 1)))
    assert ("rank_accuracy" in metrics) == ("slot_cosine" in metrics) == (slots > 1)


# --- what it trains


def trained(step: nn.Module, *arguments: object) -> set[str]:
    """Children of the network that one step gives a gradient."""
    loss, _ = step(*arguments)
    loss.backward()
    parts = {
        name.split(".")[1]
        for name, value in step.named_parameters()
        if value.grad is not None and bool(value.grad.abs().sum() > 0)
    }
    for name, value in step.named_parameters():
        assert value.requires_grad == (name.split(".")[1] in parts), name
    return parts


def test_gradients_reach_what_each_step_trains_and_nothing_else() -> None:
    views, changes, permutation = batch(4)
    truth = torch.tensor([0, 1, 1, 0])
    first = views[0], first_view(changes, 4), truth
    dual = trained(DualStep(network(), DualConfig()), views, changes, permutation)
    assert dual == {"backbone", "clip_head", "series_head"}
    assert trained(LabelStep(network(classes=2)), *first) == {"backbone", "classifier"}
    joint = JointStep(network(classes=2), DualConfig(), dual_weight=0.1)
    every = {"backbone", "clip_head", "series_head", "classifier"}
    assert trained(joint, views, changes, permutation, truth) == every


def test_training_learns_to_tell_videos_apart() -> None:
    step = DualStep(network(), DualConfig())
    rng, shown = np.random.default_rng(0), scenes(12, frames=6)
    changes = draw_changes(OFF, 36, rng=rng)
    optimizer = build_optimizer(step.parameters(), OptimConfig(name="adamw"))
    for _ in range(25):
        permutation = torch.from_numpy(draw_permutations(12, 3, rng=rng))
        loss, metrics = step(random_crops(shown, rng), changes, permutation)
        take_step(optimizer, loss, lr=3e-3)
    assert metrics["clip_top1"] > 0.8
    assert metrics["loss_clip"] < 0.5 * math.log(2 * 12 - 1)


def test_training_learns_which_slot_belongs_to_which_segment() -> None:
    step = DualStep(network(2), DualConfig(clip_weight=0.0, coherence_weight=0.0, rank_clamp=0.0))
    rng = np.random.default_rng(0)
    views = torch.from_numpy(np.stack([scenes(8, frames=6)[:, :, 2:34, 2:34]] * 3))
    changes = draw_changes(OFF, 24, rng=rng)
    optimizer = build_optimizer(step.parameters(), OptimConfig(name="adamw"))
    accuracies = []
    for _ in range(50):
        permutation = torch.from_numpy(draw_permutations(8, 2, rng=rng))
        loss, metrics = step(views, changes, permutation)
        take_step(optimizer, loss, lr=1e-3)
        accuracies.append(float(metrics["rank_accuracy"]))
    assert np.mean(accuracies[-10:]) > 0.9
