"""Bfloat16 on a CPU: convolutions that it is wrong for are found and computed in float32; the others are left alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ivdr_deploy.models.network import VideoModel, build_model
from ivdr_deploy.spec import ClipSpec, ModelSpec
from train import bf16
from train.bf16 import keep_wrong_in_float32
from train.config import DataConfig, FinetuneConfig
from train.run import prepare
from train.step import LabelStep

CLIP = ClipSpec(num_frames=16, frame_stride=1, short_side=40, crop_size=32)


def network(backbone: str = "r2plus1d_10") -> VideoModel:
    torch.manual_seed(0)
    return build_model(ModelSpec(backbone=backbone, num_classes=2), CLIP)


def gradients(model: VideoModel, *, half: bool) -> dict[str, torch.Tensor]:
    """Return those of the backbone's convolutions, in evaluation mode."""
    video = torch.randint(0, 256, (2, *CLIP.clip_shape), generator=torch.Generator().manual_seed(1)).to(
        torch.uint8
    )
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        feature = model.eval().encode(video)
    feature.float().square().sum().backward()
    return {
        name: part.weight.grad.clone()
        for name, part in model.named_modules()
        if isinstance(part, nn.Conv3d) and part.weight.grad is not None
    }


@pytest.mark.parametrize("backbone", ["r2plus1d_10", "r3d_10", "s3d"])
def test_gradients_in_bfloat16_are_those_of_float32(backbone: str) -> None:
    """Of the last stages, where two frames are left; further down the rounding of all that comes after adds up."""
    model = network(backbone)
    keep_wrong_in_float32(model, CLIP)
    exact, half = gradients(model, half=False), gradients(model, half=True)
    last = list(exact)[-3:]
    for name in last:
        assert (exact[name] - half[name]).norm() <= 0.2 * exact[name].norm(), name


def broken(monkeypatch: pytest.MonkeyPatch, kernel: tuple[int, ...]) -> None:
    """Let bfloat16 be wrong for convolutions with this kernel, whatever the processor does."""
    through = bf16._forth_and_back

    def wrong(part: nn.Conv3d, *arguments: Any) -> list[torch.Tensor]:
        found = through(part, *arguments)
        if part.kernel_size == kernel and arguments[-1] is torch.bfloat16:
            found[-1] = torch.full_like(found[-1], torch.nan)
        return found

    monkeypatch.setattr(bf16, "_forth_and_back", wrong)


def test_what_is_wrong_is_computed_in_float32_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, (1, 3, 3))
    model = network("r2plus1d_10")
    kept = set(keep_wrong_in_float32(model, CLIP))
    parts = {name: part for name, part in model.named_modules() if isinstance(part, nn.Conv3d)}
    spatial = {name for name, part in parts.items() if part.kernel_size == (1, 3, 3)}
    assert spatial
    assert spatial <= kept
    seen: dict[str, torch.dtype] = {}
    through = nn.functional.conv3d

    def conv3d(video: torch.Tensor, weight: torch.Tensor, *rest: object) -> torch.Tensor:
        name = next(name for name, part in parts.items() if part.weight is weight)
        found = through(video, weight, *rest)
        seen[name] = found.dtype
        return found

    monkeypatch.setattr(nn.modules.conv.F, "conv3d", conv3d)
    gradients(model, half=True)
    assert seen == {name: torch.float32 if name in kept else torch.bfloat16 for name in parts}


def test_a_copy_computes_with_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of MoCo are a copy."""
    broken(monkeypatch, (1, 3, 3))
    model = network()
    kept = keep_wrong_in_float32(model, CLIP)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, part in other.named_modules():
            if name in kept:
                part.weight.neg_()
    video = torch.full((1, *CLIP.clip_shape), 200, dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        one, two = model.eval().encode(video), other.eval().encode(video)
    assert not torch.equal(one, two)


def test_weights_running_means_mode_and_chance_stay() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    keep_wrong_in_float32(model.train(), CLIP)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("half", [True, False])
def test_a_run_says_what_it_keeps_in_float32(
    half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    broken(monkeypatch, (1, 3, 3))
    model = network()
    config = FinetuneConfig(out=str(tmp_path), data=DataConfig(train="videos.csv"), clip=CLIP, bf16=half)
    prepare(config, LabelStep(model, bf16=half), torch.device("cpu"))
    said = capfd.readouterr().err.replace("\n", "")
    assert ("compute in float32" in said) == half
    assert ("backbone." in said) == half
