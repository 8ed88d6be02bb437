"""Runs a TensorRT plan. Torch CUDA tensors are the device memory, so no second CUDA binding is needed."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ivdr_deploy._optional import require
from ivdr_deploy._text import few, one_line, quoted
from ivdr_deploy.artifacts.manifest import ADD_PLAN, Variant
from ivdr_deploy.artifacts.sidecar import EXTRAS, EngineInfo, read_sidecar, sidecar_path
from ivdr_deploy.errors import (
    ArtifactError,
    ClosedError,
    ConfigError,
    DeviceError,
    EngineIncompatibleError,
)
from ivdr_deploy.runtimes.base import CALL_CLIPS, OpenRequest, Runtime, check_batch, check_labels_digest
from ivdr_deploy.runtimes.cuda_calls import CudaCalls, Network
from ivdr_deploy.spec import INPUT_NAME, MAX_BATCH, ClipSpec, Device

_log = logging.getLogger(__name__)

_SAID, _LINE = 500, 10_000
"""Characters of what TensorRT says that a message and the builder's log take: it names layers, tensors and files."""

_REBUILD = f"build it again here: {ADD_PLAN}"


class TrtRuntime(Runtime):
    """One plan on the current CUDA device.

    An execution context holds shape and addresses of its last call, and a CUDA graph goes on using what it was captured
    from. So each graph has a context of its own, and one more is for the calls without a graph.

    Args:
        path: The ``.engine`` file; its sidecar lies beside it.
        clip: The contract it must have been built under.
        device: Must be ``cuda``.
        onnx_sha256: Digest of the ONNX file that it must have been built from; None when that file is not at
            hand.

    Raises:
        DeviceError: if ``device`` is not ``cuda``.
        ArtifactError: if the sidecar is missing or not readable, or the plan was built from another model.
        EngineIncompatibleError: if the plan was built by another version of the library or for other GPUs, or
            there is no GPU, or too little memory on it.
        MissingDependencyError: if the library that built it is not installed.
    """

    def __init__(
        self, path: Path, *, clip: ClipSpec, device: Device = "cuda", onnx_sha256: str | None = None
    ) -> None:
        if device != "cuda":
            raise DeviceError(
                f"a TensorRT plan cannot run on device {quoted(device)}", hint="use device 'cuda'"
            )
        info = read_sidecar(path)
        _check_origin(path, info, clip, onnx_sha256)
        trt = require(info.provider, extra=EXTRAS[info.provider])
        _check_machine(path, info, trt.__version__)
        logger = logger_of(trt)
        logger.last_error = ""
        # Kept for as long as the engine: TensorRT needs it until the engine is gone.
        self._runtime: Any = trt.Runtime(logger)
        self._engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise EngineIncompatibleError(f"{path} cannot be loaded ({logger.last_error})", hint=_REBUILD)
        self._logger, self._info, self._clip, self._path = logger, info, clip, path
        self._calls: CudaCalls | None = CudaCalls(
            self._in_new_context(), clip.clip_shape, apart=self._in_new_context
        )
        self.call_clips = min(CALL_CLIPS[device], info.batch.max)
        self.name = "tensorrt"
        self.precision = info.precision
        self.output_names = info.outputs
        self.description = (
            f"{info.provider} {info.provider_version}, {torch.cuda.get_device_name()}, {info.precision}"
        )

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        """Run one batch; see ``Runtime.infer``.

        Raises:
            ClipShapeError: if the batch is not what the network takes.
            ConfigError: if it has more clips than the plan was built for.
            ClosedError: if the runtime was closed.
            ArtifactError: if TensorRT reports a failure.
        """
        check_batch(video, self._clip)
        if len(video) > self._info.batch.max:
            raise ConfigError(
                f"{len(video)} clips in one call; this plan takes at most {self._info.batch.max}"
            )
        if self._calls is None:
            raise ClosedError("this TensorRT runtime was closed", hint="open the model again")
        return dict(zip(self.output_names, self._calls(video), strict=True))

    def _in_new_context(self) -> Network:
        """Make an execution context; returns what runs the plan in it, and keeps it."""
        self._logger.last_error = ""
        context = self._engine.create_execution_context()
        if context is None:
            raise EngineIncompatibleError(
                f"TensorRT makes no execution context for {self._path}"
                f" ({self._logger.last_error or 'it does not say why'}); is the memory of the GPU full?",
                hint="free some: `nvidia-smi` names the processes that hold it",
            )
        return functools.partial(self._enqueue, context)

    def _enqueue(self, context: Any, video: Tensor) -> list[Tensor]:
        """Run the plan on the current stream, on which its tensors are allocated, filled and read as well."""
        if not context.set_input_shape(INPUT_NAME, tuple(video.shape)):
            raise self._failed(f"does not take a batch of shape {tuple(video.shape)}")
        outputs = []
        for name in self.output_names:
            shape = tuple(context.get_tensor_shape(name))
            outputs.append(torch.empty(shape, dtype=torch.float32, device="cuda"))
        for name, tensor in zip((INPUT_NAME, *self.output_names), (video, *outputs), strict=True):
            context.set_tensor_address(name, tensor.data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise self._failed("could not run the plan")
        return outputs

    def _failed(self, what: str) -> ArtifactError:
        return ArtifactError(f"TensorRT {what} ({self._logger.last_error})", hint=_REBUILD)

    def close(self) -> None:
        """Free the plan; its graphs and the contexts go before the engine they belong to."""
        self._calls = None
        self._engine = None
        self._runtime = None


def misfit(variant: Variant, device: Device) -> str:
    """Say why a plan cannot run here on ``device``; empty when it can. Version and digest are checked on opening."""
    if not torch.cuda.is_available():
        return "a TensorRT plan needs an NVIDIA GPU, and no NVIDIA driver was found"
    here = "{}.{}".format(*torch.cuda.get_device_capability())
    wanted = variant.target.compute_capabilities
    if wanted and here not in wanted:
        return f"it was built for compute capability {few(wanted)}, this GPU has {here}"
    return ""


def open_variant(request: OpenRequest) -> Runtime:
    """Open a plan.

    Raises:
        ArtifactError: if it was made for other labels than the bundle's, or its sidecar says something else of it than
            the manifest.
        As ``TrtRuntime``.
    """
    info = read_sidecar(request.path)
    check_labels_digest(request, info.labels_sha256)
    _check_manifest(request, info)
    return TrtRuntime(
        request.path,
        clip=request.clip,
        device=request.device,
        onnx_sha256=request.source_sha256 or None,
    )


def _check_manifest(request: OpenRequest, info: EngineInfo) -> None:
    """Refuse a plan of which manifest and sidecar say different things: it would be judged by the wrong tolerance."""
    variant = request.variant
    for what, found, expected in (
        ("precision", info.precision, variant.precision),
        ("provider", info.provider, variant.provider or info.provider),
        ("outputs", ", ".join(info.outputs), ", ".join(request.output_names)),
        ("clip shape", str(info.clip_shape), str(request.clip.clip_shape)),
    ):
        if found != expected:
            raise ArtifactError(
                f"{sidecar_path(request.path)}: the {what} is {quoted(found)}, in the manifest {quoted(expected)}",
                hint=f"plan and manifest belong to different models; {_REBUILD}",
            )
    least, best, most = map(quoted, (info.batch.min, info.batch.opt, info.batch.max))
    if not 1 <= info.batch.min <= info.batch.opt <= info.batch.max <= MAX_BATCH:
        raise ArtifactError(
            f"{sidecar_path(request.path)}: no plan takes from {least} to {most} clips, tuned for {best}",
            hint=_REBUILD,
        )


def _check_origin(path: Path, info: EngineInfo, clip: ClipSpec, onnx_sha256: str | None) -> None:
    if info.contract_hash != clip.contract_hash and info.format_version > 1:  # 1 hashed the view plan along
        raise ArtifactError(
            f"{path} was built under the contract {info.contract_hash[:12]},"
            f" expected {clip.contract_hash[:12]}",
            hint=_REBUILD,
        )
    if onnx_sha256 is not None and info.onnx_sha256 != onnx_sha256:
        raise ArtifactError(
            f"{path} was built from an ONNX file with SHA-256 {info.onnx_sha256[:12]},"
            f" the bundle's is {onnx_sha256[:12]}",
            hint=_REBUILD,
        )


def _check_machine(path: Path, info: EngineInfo, installed: str) -> None:
    if installed != info.provider_version:
        raise EngineIncompatibleError(
            f"{path} was built by {info.provider} {info.provider_version}, installed is {installed}",
            hint=f"{_REBUILD}; or pip install {info.provider.replace('_', '-')}=={info.provider_version}",
        )
    if not torch.cuda.is_available():
        raise EngineIncompatibleError(
            f"{path} needs an NVIDIA GPU, and no NVIDIA driver was found",
            hint="run it where there is one (`ivdr doctor`), or take another variant: `ivdr show BUNDLE` lists them",
        )
    here = "{}.{}".format(*torch.cuda.get_device_capability())
    if here not in info.compute_capabilities:
        raise EngineIncompatibleError(
            f"{path} was built for compute capability {few(info.compute_capabilities)}, this GPU has {here}",
            hint=f"build one for it: {ADD_PLAN} with --compute-capability {here}",
        )


def _joined(message: str) -> str:
    """Return what a library says as one line."""
    return one_line(" ".join(message.split()))


@functools.cache
def logger_of(trt: Any) -> Any:
    """Return the one logger of ``tensorrt`` or ``tensorrt_rtx``: the library goes on using the first it was given.

    Args:
        trt: The module; its logger class can only be derived from once it is imported.

    Returns:
        A ``trt.ILogger`` whose ``last_error`` is the last error it was told, on one line, or an empty string, and whose
        ``lines``, where they are a list and not None, gather what it is told, without what only its makers look at.
    """
    errors = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = ""
            self.lines: list[str] | None = None

        def log(self, severity: Any, message: str) -> None:
            # An error is raised, with this text, by whoever made the failing call; as a warning it would be
            # said twice.
            if severity in errors:
                self.last_error = _joined(message[:_SAID])
            if self.lines is not None and severity != trt.ILogger.VERBOSE:
                self.lines.append(f"{severity.name}: {_joined(message[:_LINE])}")
            level = logging.WARNING if severity == trt.ILogger.WARNING else logging.DEBUG
            _log.log(level, "%s", _joined(message[:_SAID]))

    return Logger()
