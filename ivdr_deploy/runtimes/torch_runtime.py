"""Runs a checkpoint with torch, eagerly: the reference that every other runtime is held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ivdr_deploy.errors import ConfigError
from ivdr_deploy.models.network import VideoModel
from ivdr_deploy.runtimes.base import Runtime, check_batch
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
        ConfigError: if ``device`` is ``cuda`` and torch sees none.
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
        self._clip = clip
        self._device = device
        self._model: VideoModel | None = model.to(device).eval()

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        """Run one batch; see ``Runtime.infer``."""
        check_batch(video, self._clip)
        if self._model is None:
            raise ConfigError("this torch runtime was closed", hint="open the model again")
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


def require_device(device: Device) -> None:
    """Refuse a device that torch cannot use.

    Raises:
        ConfigError: if ``device`` is ``cuda`` and torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        built = (
            "this torch was built without CUDA"
            if torch.version.cuda is None
            else "no NVIDIA driver or GPU was found"
        )
        raise ConfigError(
            f"device 'cuda' was asked for, but {built}", hint="use device 'cpu', or see `ivdr doctor`"
        )


def describe_device(device: Device) -> str:
    """Name the device in words."""
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
