"""Runs an AOTInductor package: the network compiled ahead of time into machine code, without the code of the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ivdr_deploy._text import QUOTED, few, one_line, reason_of
from ivdr_deploy.artifacts.manifest import Variant
from ivdr_deploy.errors import ArtifactError, ClosedError, EngineIncompatibleError
from ivdr_deploy.runtimes.base import OpenRequest, Runtime, check_batch, check_labels_digest, clips_per_call
from ivdr_deploy.runtimes.cuda_calls import CudaCalls
from ivdr_deploy.runtimes.torch_runtime import describe_device, require_device, run_network
from ivdr_deploy.spec import ClipSpec, Device, Precision

TORCH_KEY = "torch"
"""Entry of ``Variant.build`` that holds the version of torch which compiled the package."""

LABELS_KEY = "labels_sha256"
"""Entry that holds the digest of the labels; see ``manifest.labels_sha256``."""

_HINT = (
    "export it again here: `ivdr export BUNDLE --engine aoti --precision PRECISION`; or take another variant"
)


class AotiRuntime(Runtime):
    """One package.

    A package is machine code, and loading it runs what is in it. So it is loaded only where its bundle says that it
    fits: see ``misfit``.

    Args:
        path: The ``.pt2`` file.
        clip: Its contract.
        output_names: What it was compiled to return, in order.
        precision: Of its backbone.
        device: What it was compiled for.
        threads: As in ``TorchRuntime``.

    Raises:
        DeviceError: if torch cannot use the device.
        ArtifactError: if the file cannot be loaded.
    """

    def __init__(
        self,
        path: Path,
        *,
        clip: ClipSpec,
        output_names: Sequence[str],
        precision: Precision,
        device: Device = "cpu",
        threads: int | None = None,
    ) -> None:
        require_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            with _own_word_on_instructions():
                self._package: Any = torch._inductor.aoti_load_package(str(path))
        except Exception as error:  # the loader raises what it likes on a file that is no package
            said = f"{type(error).__name__}: {reason_of(error)}"
            raise ArtifactError(f"{path} cannot be loaded by torch ({said})", hint=_HINT) from error
        self.name = "aoti"
        self.precision = precision
        self.output_names = tuple(output_names)
        self.description = f"torch {torch.__version__} AOTInductor, {describe_device(device)}, {precision}"
        self.call_clips = clips_per_call(clip, device)
        self._clip = clip
        self._cuda = CudaCalls(self._package, clip.clip_shape) if device == "cuda" else None

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        """Run one batch; see ``Runtime.infer``."""
        check_batch(video, self._clip)
        if self._package is None:
            raise ClosedError("this package was closed", hint="open the model again")
        return dict(zip(self.output_names, run_network(self._package, video, self._cuda), strict=True))

    def close(self) -> None:
        """Let go of the package."""
        self._package = self._cuda = None


def misfit(variant: Variant, device: Device) -> str:
    """Say why a package cannot run here on ``device``; empty when it can. Nothing of the package is touched."""
    compiled = variant.build.get(TORCH_KEY)
    if compiled != torch.__version__:
        return (
            f"it was compiled by torch {one_line(str(compiled)[:QUOTED])}, installed is {torch.__version__}"
        )
    if variant.target.device is None or (device == "cpu" and not variant.target.instruction_set):
        return "its bundle does not say for which device and instructions it was compiled"
    if device == "cuda":
        if not torch.cuda.is_available():
            return "it needs an NVIDIA GPU, and no NVIDIA driver was found"
        here = "{}.{}".format(*torch.cuda.get_device_capability())
        if here not in variant.target.compute_capabilities:
            return (
                f"it was compiled for compute capability {few(variant.target.compute_capabilities)}, "
                f"this GPU has {here}"
            )
    return ""


@contextmanager
def _own_word_on_instructions() -> Iterator[None]:
    """Keep torch from warning of a package for fewer instructions than there are; `misfit` refuses one for more."""
    logger = logging.getLogger("torch.export.pt2_archive._package")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def open_variant(request: OpenRequest) -> Runtime:
    """Open a package.

    Raises:
        EngineIncompatibleError: if it does not fit this machine.
        ArtifactError: as ``AotiRuntime``, and if it was made for other labels; before it is touched.
        DeviceError: as ``AotiRuntime``.
    """
    if reason := misfit(request.variant, request.device):
        raise EngineIncompatibleError(f"{request.path} cannot run here: {reason}", hint=_HINT)
    check_labels_digest(request, request.variant.build.get(LABELS_KEY, ""))
    return AotiRuntime(
        request.path,
        clip=request.clip,
        output_names=request.output_names,
        precision=request.variant.precision,
        device=request.device,
        threads=request.threads,
    )
