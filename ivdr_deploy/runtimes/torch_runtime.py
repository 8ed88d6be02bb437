"""Runs a checkpoint with torch, eagerly: in fp32 the reference that every other runtime is held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ivdr_deploy._text import quoted
from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.artifacts.manifest import Variant
from ivdr_deploy.errors import ClosedError, DeviceError, EngineIncompatibleError
from ivdr_deploy.models.network import VideoModel
from ivdr_deploy.runtimes.base import OpenRequest, Runtime, check_batch, check_labels, clips_per_call
from ivdr_deploy.runtimes.cuda_calls import CudaCalls, Network, as_tensor
from ivdr_deploy.spec import ClipSpec, Device, Precision

LAYOUT_KEY = "memory_format"
"""Entry of ``Variant.build`` that holds how the weights of the backbone lie: a key of ``LAYOUTS``."""

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}


class TorchRuntime(Runtime):
    """A ``VideoModel``.

    Args:
        model: The network; it is moved to ``device``, put into eval mode, and its backbone into ``precision``.
        clip: Its contract.
        output_names: Outputs to return, in order.
        precision: Of the backbone: ``fp32``, ``fp16`` or ``bf16``.
        layout: A key of ``LAYOUTS``.
        device: Where to run.
        threads: Threads of one operator on the CPU. torch has one such number per process: this sets it. None
            leaves it.

    Raises:
        DeviceError: if ``device`` is ``cuda`` and torch sees none.
    """

    def __init__(
        self,
        model: VideoModel,
        *,
        clip: ClipSpec,
        output_names: Sequence[str],
        precision: Precision = "fp32",
        layout: str = "contiguous",
        device: Device = "cpu",
        threads: int | None = None,
    ) -> None:
        require_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        if precision != "fp32":
            model.set_precision(precision)
        self.name = "torch"
        self.precision = precision
        self.output_names = tuple(output_names)
        self.description = f"torch {torch.__version__} eager, {describe_device(device)}, {precision}"
        self.call_clips = clips_per_call(clip, device)
        self._clip = clip
        self._model: VideoModel | None = model.to(device).eval()
        model.backbone.to(memory_format=LAYOUTS[layout])
        self._cuda = CudaCalls(self._forward, clip.clip_shape) if device == "cuda" else None

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        """Run one batch; see ``Runtime.infer``."""
        check_batch(video, self._clip)
        if self._model is None:
            raise ClosedError("this torch runtime was closed", hint="open the model again")
        return dict(zip(self.output_names, run_network(self._forward, video, self._cuda), strict=True))

    def _forward(self, video: Tensor) -> list[Tensor]:
        assert self._model is not None
        # fp32 means fp32: by default cuDNN may compute convolutions in TF32, which keeps 10 bits of each factor.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            outputs = self._model(video)
        return [outputs[name] for name in self.output_names]

    def close(self) -> None:
        """Let go of the network."""
        self._model = self._cuda = None


def run_network(network: Network, video: np.ndarray, cuda: CudaCalls | None) -> list[np.ndarray]:
    """Run one batch, uint8 (N, T, H, W, 3), through ``cuda`` where that is given, else on the CPU; float32 arrays."""
    if cuda is not None:
        return cuda(video)
    with torch.inference_mode():
        return [output.float().numpy() for output in network(as_tensor(video))]


def misfit(variant: Variant, device: Device) -> str:
    """Say why a variant cannot run here on ``device``; empty when it can."""
    return _unknown_layout(variant) or ("" if device == "cpu" else _no_cuda())


def open_variant(request: OpenRequest) -> Runtime:
    """Open a checkpoint.

    Raises:
        ArtifactError: if it has other labels than the request.
        CheckpointError: if it is not usable.
        ContractMismatchError: if it has another contract than the request.
        DeviceError: if the device is not there.
        EngineIncompatibleError: if the variant asks for a layout that is not known here.
    """
    if reason := _unknown_layout(request.variant):
        raise EngineIncompatibleError(
            f"{request.path} cannot run here: {reason}",
            hint="export the variant again: `ivdr export BUNDLE --engine torch --precision PRECISION`",
        )
    checkpoint = load_checkpoint(request.path, expected_clip=request.clip)
    check_labels(request, checkpoint.info.labels)
    return TorchRuntime(
        checkpoint.model,
        clip=request.clip,
        output_names=request.output_names,
        precision=request.variant.precision,
        layout=request.variant.build.get(LAYOUT_KEY, "contiguous"),
        device=request.device,
        threads=request.threads,
    )


def _unknown_layout(variant: Variant) -> str:
    layout = variant.build.get(LAYOUT_KEY, "contiguous")
    return "" if layout in LAYOUTS else f"it asks for the memory format {quoted(layout)}, which is not known"


def require_device(device: Device) -> None:
    """Refuse a device that torch cannot use.

    Raises:
        DeviceError: if ``device`` is ``cuda`` and torch sees none.
    """
    if device == "cuda" and (reason := _no_cuda()):
        raise DeviceError(
            f"device 'cuda' was asked for, but {reason}", hint="use device 'cpu', or see `ivdr doctor`"
        )


def _no_cuda() -> str:
    """Say why torch has no CUDA device; empty when it has."""
    if torch.cuda.is_available():
        return ""
    return (
        "this torch was built without CUDA"
        if torch.version.cuda is None
        else "no NVIDIA driver or GPU was found"
    )


def describe_device(device: Device) -> str:
    """Name the device in words."""
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
