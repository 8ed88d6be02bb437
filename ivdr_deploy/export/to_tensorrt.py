"""ONNX -> TensorRT plan: strongly typed, dynamic batch, with a sidecar that says what it belongs to.

One path for TensorRT 10, 11 and TensorRT-RTX: precision lives in the ONNX file, so no precision flag of a
builder is used.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ivdr_deploy._files import atomic_path, sha256_file
from ivdr_deploy._optional import pip_install
from ivdr_deploy._text import quoted, quoted_few, reason_of
from ivdr_deploy.artifacts.manifest import labels_sha256
from ivdr_deploy.artifacts.onnx_metadata import OnnxMetadata
from ivdr_deploy.artifacts.sidecar import EXTRAS, BatchProfile, EngineInfo, Provider, write_sidecar
from ivdr_deploy.errors import ConfigError, ExportError, MissingDependencyError
from ivdr_deploy.runtimes.trt_runtime import logger_of
from ivdr_deploy.spec import INPUT_NAME, MAX_BATCH, Precision

DEFAULT_COMPUTE_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
"""What TensorRT-RTX builds for unless told: Ampere, Ada, Blackwell. Turing (7.5) takes another form of the network, see
``wants_two_axes``, and Hopper (9.0) is not one of its targets."""

_TURING = "7.5"

_FP8_SINCE = 8.9
"""The compute capability of Ada, the first to multiply fp8."""

_log = logging.getLogger(__name__)


def choose_provider() -> tuple[Provider, ModuleType]:
    """Pick the library that builds: ``tensorrt`` where it and a GPU are present, else ``tensorrt_rtx``.

    Raises:
        MissingDependencyError: if neither can be imported.
        ExportError: if only ``tensorrt`` can, and there is no GPU for it to build on.
    """
    modules: dict[Provider, ModuleType] = {}
    reasons = []
    for name in EXTRAS:
        try:
            modules[name] = importlib.import_module(name)
        except ImportError as error:
            reasons.append(reason_of(error))
    if "tensorrt" in modules and torch.cuda.is_available():
        return "tensorrt", modules["tensorrt"]
    if "tensorrt_rtx" in modules:
        return "tensorrt_rtx", modules["tensorrt_rtx"]
    if modules:
        raise ExportError(
            "tensorrt builds a plan on the GPU it is for, and no NVIDIA driver or GPU was found",
            hint=f"build on a machine with the GPU, or without one: {pip_install('trt-rtx')}",
        )
    raise MissingDependencyError(
        f"neither tensorrt nor tensorrt_rtx can be imported ({'; '.join(reasons)})",
        hint=f"{pip_install('trt-rtx', 'trt')}; trt-rtx builds without a GPU",
    )


def choose_targets(
    requested: Sequence[str] | None, precision: Precision = "fp32"
) -> tuple[Provider, ModuleType, tuple[str, ...]]:
    """Pick the library that builds, and the compute capabilities that it builds for.

    Args:
        requested: GPUs to build for, e.g. ``("8.6",)``; None takes ``DEFAULT_COMPUTE_CAPABILITIES``, or with
            ``tensorrt`` the GPU of this machine, which is the only one it can build for.
        precision: Of the plan; fp8 is for GPUs that multiply it.

    Raises:
        ConfigError: if the library cannot build for one of them, or one of them cannot compute in the precision.
        MissingDependencyError: as ``choose_provider``.
        ExportError: as ``choose_provider``.
    """
    provider, trt = choose_provider()
    if provider == "tensorrt":
        known = ["{}.{}".format(*torch.cuda.get_device_capability())]
        targets = tuple(dict.fromkeys(requested or known))
    else:
        known = [f"{name[2:-1]}.{name[-1]}" for name in dir(trt.ComputeCapability) if name.startswith("SM")]
        usual = [
            name for name in DEFAULT_COMPUTE_CAPABILITIES if precision != "fp8" or float(name) >= _FP8_SINCE
        ]
        targets = tuple(dict.fromkeys(requested or usual))
    for target in targets:
        if target not in known:
            raise ConfigError(
                f"{provider} {trt.__version__} cannot build here for compute capability {quoted(target)}",
                hint=f"it can for {', '.join(sorted(known, key=float))}",
            )
        if precision == "fp8" and float(target) < _FP8_SINCE:
            raise ConfigError(
                f"a GPU of compute capability {target} does not multiply fp8",
                hint=f"fp8 begins with {_FP8_SINCE} (Ada); int8 plans run on it: --precision int8",
            )
    return provider, trt, targets


def wants_two_axes(provider: Provider, targets: Sequence[str]) -> bool:
    """Say whether a plan can only be built from ``to_two_axes.over_two_axes``; for all its GPUs if it has several."""
    return provider == "tensorrt_rtx" and _TURING in targets


def log_path(engine: Path) -> Path:
    """Return where what the builder said of an engine lies."""
    return engine.with_name(f"{engine.name}.log")


def timings_path(engine: Path, targets: Sequence[str]) -> Path:
    """Return where the times of kernels lie that ``tensorrt`` took for the engines of a folder, for a GPU."""
    return engine.with_name(f"tensorrt-sm{'-'.join(target.replace('.', '') for target in targets)}.timings")


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    metadata: OnnxMetadata,
    precision: Precision,
    compute_capabilities: Sequence[str] | None = None,
    form: bytes | None = None,
) -> EngineInfo:
    """Build a plan and write it with its sidecar and what the builder said.

    ``tensorrt`` tries kernels on the GPU and takes the fastest. What it timed is kept beside the plan, so that another
    plan, or the same again, is built in less time and of the same kernels.

    Args:
        onnx_path: What ``export_onnx`` wrote.
        engine_path: File to write.
        metadata: Of the ONNX file.
        precision: Of the ONNX file, whose types the plan computes in.
        compute_capabilities: GPUs to build for; see ``choose_targets``.
        form: An ONNX graph that computes the same, to build from in the place of the file.

    Raises:
        MissingDependencyError: if no provider is installed.
        ConfigError: if a compute capability is not one that the provider can build for.
        ExportError: if the file cannot be parsed, or the plan cannot be built; with the library's own words.
    """
    provider, trt, targets = choose_targets(compute_capabilities, precision)
    started = time.perf_counter()
    batch = BatchProfile(min=1, opt=min(metadata.view_plan.max_views, MAX_BATCH), max=MAX_BATCH)
    shape = metadata.contract.clip_shape
    timings = (
        timings_path(engine_path, targets) if provider == "tensorrt" else None
    )  # the other times no kernels
    with _listening(logger_of(trt)) as said:
        builder = trt.Builder(logger_of(trt))
        network = _parse(trt, builder, onnx_path, form)
        config = builder.create_builder_config()
        # fp32 means fp32: TF32 is on by default and keeps 10 bits of each factor.
        config.clear_flag(trt.BuilderFlag.TF32)
        if provider == "tensorrt_rtx":
            _set_targets(trt, config, targets)
        profile = builder.create_optimization_profile()
        profile.set_shape(INPUT_NAME, (batch.min, *shape), (batch.opt, *shape), (batch.max, *shape))
        config.add_optimization_profile(profile)
        if timings:
            former = timings.read_bytes() if timings.is_file() else b""
            # Those of another version or GPU are not taken: the library looks at that itself.
            config.set_timing_cache(config.create_timing_cache(former), ignore_mismatch=False)
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(
            f"{provider} {trt.__version__} cannot build a plan for compute capability {', '.join(targets)}"
            f" ({logger_of(trt).last_error})"
        )
    engine_path.write_bytes(plan)
    if timings:
        with atomic_path(timings) as temporary:
            temporary.write_bytes(config.get_timing_cache().serialize())
    with atomic_path(log_path(engine_path)) as temporary:
        temporary.write_text("\n".join([*said, ""]), encoding="utf-8")
    info = EngineInfo(
        provider=provider,
        provider_version=trt.__version__,
        compute_capabilities=targets,
        precision=precision,
        onnx_sha256=sha256_file(onnx_path),
        contract_hash=metadata.contract_hash,
        clip_shape=shape,
        batch=batch,
        outputs=metadata.outputs,
        labels_sha256=labels_sha256(metadata.labels),
        build_seconds=round(time.perf_counter() - started, 3),
    )
    write_sidecar(engine_path, info)
    _log.info(
        "built %s with %s %s in %.1f s", engine_path.name, provider, trt.__version__, info.build_seconds
    )
    return info


@contextmanager
def _listening(logger: Any) -> Iterator[list[str]]:
    """Yield the lines that the library says in the block."""
    logger.last_error, logger.lines = "", []
    try:
        yield logger.lines
    finally:
        logger.lines = None


def _parse(trt: Any, builder: Any, onnx_path: Path, form: bytes | None) -> Any:
    flags = trt.NetworkDefinitionCreationFlag
    # TensorRT 11 knows no other kind of network and may drop the flag.
    strongly_typed = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    network = builder.create_network(strongly_typed)
    parser = trt.OnnxParser(network, logger_of(trt))
    if not parser.parse(onnx_path.read_bytes() if form is None else form):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise ExportError(f"TensorRT cannot parse {onnx_path.name} ({quoted_few(reasons, most=3)})")
    return network


def _set_targets(trt: Any, config: Any, targets: Sequence[str]) -> None:
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + target.replace(".", "")), index)
