"""Runs an ONNX file with ONNX Runtime, on the provider that was asked for or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ivdr_deploy._optional import import_onnxruntime, pip_install
from ivdr_deploy._text import is_utf8, one_line, quoted, quoted_few, reason_of
from ivdr_deploy.artifacts.manifest import EXPORT_AGAIN, Variant
from ivdr_deploy.artifacts.onnx_file import require_self_contained
from ivdr_deploy.artifacts.onnx_metadata import OnnxMetadata
from ivdr_deploy.errors import ArtifactError, ClosedError, ContractMismatchError, DeviceError
from ivdr_deploy.runtimes.base import OpenRequest, Runtime, check_batch, check_labels, clips_per_call
from ivdr_deploy.spec import INPUT_NAME, ClipSpec, Device, Precision

ort = import_onnxruntime()

_PROVIDERS: dict[Device, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_SHARED_CORES = {"session.intra_op.spin_duration_us": "2000", "session.dynamic_block_base": "4"}
"""How threads get along with whatever else wants the cores, decoders above all.

By themselves they spin between operators for as long as it takes, and each gets its part of an operator in one piece,
so that all wait for the one whose core is taken. docs/engines.md, "Threads", has the figures. An ONNX Runtime that
does not know a setting passes over it.
"""

WRONG_REWRITES = ["ReluQuantRewrite"]
"""Optimisations of ONNX Runtime that change what a graph computes.

This one drops a ReLU before a rounding to 8 bits if a zero is kept as zero, as if no negative value could then be kept.
In fp8 it can: the logits of an ``r3d_18`` came out wrong by 85 %, and with the ReLU they differ by 1 % (ONNX Runtime
1.32).
"""

_SHAPE_ARITHMETIC = frozenset(
    [
        "Add",
        "Cast",
        "Concat",
        "ConstantOfShape",
        "Div",
        "Equal",
        "Expand",
        "Gather",
        "Identity",
        "Mul",
        "Range",
        "Reciprocal",
        "Reshape",
        "Shape",
        "Size",
        "Slice",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Unsqueeze",
        "Where",
    ]
)
"""What transformers compute sizes with. CUDA has all of them, so that none is on the CPU for lack of it."""

_NO_FALLBACK = (
    "its libraries (CUDA, cuDNN) or the GPU are missing, or it lacks an operator: see `ivdr doctor`, or use "
    "device 'cpu'"
)


class OrtRuntime(Runtime):
    """One ONNX file in one session.

    Args:
        path: The file.
        clip: The contract it was exported under; None takes the file's own word.
        output_names: Outputs to return, in order; None takes all.
        precision: Of the file; None takes the file's own word, and fp32 where it says nothing.
        device: Picks the execution provider.
        threads: Threads of one operator on the CPU; None leaves the choice to ONNX Runtime.

    Raises:
        ArtifactError: if the file cannot be loaded, refers to weights in another file, or lacks an output.
        ContractMismatchError: if it was exported under another contract than ``clip``.
        DeviceError: if this ONNX Runtime was built without the provider, or the session, or an operator of it, fell
            back to another one.
    """

    def __init__(
        self,
        path: Path,
        *,
        clip: ClipSpec | None = None,
        output_names: Sequence[str] | None = None,
        precision: Precision | None = None,
        device: Device = "cpu",
        threads: int | None = None,
    ) -> None:
        provider = _PROVIDERS[device]
        _require_built_with(provider)
        try:
            require_self_contained(path)
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read ({error.strerror})") from error
        if not is_utf8(path):
            raise ArtifactError(
                f"the path {path} is not UTF-8 in this locale, and ONNX Runtime opens no other",
                hint="rename it, or set LC_ALL=C.UTF-8",
            )
        session = _start(path, [_with_options(provider, precision or "fp32")], device, threads)
        require_provider(session.get_providers(), provider)
        try:
            props = session.get_modelmeta().custom_metadata_map
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{path} is damaged: its metadata is not UTF-8", hint=EXPORT_AGAIN) from error
        self.metadata = OnnxMetadata.from_props(props, where=str(path))
        if clip is not None and clip != self.metadata.contract:
            differences = "; ".join(self.metadata.contract.differences(clip))
            raise ContractMismatchError(f"{path} was made for another contract ({differences})")
        held = [output.name for output in session.get_outputs()]
        self.name = "onnxruntime"
        own = self.metadata.precision
        self.precision = precision or own or "fp32"
        if self.precision != (own or self.precision):
            raise ArtifactError(
                f"{path} computes in {own}, expected {precision}",
                hint="file and manifest belong to different models; export the bundle again",
            )
        self.output_names = self.metadata.outputs if output_names is None else tuple(output_names)
        if not set(self.output_names) <= set(held):
            raise ArtifactError(
                f"{path} has the outputs {quoted_few(held)}, expected {', '.join(self.output_names)}"
            )
        for output in session.get_outputs():
            if output.name == "logits" and output.shape[1:] != [len(self.metadata.labels)]:
                raise ArtifactError(
                    f"{path} has {len(self.metadata.labels)} labels for logits of shape {quoted(output.shape)}",
                    hint="take the file that `ivdr export` wrote",
                )
        self.description = f"onnxruntime {ort.__version__}, {provider}, {self.precision}"
        self._clip = clip or self.metadata.contract
        self.call_clips = clips_per_call(self._clip, device)
        self._session: Any = session

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        """Run one batch; see ``Runtime.infer``."""
        check_batch(video, self._clip)
        if self._session is None:
            raise ClosedError("this ONNX Runtime session was closed", hint="open the model again")
        values = self._session.run(list(self.output_names), {INPUT_NAME: video})
        return dict(zip(self.output_names, values, strict=True))

    def close(self) -> None:
        """Let go of the session."""
        self._session = None


def _start(path: Path, providers: list[Any], device: Device, threads: int | None) -> Any:
    """Open a session; on a GPU none of which an operator runs on the CPU, shape arithmetic apart.

    ONNX Runtime puts single operators there without a word: those that the GPU lacks, and those that only compute
    shapes. Where it has put any, which ones is looked at.

    Raises:
        ArtifactError: if the file cannot be loaded.
        DeviceError: if the network itself would run on the CPU in part.
    """
    try:
        try:
            return _session(path, session_options(device, threads), providers)
        except Exception as error:  # the binding's exceptions share no other base class
            if device == "cpu" or "CPU EP" not in str(error):
                raise
            options = session_options(device, threads, strict=False)
            session = _session(path, options, providers)
            if elsewhere := operators_on_cpu(session):
                types = one_line(", ".join(elsewhere)[:100])
                raise DeviceError(
                    f"{path}: {device} was asked for, but ONNX Runtime would run {types} on the CPU",
                    hint=_NO_FALLBACK,
                ) from error
            return session
    except DeviceError:
        raise
    except Exception as error:
        reason = reason_of(error, most=300)
        raise ArtifactError(f"{path} cannot be loaded by ONNX Runtime ({reason})") from error


def _session(path: Path, options: Any, providers: list[Any]) -> Any:
    return ort.InferenceSession(
        str(path), options, providers=providers, disabled_optimizers=WRONG_REWRITES, enable_fallback=0
    )


def session_options(device: Device, threads: int | None, *, strict: bool = True) -> Any:
    """Set a session up.

    Args:
        device: On a GPU, operators on the CPU are refused or at least noted.
        threads: Of one operator on the CPU.
        strict: Refuse them; False notes them for ``operators_on_cpu``.
    """
    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    for key, value in _SHARED_CORES.items():
        options.add_session_config_entry(key, value)
    if device != "cpu":
        key = "session.disable_cpu_ep_fallback" if strict else "session.record_ep_graph_assignment_info"
        options.add_session_config_entry(key, "1")
    return options


def operators_on_cpu(session: Any) -> list[str]:
    """Return the types of the operators that ONNX Runtime put on the CPU, but for those that only compute shapes.

    An ONNX Runtime that does not tell (before 1.24) counts as having put all of them there.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return ["operators (which, ONNX Runtime 1.24 and later can say)"]
    found = {
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == _PROVIDERS["cpu"]
        for node in part.get_nodes()
    }
    return sorted(found - _SHAPE_ARITHMETIC)


