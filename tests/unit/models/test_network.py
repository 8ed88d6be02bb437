"""The network: normalisation, outputs and state dict."""

import pytest
import torch

from ivdr_deploy.errors import ConfigError
from ivdr_deploy.models.network import ExportNetwork, VideoModel, build_model
from ivdr_deploy.spec import ClipSpec, ModelSpec

CLIP = ClipSpec(num_frames=6, short_side=36, crop_size=32)


def tiny(**fields: object) -> VideoModel:
    torch.manual_seed(0)
    return build_model(
        ModelSpec(backbone="tiny", **{"num_classes": 5, "num_slots": 3, **fields}), CLIP
    ).eval()


@pytest.fixture
def video() -> torch.Tensor:
    return torch.randint(
        0, 256, (2, *CLIP.clip_shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def test_outputs_have_their_names_shapes_and_lengths(video: torch.Tensor) -> None:
    model = tiny()
    outputs = model(video)
    shapes = {name: tuple(value.shape) for name, value in outputs.items()}
    assert shapes == {
        "feature": (2, model.feature_dim), "clip": (2, 128), "inter": (2, 64), "intra": (2, 3, 64), "logits": (2, 5)
    }  # fmt: skip
    for name in ("clip", "inter", "intra"):
        torch.testing.assert_close(outputs[name].norm(dim=-1), torch.ones(outputs[name].shape[:-1]))


def test_inter_is_the_unit_mean_of_the_slots(video: torch.Tensor) -> None:
    outputs = tiny()(video)
    mean = outputs["intra"].mean(dim=1)
    torch.testing.assert_close(outputs["inter"], mean / mean.norm(dim=-1, keepdim=True))


def test_network_without_classes_has_no_logits(video: torch.Tensor) -> None:
    assert "logits" not in tiny(num_classes=0)(video)


def test_backbone_sees_normalised_pixels_in_channel_order(video: torch.Tensor) -> None:
    model = tiny()
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(video)
    mean, std = torch.tensor(CLIP.mean), torch.tensor(CLIP.std)
    expected = ((video.double() / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(seen[0].double(), expected, atol=1e-5, rtol=0)


def test_float_and_uint8_input_of_equal_value_give_equal_features(video: torch.Tensor) -> None:
    model = tiny()
    assert torch.equal(model.encode(video), model.encode(video.float()))


def test_feature_is_the_global_mean_of_the_backbones_map(video: torch.Tensor) -> None:
    model = tiny()
    maps = []
    model.backbone.register_forward_hook(lambda _, __, output: maps.append(output))
    feature = model(video)["feature"]
    torch.testing.assert_close(feature, maps[0].flatten(2).mean(dim=2))


def test_state_dict_holds_the_four_public_prefixes_and_no_normalisation() -> None:
    prefixes = {name.split(".")[0] for name in tiny().state_dict()}
    assert prefixes == {"backbone", "clip_head", "series_head", "classifier"}


def test_paper_network_has_15021943_parameters() -> None:
    model = build_model(ModelSpec(backbone="r2plus1d_10"), ClipSpec())
    assert sum(parameter.numel() for parameter in model.parameters()) == 15_021_943


def test_slots_that_do_not_divide_the_clip_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_slots 4 does not divide num_frames 6"):
        build_model(ModelSpec(backbone="tiny", num_slots=4), CLIP)


@pytest.mark.parametrize(("frames", "side"), [(16, 16), (4, 112)])
def test_a_clip_that_is_too_small_for_the_backbone_is_refused(frames: int, side: int) -> None:
    clip = ClipSpec(num_frames=frames, short_side=128, crop_size=side)
    with pytest.raises(
        ConfigError, match=f"s3d needs clips of at least 5 frames of 17 .* found {frames} of {side}"
    ):
        build_model(ModelSpec(backbone="s3d"), clip)


def test_export_network_returns_the_chosen_outputs_in_order(video: torch.Tensor) -> None:
    model = tiny()
    intra, logits = ExportNetwork(model, ("intra", "logits"))(video)
    outputs = model(video)
    assert torch.equal(intra, outputs["intra"])
    assert torch.equal(logits, outputs["logits"])


@pytest.mark.parametrize(
    ("head_norm", "normed"),
    [("none", set()), ("series", {"series_head"}), ("both", {"series_head", "clip_head"})],
)
def test_norms_stand_in_front_of_the_heads_that_are_named_and_not_in_what_is_exported(
    video: torch.Tensor, head_norm: str, normed: set[str]
) -> None:
    model = tiny(head_norm=head_norm)
    found = {name.split(".")[0] for name in model.state_dict() if ".norm.running_mean" in name}
    assert found == normed
    model.train()(video)
    before = {name: value.clone() for name, value in model.eval().state_dict().items()}
    network = ExportNetwork(model, ("inter", "intra")).eval()
    assert not [name for name, _ in network.named_buffers() if "head.norm" in name]
    inter, intra = network(video)
    outputs = model(video)
    torch.testing.assert_close(inter, outputs["inter"], atol=1e-5, rtol=0)
    torch.testing.assert_close(intra, outputs["intra"], atol=1e-5, rtol=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
