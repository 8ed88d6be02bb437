"""The backbones are the networks they claim to be."""

import pytest
import torch

from ivdr_deploy.errors import ConfigError
from ivdr_deploy.models.backbones import BACKBONES, SelfGate, get_backbone
from ivdr_deploy.models.network import build_model
from ivdr_deploy.spec import ClipSpec, ModelSpec


def parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("r2plus1d_10", 14_365_303),
        ("r3d_10", 14_361_792),
        ("r3d_18", 33_166_272),
        ("r2plus1d_18_paper", 33_178_423),
        ("c3d", 27_661_440),
        ("s3d", 7_910_048),
        ("s3dg", 9_098_000),
        ("i3d", 12_279_984),
    ],
)
def test_parameter_count_is_the_published_one(name: str, count: int) -> None:
    with torch.device("meta"):
        assert parameters(BACKBONES[name].build()) == count


def test_r2plus1d_18_is_torchvisions_without_the_classifier() -> None:
    from torchvision.models.video import r2plus1d_18

    whole = r2plus1d_18(weights=None)
    assert parameters(BACKBONES["r2plus1d_18"].build()) == parameters(whole) - parameters(whole.fc)


@pytest.mark.parametrize(
    "name", ["r2plus1d_10", "r3d_10", "r3d_18", "r2plus1d_18", "r2plus1d_18_paper", "c3d"]
)
def test_resnets_and_c3d_map_a_standard_clip_to_512x2x7x7(name: str) -> None:
    with torch.device("meta"):
        assert BACKBONES[name].build()(torch.empty(1, 3, 16, 112, 112)).shape == (1, 512, 2, 7, 7)


@pytest.mark.parametrize("name", ["s3d", "s3dg"])
def test_s3d_maps_a_standard_clip_to_1024x2x3x3(name: str) -> None:
    with torch.no_grad():
        assert BACKBONES[name].build().eval()(torch.zeros(1, 3, 16, 112, 112)).shape == (1, 1024, 2, 3, 3)


def test_i3d_maps_its_clip_to_1024x3x7x7() -> None:
    with torch.device("meta"):
        assert BACKBONES["i3d"].build()(torch.empty(1, 3, 32, 224, 224)).shape == (1, 1024, 3, 7, 7)


def test_i3d_has_no_scale_to_train_and_moves_its_batch_statistics() -> None:
    network = BACKBONES["i3d"].build().train()
    assert not [name for name, _ in network.named_parameters() if name.endswith("norm.weight")]
    before = network.Conv3d_1a_7x7.norm.running_mean.clone()
    network(torch.rand(2, 3, 4, 32, 32)).mean().backward()
    assert not torch.equal(before, network.Conv3d_1a_7x7.norm.running_mean)
    assert all(value.grad is not None for value in network.parameters())


def test_a_gate_weighs_channels_by_the_mean_of_the_clip() -> None:
    gate, x = SelfGate(3), torch.randn(2, 3, 2, 4, 4)
    with torch.no_grad():
        gate.linear.weight.zero_()
        gate.linear.weight[0, 1] = 2.0
        gate.linear.bias.zero_()
    weights = torch.full((2, 3), 0.5)
    weights[:, 0] = torch.sigmoid(2.0 * x[:, 1].mean(dim=(1, 2, 3)))
    torch.testing.assert_close(gate(x), x * weights[:, :, None, None, None])


def test_every_branch_of_the_mixed_blocks_of_s3dg_is_gated() -> None:
    gates = [part for part in BACKBONES["s3dg"].build().modules() if isinstance(part, SelfGate)]
    assert len(gates) == 9 * 4


def test_tiny_has_fewer_than_a_million_parameters() -> None:
    assert parameters(BACKBONES["tiny"].build()) < 1_000_000


@pytest.mark.parametrize("size", [(8, 56), (16, 64), (4, 32)])
def test_tiny_takes_small_clips_and_gives_its_feature_dim(size: tuple[int, int]) -> None:
    frames, side = size
    entry = BACKBONES["tiny"]
    assert entry.build()(torch.zeros(2, 3, frames, side, side)).shape[:2] == (2, entry.feature_dim)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_smallest_clip_is_taken_and_no_smaller_one(name: str) -> None:
    entry = BACKBONES[name]
    frames, side = entry.min_frames, entry.min_size
    with torch.device("meta"):
        network = entry.build()
        assert network(torch.empty(2, 3, frames, side, side)).shape[:2] == (2, entry.feature_dim)
        if entry.fixed_size:
            return
        for smaller in ((frames - 1, side), (frames, side - 1)):
            if 0 not in smaller:
                with pytest.raises(RuntimeError, match="too small"):
                    network(torch.empty(2, 3, smaller[0], smaller[1], smaller[1]))


def test_tiny_feature_depends_on_the_order_of_frames() -> None:
    torch.manual_seed(0)
    network = BACKBONES["tiny"].build().eval()
    clip = torch.rand(1, 3, 8, 56, 56)
    with torch.no_grad():
        forwards, backwards = network(clip).mean((2, 3, 4)), network(clip.flip(2)).mean((2, 3, 4))
    assert (forwards - backwards).norm() > 1e-3 * forwards.norm()


def test_a_backbone_of_fixed_size_refuses_a_larger_clip_too() -> None:
    spec = ModelSpec(backbone="mvit_v2_s", num_slots=0)
    for clip in (
        ClipSpec(num_frames=32, short_side=256, crop_size=224),
        ClipSpec(short_side=256, crop_size=240),
    ):
        with pytest.raises(ConfigError, match="16 frames of 224 pixels a side only"):
            build_model(spec, clip)


def test_unknown_backbone_is_an_error_that_suggests_a_known_one() -> None:
    with pytest.raises(ConfigError, match="unknown backbone 'r3d10'") as caught:
        get_backbone("r3d10")
    assert "r3d_10" in caught.value.hint


def test_name_like_no_other_lists_all_backbones() -> None:
    with pytest.raises(ConfigError) as caught:
        get_backbone("zzz")
    assert all(name in caught.value.hint for name in BACKBONES)
