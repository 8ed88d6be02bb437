"""One step of dual-representation learning, on tensors alone."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ivdr_deploy.models.network import VideoModel, build_model
from ivdr_deploy.spec import ClipSpec, ModelSpec
from train import losses
from train.config import AugmentConfig, DataConfig, DualConfig, OptimConfig, PretrainConfig
from train.dual import DualOutputs, dual_loss, encode_views
from train.optim import build_optimizer, take_step

CLIP = ClipSpec(num_frames=6, short_side=36, crop_size=32)
CONFIG = PretrainConfig(
    out="unused",
    data=DataConfig(train="unused"),
    clip=CLIP,
    model=ModelSpec(backbone="tiny", num_slots=3, clip_dim=16, slot_dim=8),
    augment=AugmentConfig(jitter_probability=0.0),
)


def model() -> VideoModel:
    torch.manual_seed(0)
    return build_model(CONFIG.model, CLIP).train()


def batch(rng: np.random.Generator, scenes: np.ndarray) -> np.ndarray:
    """Three random crops of every scene, uint8 (3, B, T, crop, crop, 3)."""
    views = np.empty((3, len(scenes), *CLIP.clip_shape), np.uint8)
    for view in views:
        for target, scene in zip(view, scenes, strict=True):
            y, x = rng.integers(0, 5, 2)
            target[...] = scene[:, y : y + 32, x : x + 32]
    return views


def scenes(count: int) -> np.ndarray:
    """Coarse random pictures that change from frame to frame."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 6, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(9, axis=2).repeat(9, axis=3)


def test_outputs_are_view_major_unit_vectors() -> None:
    rng = np.random.default_rng(0)
    network = model()
    outputs = encode_views(network, batch(rng, scenes(5)), CONFIG, rng=rng)
    assert outputs.feature.shape == (3, 5, network.feature_dim)
    assert outputs.clip.shape == (3, 5, 16)
    assert outputs.slots.shape == (3, 5, 3, 8)
    assert outputs.shuffled.shape == (5, 3, 8)
    torch.testing.assert_close(outputs.clip.norm(dim=-1), torch.ones(3, 5))
    torch.testing.assert_close(outputs.slots.norm(dim=-1), torch.ones(3, 5, 3))


def test_only_the_third_view_is_shuffled_and_put_back() -> None:
    """In eval mode a video's slots depend on it alone, so that each can be recomputed by hand."""
    network = model().eval()
    rng = np.random.default_rng(3)
    views = batch(np.random.default_rng(1), scenes(6))
    outputs = encode_views(network, views, CONFIG, rng=rng)
    third = torch.from_numpy(views[2])
    orders = [[a, b, 3 - a - b] for a in range(3) for b in range(3) if a != b]
    with torch.no_grad():
        for row in range(6):
            candidates = []
            for order in orders:
                permutation = torch.tensor([order])
                shuffled = losses.shuffle_segments(third[row : row + 1].float(), permutation)
                slots = network.series_head(network.encode(shuffled))
                candidates.append(losses.calibrate(slots, permutation)[0])
            assert any(torch.allclose(outputs.shuffled[row], one, atol=1e-4) for one in candidates)
        plain = network(torch.from_numpy(views[0]))
    torch.testing.assert_close(outputs.slots[0], plain["intra"], atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.clip[0], plain["clip"], atol=1e-4, rtol=0)


def random_outputs() -> DualOutputs:
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)

    return DualOutputs(unit(3, 4, 7), unit(3, 4, 16), unit(3, 4, 3, 8), unit(4, 3, 8))


def test_total_is_the_weighted_sum_of_the_losses() -> None:
    outputs = random_outputs()
    q, p = outputs.slots, outputs.shuffled
    config = DualConfig(clip_weight=0.125, coherence_weight=2.0, rank_weight=3.0, coherence_temperature=0.2)
    clip = losses.nt_xent(outputs.clip[0], outputs.clip[1], temperature=0.07)
    coherence = losses.temporal_coherent(q[0], q[1], temperature=0.2)
    cross, same = (losses.shuffle_rank(view, p, theta=0.05, clamp=5.0) for view in (q[0], q[2]))
    total, metrics = dual_loss(outputs, config)
    torch.testing.assert_close(total, 0.125 * clip + 2.0 * coherence + 3.0 * (0.5 * cross + 0.5 * same))
    torch.testing.assert_close(metrics["loss_rank_cross"], cross)
    torch.testing.assert_close(metrics["loss_rank_same"], same)


def test_clamp_of_zero_is_no_clamp() -> None:
    outputs = random_outputs()
    _, metrics = dual_loss(outputs, DualConfig(rank_clamp=0.0))
    free = losses.shuffle_rank(outputs.slots[0], outputs.shuffled, theta=0.05, clamp=None)
    torch.testing.assert_close(metrics["loss_rank_cross"], free)


def test_plain_clips_are_first_views_only() -> None:
    augment = AugmentConfig(plain_probability=1.0, jitter_probability=1.0)
    network, seen = model(), []
    network.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    rng = np.random.default_rng(0)
    views = batch(rng, scenes(4))
    encode_views(network, views, replace(CONFIG, augment=augment), rng=rng)
    pixels = torch.from_numpy(views).flatten(0, 1).float().permute(0, 4, 1, 2, 3)
    expected = pixels * network.scale + network.offset
    unchanged = (seen[0] - expected).abs().amax(dim=(1, 2, 3, 4)) < 1e-3
    assert unchanged.tolist() == [True] * 4 + [False] * 8


def test_training_learns_to_tell_videos_apart() -> None:
    network, rng, shown = model(), np.random.default_rng(0), scenes(12)
    optimizer = build_optimizer(network.parameters(), OptimConfig(name="adamw"))
    for _ in range(25):
        loss, metrics = dual_loss(encode_views(network, batch(rng, shown), CONFIG, rng=rng), CONFIG.dual)
        take_step(optimizer, loss, lr=3e-3)
    assert metrics["clip_top1"] > 0.8
    assert metrics["loss_clip"] < 0.5 * math.log(2 * 12 - 1)


def test_training_learns_which_slot_belongs_to_which_segment() -> None:
    spec = replace(CONFIG.model, num_slots=2)
    rank_only = DualConfig(clip_weight=0.0, coherence_weight=0.0, rank_clamp=0.0)
    config = replace(CONFIG, model=spec, dual=rank_only)
    torch.manual_seed(0)
    network, rng, shown = build_model(spec, CLIP).train(), np.random.default_rng(0), scenes(8)
    views = np.stack([shown[:, :, 2:34, 2:34]] * 3)
    optimizer = build_optimizer(network.parameters(), OptimConfig(name="adamw"))
    accuracies = []
    for _ in range(50):
        loss, metrics = dual_loss(encode_views(network, views, config, rng=rng), rank_only)
        take_step(optimizer, loss, lr=1e-3)
        accuracies.append(float(metrics["rank_accuracy"]))
    assert np.mean(accuracies[-10:]) > 0.9


@pytest.mark.parametrize("slots", [1, 2])
def test_slot_metrics_are_there_when_slots_can_differ(slots: int) -> None:
    outputs = random_outputs()
    fewer = replace(outputs, slots=outputs.slots[:, :, :slots], shuffled=outputs.shuffled[:, :slots])
    _, metrics = dual_loss(fewer, DualConfig(rank_weight=float(slots > 1)))
    assert ("rank_accuracy" in metrics) == ("slot_cosine" in metrics) == (slots > 1)