def require_provider(providers: Sequence[str], provider: str) -> None:
    """Refuse a session that runs elsewhere than asked: ONNX Runtime falls back to the CPU without an error.

    Args:
        providers: ``session.get_providers()``, most preferred first.
        provider: The one that was asked for.

    Raises:
        DeviceError: if it is not the first.
    """
    if list(providers[:1]) != [provider]:
        raise DeviceError(
            f"{provider} was asked for, but ONNX Runtime would run on {', '.join(providers)}",
            hint=_NO_FALLBACK,
        )


def misfit(variant: Variant, device: Device) -> str:
    """Say why a variant cannot run here on ``device``; empty when it can."""
    return _not_built_with(_PROVIDERS[device])


def open_variant(request: OpenRequest) -> Runtime:
    """Open an ONNX file; raises as ``OrtRuntime`` does, and ``ArtifactError`` for other labels than the bundle's."""
    runtime = OrtRuntime(
        request.path,
        clip=request.clip,
        output_names=request.output_names,
        precision=request.variant.precision,
        device=request.device,
        threads=request.threads,
    )
    check_labels(request, runtime.metadata.labels)
    return runtime


def _require_built_with(provider: str) -> None:
    if reason := _not_built_with(provider):
        raise DeviceError(
            reason,
            hint=f"pip uninstall onnxruntime, then {pip_install('gpu')}; or use device 'cpu'",
        )


def _not_built_with(provider: str) -> str:
    available = ort.get_available_providers()
    if provider in available:
        return ""
    return f"this onnxruntime {ort.__version__} has no {provider} (it has {', '.join(available)})"


def _with_options(provider: str, precision: Precision) -> Any:
    """On CUDA, fp32 must mean fp32: TF32 is on by default and keeps 10 bits of each factor."""
    if provider == "CUDAExecutionProvider":
        return (provider, {"use_tf32": "0" if precision == "fp32" else "1"})
    return provider
