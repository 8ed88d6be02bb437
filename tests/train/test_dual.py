"""The dual loss of given embeddings: every setting is that of its own loss, and every metric is what its name says."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from train import losses
from train.dual import DualOutputs, Encoded, Queue, dual_loss
from train.method import DualConfig


def unit(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def random_outputs(slots: int = 3) -> DualOutputs:
    seeds = itertools.count()
    parts = (
        Encoded(*(unit(4, *shape, seed=next(seeds)) for shape in ((7,), (16,), (slots, 8)))) for _ in range(3)
    )
    return DualOutputs(*parts, unit(4, slots, 8, seed=next(seeds)))


def parts_of(outputs: DualOutputs) -> tuple[Encoded, Encoded, Encoded, Tensor]:
    first, second, again, shuffled = outputs
    assert first is not None
    assert second is not None
    assert again is not None
    assert shuffled is not None
    return first, second, again, shuffled


def mean(part: Encoded) -> Tensor:
    return part.slots.mean(dim=1)


def orders(slots: int = 3) -> Tensor:
    return torch.arange(slots).flip(0).repeat(4, 1)


def test_clamp_of_zero_is_no_clamp() -> None:
    outputs = random_outputs()
    _, metrics = dual_loss(outputs, orders(), DualConfig(rank_clamp=0.0))
    assert outputs.first is not None
    assert outputs.shuffled is not None
    free = losses.shuffle_rank(outputs.first.slots, outputs.shuffled, theta=0.05, clamp=None)
    torch.testing.assert_close(metrics["loss_rank_cross"], free)
    assert metrics["clamped_share"] == 0.0
    assert dual_loss(outputs, orders(), DualConfig(rank_clamp=1.0))[1]["clamped_share"] > 0.0


def test_one_slot_has_no_metrics_of_slots() -> None:
    _, metrics = dual_loss(random_outputs(1), orders(1), DualConfig(mode="clip-tc"))
    assert not {"rank_accuracy", "slot_cosine"} & set(metrics)


def test_swapped_accuracy_counts_truly_shuffled_clips_alone() -> None:
    """An order-blind encoder gives a shuffled clip the slots of the clip: calibrated, they lie the wrong way."""
    outputs = random_outputs(2)
    assert outputs.first is not None
    order = torch.tensor([[0, 1], [1, 0], [1, 0], [0, 1]])
    blind = losses.calibrate(outputs.first.slots, order)
    outputs = outputs._replace(shuffled=blind, again=outputs.first)
    _, metrics = dual_loss(outputs, order, DualConfig())
    assert metrics["rank_accuracy"] == metrics["rank_accuracy_same"] == 0.5
    assert metrics["swapped_accuracy"] == metrics["swapped_accuracy_same"] == 0.0
    seen = outputs._replace(shuffled=outputs.first.slots, again=outputs.first)
    turned = seen.first._replace(slots=seen.first.slots.flip(1))  # type: ignore[union-attr]
    # By the pair of the same pixels, from 0 at what an encoder scores that sees no order.
    for exclude, score in ((False, 1.0), (True, 1.0)):
        config = DualConfig(rank_exclude_identity=exclude)
        _, metrics = dual_loss(seen._replace(first=turned), order, config)
        assert (metrics["rank_accuracy"], metrics["rank_accuracy_same"]) == (0.0, 1.0)
        assert metrics["order_score"] == score
    for exclude, score in ((False, 0.0), (True, 0.5)):
        _, metrics = dual_loss(outputs, order, DualConfig(rank_exclude_identity=exclude))
        assert metrics["order_score"] == score
    unmoved = outputs._replace(shuffled=outputs.first.slots)  # type: ignore[union-attr]
    _, metrics = dual_loss(unmoved, torch.arange(2).repeat(4, 1), DualConfig())
    assert metrics["swapped_accuracy"].isnan()


# --- every setting is that of its own loss

APART = DualConfig(
    clip_weight=0.3,
    coherence_weight=0.7,
    rank_weight=2.0,
    clip_temperature=0.1,
    coherence_temperature=0.4,
    rank_theta=0.2,
    rank_clamp=1.0,
)
"""No two settings alike, and none as by default."""


def assert_metrics(metrics: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, msg=lambda text, name=name: f"{name}: {text}")


def weighed(terms: dict[str, Tensor]) -> Tensor:
    """The sum of the losses under the weights of ``APART``; each of the two pairs of shuffle-rank counts half."""
    contrast = 0.3 * terms["loss_clip"] + 0.7 * terms["loss_coherence"]
    return contrast + 1.0 * terms["loss_rank_cross"] + 1.0 * terms["loss_rank_same"]


def test_every_loss_has_its_own_temperature_within_the_batch() -> None:
    outputs = random_outputs()
    first, second, again, shuffled = parts_of(outputs)
    loss, metrics = dual_loss(outputs, orders(), APART)
    clips, means = losses.rows(first.clip, second.clip), losses.rows(mean(first), mean(second))
    expected = {
        "loss_clip": losses.nt_xent(clips, temperature=0.1),
        "loss_coherence": losses.nt_xent(means, temperature=0.4),
        "loss_rank_cross": losses.shuffle_rank(first.slots, shuffled, theta=0.2, clamp=1.0),
        "loss_rank_same": losses.shuffle_rank(again.slots, shuffled, theta=0.2, clamp=1.0),
        "clamped_share": losses.clamped_fraction(first.slots, shuffled, theta=0.2, clamp=1.0),
    }
    assert_metrics(metrics, expected)
    torch.testing.assert_close(loss, weighed(expected))


@pytest.mark.parametrize("mask", [True, False])
def test_every_loss_has_its_own_temperature_against_a_queue(mask: bool) -> None:
    outputs, config = random_outputs(), replace(APART, form="moco", mask_same_video=mask)
    first, second, again, shuffled = parts_of(outputs)
    same = torch.zeros(4, 9, dtype=torch.bool)
    same[1, 2] = same[3, 0] = True
    queue = Queue(unit(9, 16, seed=1), unit(9, 8, seed=2), same)
    loss, metrics = dual_loss(outputs, orders(), config, queue=queue)
    ignore = same if mask else None
    clip = losses.info_nce_queue(first.clip, second.clip, queue.clip, temperature=0.1, ignore=ignore)
    means = losses.info_nce_queue(mean(first), mean(second), queue.means, temperature=0.4, ignore=ignore)
    expected = {
        "loss_clip": clip[0],
        "loss_coherence": means[0],
        "loss_rank_cross": losses.shuffle_rank(first.slots, shuffled, theta=0.2, clamp=1.0),
        "loss_rank_same": losses.shuffle_rank(again.slots, shuffled, theta=0.2, clamp=1.0),
    }
    assert_metrics(metrics, expected | {"clip_top1": clip[1], "coherence_top1": means[1]})
    torch.testing.assert_close(loss, weighed(expected))


# --- every metric is what its name says


def test_metrics_of_random_embeddings_are_those_of_loops() -> None:
    outputs = random_outputs()
    first, second, _, _ = parts_of(outputs)
    _, metrics = dual_loss(outputs, orders(), DualConfig())
    cosines, norms = [], []
    for slots in first.slots:
        norms.append(math.sqrt(sum(float(slots[:, axis].mean()) ** 2 for axis in range(8))))
        cosines += [float(slots[one] @ slots[two]) for one in range(3) for two in range(3) if one != two]
    expected = {
        "inter_norm": torch.tensor(sum(norms) / len(norms)),
        "slot_cosine": torch.tensor(sum(cosines) / len(cosines)),
        "alignment": losses.alignment(first.clip, second.clip),
        "uniformity": losses.uniformity(first.clip),
        "effective_rank": losses.effective_rank(first.feature),
    }
    assert_metrics(metrics, expected)


def test_each_contrast_says_whether_it_finds_its_own_videos() -> None:
    """Clips that are found by their embeddings, and not by their slots; and the other way round."""
    first, second, again, shuffled = parts_of(random_outputs())
    lost = {"clip": second.clip.roll(1, 0), "slots": second.slots.roll(1, 0)}
    first = first._replace(clip=second.clip, slots=second.slots)
    for name, found in (("slots", (1.0, 0.0)), ("clip", (0.0, 1.0))):
        other = second._replace(**{name: lost[name]})
        _, metrics = dual_loss(DualOutputs(first, other, again, shuffled), orders(), DualConfig())
        assert (metrics["clip_top1"], metrics["coherence_top1"]) == found
