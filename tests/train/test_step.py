"""The training step as a module: what it computes, and what it trains."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from batches import CLIP, OFF, PAPER, batch, first_view, network, random_crops, scenes
from torch import Tensor, nn

from ivdr_deploy.models.network import VideoModel
from train import losses
from train.augment import Changes, apply_changes, draw_changes
from train.config import OptimConfig
from train.data import draw_permutations
from train.dual import DualOutputs, changed_clips, dual_loss, encode_clips, passes
from train.method import DualConfig
from train.optim import build_optimizer, take_step
from train.step import DualStep, JointStep, LabelStep, MocoStep


def encode_views(model: VideoModel, views: Tensor, changes: Changes, permutation: Tensor) -> DualOutputs:
    clips = changed_clips(views, changes, permutation)
    return encode_clips(model, clips, permutation, passes(PAPER), bf16=False)


# --- what it computes


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("together", [False, True])
def test_loss_is_that_of_the_losses_put_together_by_hand(slots: int, together: bool) -> None:
    """Segments are cut, moved and put back by loops here, with nothing of the step or its permutation code."""
    weights = {"clip_weight": 0.3, "coherence_weight": 0.7, "rank_weight": 2.0}
    config = replace(PAPER, **weights, bn_batches="joint" if together else "reference")
    model = network(slots, head_norm="series" if together else "none")
    views, changes, permutation = batch(6, slots)
    step = DualStep(copy.deepcopy(model), config)
    loss, metrics = step(views, changes, permutation)

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
    if together:  # batch norm sees the four clips of a video
        feature = model.encode(torch.cat([video.flatten(0, 1), shuffled]))
        clips = model.clip_head(feature)[:18].view(3, 6, -1)
        q, given = model.series_head(feature).view(4, 6, slots, -1).split([3, 1])
        given = given[0]
    else:
        feature = model.encode(video.flatten(0, 1))
        clips = model.clip_head(feature).view(3, 6, -1)
        q = model.series_head(feature).view(3, 6, slots, -1)
        given = model.series_head(model.encode(shuffled))
    p = torch.empty_like(given)
    for row, place in itertools.product(range(6), range(slots)):
        p[row, int(permutation[row, place])] = given[row, place]
    cross, same = (losses.shuffle_rank(view, p, theta=0.05, clamp=5.0) for view in (q[0], q[2]))
    means = q.mean(dim=2)
    expected = (
        0.3 * losses.nt_xent(losses.rows(clips[0], clips[1]), temperature=0.07)
        + 0.7 * losses.nt_xent(losses.rows(means[0], means[1]), temperature=0.07)
        + 2.0 * (0.5 * cross + 0.5 * same)
    )
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(metrics["loss_rank_cross"], cross.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(metrics["loss_rank_same"], same.detach(), atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    for (name, ours), theirs in zip(step.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_each_mode_has_its_losses_and_encodes_no_more_clips_than_they_need() -> None:
    arguments = batch(4)
    for mode, terms, clips in (
        ("clip", {"clip"}, 2),
        ("clip-tc", {"clip", "coherence"}, 2),
        ("clip-sr", {"clip", "rank_cross", "rank_same"}, 4),
        ("clip-sr-tc", {"clip", "coherence", "rank_cross", "rank_same"}, 4),
    ):
        config = DualConfig(mode=mode)  # type: ignore[arg-type]
        views, changes, permutation = arguments
        changes = changes.take(np.arange(config.views * 4))
        step, seen = DualStep(network(), config), []
        step.model.backbone.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(len(inputs[0]))
        )
        loss, metrics = step(views[: config.views], changes, permutation)
        assert {name.removeprefix("loss_") for name in metrics if name.startswith("loss_")} == terms
        assert sum(seen) == 4 * clips == 4 * config.clips_per_video
        weights = {"clip": 1.0, "coherence": 1.0, "rank_cross": 1.5, "rank_same": 1.5}
        torch.testing.assert_close(
            loss.detach(), sum((weights[name] * metrics[f"loss_{name}"] for name in terms), torch.zeros(()))
        )


def test_warm_up_trains_the_order_of_segments_alone() -> None:
    arguments, step = batch(4), DualStep(network(), DualConfig(rank_warmup_steps=5))
    loss, metrics = step(*arguments, contrast=torch.tensor(0.0))
    expected = 1.5 * (metrics["loss_rank_cross"] + metrics["loss_rank_same"])
    torch.testing.assert_close(loss.detach(), expected)


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
    encoded: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: encoded.append(inputs[0]))
    outputs = encode_views(model, views, changes, orders)
    assert outputs.again is not None
    torch.testing.assert_close(outputs.shuffled, outputs.again.slots, atol=1e-5, rtol=0)
    _, shuffled = encoded
    assert len(
        {round(float((clip * torch.arange(12.0)[None, :, None, None]).sum()), 2) for clip in shuffled}
    ) == (math.factorial(slots))  # every order gave another clip


def test_outputs_are_unit_vectors_of_their_own_view() -> None:
    model = network().eval()  # a video's outputs depend on it alone
    views, changes, permutation = batch(5, augment=OFF)
    outputs = encode_views(model, views, changes, permutation)
    assert outputs.shuffled is not None
    assert outputs.shuffled.shape == (5, 3, 8)
    for view, part in zip(views, (outputs.first, outputs.second, outputs.again), strict=True):
        assert part is not None
        assert part.feature.shape == (5, model.feature_dim)
        torch.testing.assert_close(part.clip.norm(dim=-1), torch.ones(5))
        torch.testing.assert_close(part.slots.norm(dim=-1), torch.ones(5, 3))
        plain = model(view)
        torch.testing.assert_close(part.slots, plain["intra"], atol=1e-4, rtol=0)
        torch.testing.assert_close(part.clip, plain["clip"], atol=1e-4, rtol=0)


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
    clips = changed_clips(*arguments)
    outputs = encode_clips(model, clips, arguments[2], passes(config), bf16=False)
    assert model.classifier is not None
    shown = [outputs.first, outputs.second, outputs.again]
    label = sum(
        nn.functional.cross_entropy(model.classifier(part.feature), truth) for part in shown if part
    ) / len(shown)
    torch.testing.assert_close(loss, label + 0.1 * dual_loss(outputs, arguments[2], config)[0])
    assert {"loss_label", "train_accuracy", "loss_clip", "rank_accuracy"} <= set(metrics)


# --- the queue


MOCO = DualConfig(form="moco", queue_length=10, momentum=0.5)


def test_moco_contrasts_with_keys_of_the_copy_and_with_the_queue_as_it_was() -> None:
    model = network(2, head_norm="series")
    step = MocoStep(copy.deepcopy(model), replace(MOCO, rank_weight=0.0))
    with torch.no_grad():
        for value in step.key.parameters():
            value += 0.01 * torch.randn_like(value)
    key = copy.deepcopy(step.key)
    queue, means = step.clip_queue.clone(), step.slot_queue.clone()
    views, changes, permutation = batch(4, 2)
    videos = torch.tensor([7, 3, 5, 9])
    step.queue_videos[2] = 3  # an entry of the second video
    changes = changes.take(np.arange(8))
    loss, _ = step(views[:2], changes, permutation, videos)

    with torch.no_grad():
        for theirs, ours in zip(key.parameters(), model.parameters(), strict=True):
            theirs.copy_(0.5 * theirs + 0.5 * ours)
    first, second = apply_changes(views[:2].flatten(0, 1), changes).chunk(2)
    assert model.clip_head is not None
    assert key.clip_head is not None
    assert model.series_head is not None
    assert key.series_head is not None
    feature, key_feature = model.encode(first), key.encode(second)
    ignore = torch.zeros(4, 10, dtype=torch.bool)
    ignore[1, 2] = True
    k, k_means = key.clip_head(key_feature), key.series_head(key_feature).mean(dim=1)
    expected, _ = losses.info_nce_queue(model.clip_head(feature), k, queue, temperature=0.07, ignore=ignore)
    coherence, _ = losses.info_nce_queue(
        model.series_head(feature).mean(dim=1), k_means, means, temperature=0.07, ignore=ignore
    )
    torch.testing.assert_close(loss, expected + coherence, atol=1e-5, rtol=1e-5)
    loss.backward()
    (expected + coherence).backward()
    for (name, ours), theirs in zip(step.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-3, msg=name)
    torch.testing.assert_close(step.clip_queue[:4], k)
    torch.testing.assert_close(step.slot_queue[:4], k_means)
    assert torch.equal(step.clip_queue[4:], queue[4:])
    assert step.queue_videos.tolist() == [7, 3, 5, 9] + [-1] * 6
    for _ in range(2):
        step(views[:2], changes, permutation, videos)
    assert step.queue_next == 2  # 12 keys in a queue of 10
    assert step.queue_videos.tolist() == [5, 9, 5, 9, 7, 3, 5, 9, 7, 3]


def test_a_queue_begins_with_random_vectors_of_the_length_of_keys() -> None:
    one = MocoStep(network(1), replace(MOCO, mode="clip-tc", queue_length=400))
    three = MocoStep(network(3), replace(MOCO, queue_length=400))
    for queue in (one.clip_queue, one.slot_queue, three.clip_queue):
        torch.testing.assert_close(queue.norm(dim=-1), torch.ones(400))
    # A mean of three slots is shorter: of random ones a third, squared.
    assert float(three.slot_queue.square().sum(dim=-1).mean()) == pytest.approx(1 / 3, abs=0.05)
    cosines = one.clip_queue @ one.clip_queue.mT - torch.eye(400)
    assert cosines.abs().max() < 0.99


@pytest.mark.parametrize("parts", [1, 3])
def test_the_copy_follows_once_in_a_step_whatever_its_parts(parts: int) -> None:
    step = MocoStep(network(), MOCO, parts=parts)
    before = {name: value.clone() for name, value in step.key.named_parameters()}
    with torch.no_grad():
        for value in step.model.parameters():
            value += 1.0
    for _ in range(parts):
        step(*batch(2), torch.arange(2))
    for name, value in step.key.named_parameters():
        torch.testing.assert_close(value, before[name] + 0.5, msg=name)


def test_an_entry_of_the_same_video_is_a_negative_only_where_that_is_wanted() -> None:
    views, changes, permutation = batch(4)
    found = []
    for mask in (True, False):
        torch.manual_seed(0)
        step = MocoStep(network(), replace(MOCO, mask_same_video=mask))
        step.queue_videos[:] = 1
        _, metrics = step(views, changes, permutation, torch.tensor([0, 1, 2, 3]))
        found.append(float(metrics["loss_clip"]))
    assert found[0] < found[1]


def test_moco_ranks_with_the_query_network_in_the_passes_that_are_set() -> None:
    for bn_batches, expected in (("joint", [12]), ("reference", [4, 8])):
        step, seen = MocoStep(network(), replace(MOCO, bn_batches=bn_batches)), []
        step.model.backbone.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(len(inputs[0]))
        )
        _, metrics = step(*batch(4), torch.arange(4))
        assert seen == expected
        assert "loss_rank_same" in metrics


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
        assert value.requires_grad == (name.split(".")[1] in parts and name.startswith("model.")), name
    return parts


def test_gradients_reach_what_each_step_trains_and_nothing_else() -> None:
    views, changes, permutation = batch(4)
    truth = torch.tensor([0, 1, 1, 0])
    first = views[0], first_view(changes, 4), truth
    dual = trained(DualStep(network(), DualConfig()), views, changes, permutation)
    assert dual == {"backbone", "clip_head", "series_head"}
    videos = torch.arange(4)
    assert trained(MocoStep(network(), MOCO), views, changes, permutation, videos) == dual
    assert trained(LabelStep(network(classes=2)), *first) == {"backbone", "classifier"}
    two, pair = changes.take(np.arange(8)), views[:2]
    clip = DualConfig(mode="clip")  # processes that train together wait for every gradient that is asked for
    assert trained(DualStep(network(), clip), pair, two, permutation) == {"backbone", "clip_head"}
    moco = replace(MOCO, mode="clip")
    assert trained(MocoStep(network(), moco), pair, two, permutation, videos) == {"backbone", "clip_head"}
    ranks = DualConfig(clip_weight=0.0)
    assert trained(DualStep(network(), ranks), views, changes, permutation) == {"backbone", "series_head"}
    joint = JointStep(network(classes=2), clip, dual_weight=0.1)
    assert trained(joint, pair, two, permutation, truth) == {"backbone", "clip_head", "classifier"}
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
        take_step(optimizer, [loss], lr=3e-3)
    assert metrics["clip_top1"] > 0.8
    assert metrics["loss_clip"] < 0.5 * math.log(2 * 12 - 1)


def test_training_learns_which_slot_belongs_to_which_segment() -> None:
    step = DualStep(network(2), replace(PAPER, clip_weight=0.0, coherence_weight=0.0, rank_clamp=0.0))
    rng = np.random.default_rng(0)
    views = torch.from_numpy(np.stack([scenes(8, frames=6)[:, :, 2:34, 2:34]] * 3))
    changes = draw_changes(OFF, 24, rng=rng)
    optimizer = build_optimizer(step.parameters(), OptimConfig(name="adamw"))
    accuracies = []
    for _ in range(50):
        permutation = torch.from_numpy(draw_permutations(8, 2, rng=rng))
        loss, metrics = step(views, changes, permutation)
        take_step(optimizer, [loss], lr=1e-3)
        accuracies.append(float(metrics["rank_accuracy"]))
    assert np.mean(accuracies[-10:]) > 0.9
