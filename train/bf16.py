"""Bfloat16 on a CPU: which convolutions it is right for, proved before a run begins.

Where two frames meet a kernel that is three deep, as in the last stage of most backbones on 16 frames, torch 2.14
leaves two thirds of the gradient of the weights unwritten (oneDNN, processors with AVX-512): what lay in the memory is
taken for it, and the run ends in NaN or learns from noise.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ivdr_deploy.models.network import VideoModel
from ivdr_deploy.spec import ClipSpec

MOST = 0.05
"""How far a result in bfloat16 may be from that in float32, as a share of its length. Rounding gives 0.003."""


class _Case(NamedTuple):
    """A convolution and its input, as far as what the processor does depends on them."""

    shape: torch.Size
    channels_last: bool
    settings: str


def keep_wrong_in_float32(model: VideoModel, clip: ClipSpec) -> list[str]:
    """Run each convolution forth and back in both precisions, and keep in float32 those that differ.

    Args:
        model: On the CPU, in the memory format of the run. Weights, running means and the random state stay.
        clip: What it is trained on.

    Returns:
        Their names.
    """
    cases: dict[str, _Case] = {}
    convolutions = {name: part for name, part in model.named_modules() if isinstance(part, nn.Conv3d)}
    hooks = [part.register_forward_pre_hook(_keep_case(cases, name)) for name, part in convolutions.items()]
    training = model.training
    try:
        with torch.no_grad():
            model.eval().encode(torch.zeros(1, *clip.clip_shape, dtype=torch.uint8))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    right: dict[_Case, bool] = {}
    for name, case in cases.items():
        if case not in right:
            right[case] = _is_right(convolutions[name], case)
    wrong = [name for name, case in cases.items() if not right[case]]
    for name in wrong:
        part = convolutions[name]
        # A method of the part: a copy of the model computes with its own weights.
        part.forward = MethodType(_in_float32, part)  # type: ignore[method-assign]
    return wrong


def _keep_case(cases: dict[str, _Case], name: str) -> Any:
    def keep(part: nn.Module, given: tuple[Tensor, ...]) -> None:
        last = given[0].is_contiguous(memory_format=torch.channels_last_3d)
        cases[name] = _Case(given[0].shape, last, repr(part))

    return keep


def _is_right(part: nn.Conv3d, case: _Case) -> bool:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layout = torch.channels_last_3d if case.channels_last else torch.contiguous_format
        video = torch.randn(case.shape).contiguous(memory_format=layout)
        with torch.no_grad():
            gradient = torch.randn_like(part(video))
    exact, half = (_forth_and_back(part, video, gradient, dtype) for dtype in (torch.float32, torch.bfloat16))
    return all(
        bool((one - other).norm() <= MOST * one.norm())  # false for NaN
        for one, other in zip(exact, half, strict=True)
    )


def _forth_and_back(part: nn.Conv3d, video: Tensor, gradient: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return what comes out, and the gradients of input and weights, in float32."""
    given = video.detach().to(dtype).requires_grad_()
    weights = {name: value.detach().to(dtype).requires_grad_() for name, value in part.named_parameters()}
    with torch.enable_grad():
        found = functional_call(part, weights, (given,))
        gradients = torch.autograd.grad(found, [given, *weights.values()], gradient.to(dtype))
    return [value.detach().float() for value in (found, *gradients)]


def _in_float32(part: nn.Conv3d, video: Tensor) -> Tensor:
    """Compute outside of autocast; the result is of the type that it would have had."""
    kind = video.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else video.dtype
    with torch.autocast(kind, enabled=False):
        return type(part).forward(part, video.float()).to(dtype)
