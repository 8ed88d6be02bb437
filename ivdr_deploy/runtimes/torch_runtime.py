"""Runs a checkpoint with torch, eagerly: the reference that every other runtime is held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.artifacts.manifest import Variant
from ivdr_deploy.errors import ClosedError, DeviceError
from ivdr_deploy.models.network import VideoModel
from ivdr_deploy.runtimes.base import OpenRequest, Runtime, check_batch, check_labels, clips_per_call
from ivdr_deploy.spec import ClipSpec, Device


class TorchRuntime(Runtime):
    """A ``VideoModel`` in fp32.

    Args:
        model: The network; it is moved to ``device`` and put into eval mode.
        clip: Its contract.
        output_names: Outputs to return, in order.
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
        device: Device = "cpu",
        threads: int | None = None,
    ) -> None:
        require_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        self.name = "torch"
        self.precision = "fp32"
        self.output_names = tuple(output_names)
        self.description = f"torch {torch.__version__} eager, {describe_device(device)}, fp32"
        self.call_clips = clips_per_call(clip, device)
        self._clip = clip
        self._device = device
        self._model: VideoModel | None = model.to(device).eval()

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        """Run one batch; see ``Runtime.infer``."""
        check_batch(video, self._clip)
        if self._model is None:
            raise ClosedError("this torch runtime was closed", hint="open the model again")
        # fp32 means fp32: by default cuDNN may compute convolutions in TF32, which keeps 10 bits of each
        # factor.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            outputs = self._model(batch_tensor(video).to(self._device))
            return {name: outputs[name].float().cpu().numpy() for name in self.output_names}

    def close(self) -> None:
        """Let go of the network."""
        self._model = None


def batch_tensor(video: np.ndarray) -> torch.Tensor:
    """View a batch as a tensor; a read-only array is copied, since torch has no read-only tensors."""
    return torch.from_numpy(video if video.flags.writeable else video.copy())


def misfit(variant: Variant, device: Device) -> str:
    """Say why a variant cannot run here on ``device``; empty when it can."""
    return "" if device == "cpu" else _no_cuda()


def open_variant(request: OpenRequest) -> Runtime:
    """Open a checkpoint.

    Raises:
        ArtifactError: if it has other labels than the request.
        CheckpointError: if it is not usable.
        ContractMismatchError: if it has another contract than the request.
        DeviceError: if the device is not there.
    """
    checkpoint = load_checkpoint(request.path, expected_clip=request.clip)
    check_labels(request, checkpoint.info.labels)
    return TorchRuntime(
        checkpoint.model,
        clip=request.clip,
        output_names=request.output_names,
        device=request.device,
        threads=request.threads,
    )


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
