"""The network with convolutions of 8 bits computes what the 8-bit graph does, up to a step of its scales."""

from pathlib import Path

import numpy as np
import pytest
import torch
from int8_graphs import CLIP, OUTPUTS, exported, run
from torch import nn

from ivdr_deploy.environment import instruction_sets
from ivdr_deploy.errors import ExportError
from ivdr_deploy.export.int8.channels_last import lower
from ivdr_deploy.export.int8.modules import Conv8, quantise_modules
from ivdr_deploy.export.int8.quantise import Quantised, calibrate, quantise
from ivdr_deploy.export.int8.scales import Scale
from ivdr_deploy.export.int8.weights import round_together
from ivdr_deploy.models.backbones import BACKBONES
from ivdr_deploy.models.network import ExportNetwork, VideoModel

pytestmark = pytest.mark.skipif(
    "avx512_vnni" not in instruction_sets(), reason="oneDNN's 8-bit products saturate on this processor"
)

GEOMETRIES = {
    "full kernel": {"kernel_size": 3, "padding": 1},
    "strides": {"kernel_size": 3, "stride": (2, 1, 2), "padding": (1, 0, 1)},
    "dilation": {"kernel_size": (1, 3, 3), "dilation": (1, 2, 2), "padding": (0, 2, 2)},
    "temporal": {"kernel_size": (3, 1, 1), "padding": (1, 0, 0)},
    "one pixel": {"kernel_size": 1},
}


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_convolution_of_8_bits_is_one_step_from_that_of_the_values_it_stands_for(
    geometry: str, relu: bool
) -> None:
    """Zero is the 77th level of what it reads, so that padding shows."""
    rng = np.random.default_rng(0)
    given = nn.Conv3d(5, 7, **GEOMETRIES[geometry])
    weights = given.weight.detach().numpy()
    rounded = round_together(weights, 8, [np.eye(weights[0].size)])
    bias = rng.normal(size=7).astype(np.float32)
    read = Scale(np.float32(0.02), np.uint8(77))
    stored = torch.from_numpy(rng.integers(0, 256, (2, 5, 4, 6, 6)).astype(np.float32))
    x = (stored - 77) * 0.02
    with torch.no_grad():
        given.weight.copy_(torch.from_numpy(rounded.real))
        given.bias.copy_(torch.from_numpy(bias))
        expected = given(x)
        low, high = float(expected.min()), float(expected.max())
        made = Scale.of(0.0 if relu else low, high)
        found = Conv8(given, rounded, bias, read, made)(x)
    assert found.shape == expected.shape
    expected = expected.relu() if relu else expected
    assert float((found - expected).abs().max()) <= 0.51 * float(made.scale) + 1e-5
    assert len(found.unique()) > 20


def quantised(backbone: str, folder: Path) -> tuple[VideoModel, Quantised, np.ndarray]:
    rng = np.random.default_rng(1)
    clips = rng.integers(0, 256, (9, *CLIP.clip_shape), dtype=np.uint8)
    model, _ = exported(backbone, folder / "model.onnx")
    return model, quantise(calibrate(folder / "model.onnx", clips), lower), clips


def computed(model: VideoModel, clips: np.ndarray) -> list[np.ndarray]:
    with torch.no_grad():
        return [output.numpy() for output in ExportNetwork(model, OUTPUTS).eval()(torch.from_numpy(clips))]


def off(expected: np.ndarray, found: np.ndarray) -> float:
    return float(np.sqrt(np.square(expected - found).mean() / np.square(expected).mean()))


@pytest.mark.parametrize(
    "backbone",
    [
        name if name == "tiny" else pytest.param(name, marks=pytest.mark.exhaustive)
        for name, entry in BACKBONES.items()
        if not entry.fixed_size
    ],
)
def test_every_backbone_computes_what_its_8_bit_graph_does(backbone: str, tmp_path: Path) -> None:
    model, made, clips = quantised(backbone, tmp_path)
    exact = computed(model, clips)
    quantise_modules(model, made)
    kinds = [type(module) for module in model.backbone.modules()]
    assert kinds.count(Conv8) == sum(node.op_type == "Conv" for node in made.source.nodes)
    assert not {nn.Conv3d, nn.BatchNorm3d} & set(kinds)
    for name, a, b, c in zip(
        OUTPUTS, exact, computed(model, clips), run(made.keeping(()), clips), strict=True
    ):
        # Of random weights what the heads give may hardly depend on the clip, and so on the rounding.
        assert not np.array_equal(a, b), name
        assert off(a, b) < 0.1, name
        # Of a deep network both round values of their own: as good as independent, they are sqrt(2) as far apart.
        assert off(c, b) < max(0.01, 1.5 * off(a, c)), name


def test_layers_that_are_kept_compute_in_fp32(tmp_path: Path) -> None:
    model, made, clips = quantised("tiny", tmp_path)
    exact = computed(model, clips)
    names = [node.name for node in made.source.nodes if node.op_type == "Conv"]
    quantise_modules(model, made, names)
    for a, b in zip(exact, computed(model, clips), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-4 * np.abs(a).max())
    other, _, _ = quantised("tiny", tmp_path)
    quantise_modules(other, made, names[1:])
    assert sum(isinstance(module, Conv8) for module in other.modules()) == 1


def test_a_graph_of_another_network_is_refused_by_the_layer(tmp_path: Path) -> None:
    model, made, _ = quantised("tiny", tmp_path)
    node = next(node for node in made.source.nodes if node.op_type == "Conv")
    for entry in node.metadata_props:
        entry.value = "backbone.77.conv (somewhere:1)"
    with pytest.raises(ExportError, match=r"backbone\.77\.conv \(somewhere:1\) is no convolution"):
        quantise_modules(model, made)
