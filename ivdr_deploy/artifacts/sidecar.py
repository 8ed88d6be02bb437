"""What a TensorRT plan belongs to: the sidecar written beside every ``.engine``. Standard library only.

A plan is bound to the library that built it, that library's version and the GPUs it was built for; nothing
inside the plan can be read without them, so the sidecar says it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ivdr_deploy._files import atomic_path, read_bounded
from ivdr_deploy._text import reason_of
from ivdr_deploy.artifacts import former
from ivdr_deploy.artifacts.manifest import ADD_PLAN, MOST_BYTES
from ivdr_deploy.errors import ArtifactError, ConfigError
from ivdr_deploy.records import from_dict, parse_json, require_plain, to_dict
from ivdr_deploy.spec import FORMAT_VERSION, Precision, require_outputs

Provider = Literal["tensorrt", "tensorrt_rtx"]

EXTRAS: dict[Provider, str] = {"tensorrt": "trt", "tensorrt_rtx": "trt-rtx"}
"""Extra of this package that installs each provider."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchProfile:
    """Number of clips per call that the plan accepts, and the one it was tuned for."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """The sidecar."""

    format_version: int = FORMAT_VERSION
    provider: Provider
    provider_version: str
    compute_capabilities: tuple[str, ...]
    """Of the GPUs it runs on, e.g. ``("8.6", "8.9")``."""

    precision: Precision
    onnx_sha256: str
    """Of the ONNX file that it was built from."""

    contract_hash: str
    clip_shape: tuple[int, ...]
    """(T, H, W, 3) of the input ``video``."""

    batch: BatchProfile
    outputs: tuple[str, ...]
    labels_sha256: str = ""
    """``manifest.labels_sha256`` of the labels, in the order of ``logits``; empty in sidecars of before."""

    build_seconds: float

    def __post_init__(self) -> None:
        require_plain("version of the provider", self.provider_version)
        require_plain("compute capability", *self.compute_capabilities)
        require_plain("hash", self.contract_hash, self.onnx_sha256)
        require_outputs(self.outputs)


def sidecar_path(engine: Path) -> Path:
    """Return where the sidecar of an engine lies."""
    return engine.with_name(engine.name + ".json")


def write_sidecar(engine: Path, info: EngineInfo) -> None:
    """Write the sidecar of an engine."""
    with atomic_path(sidecar_path(engine)) as temporary:
        temporary.write_text(json.dumps(to_dict(info), indent=2) + "\n", encoding="utf-8")


def read_sidecar(engine: Path) -> EngineInfo:
    """Read the sidecar of an engine.

    Raises:
        ArtifactError: if it is missing or not readable.
    """
    path = sidecar_path(engine)
    hint = f"an engine is of no use without its sidecar; build it again: {ADD_PLAN}"
    if not path.is_file():
        raise ArtifactError(f"{path} is missing", hint=hint)
    try:
        values = parse_json(read_bounded(path, MOST_BYTES))
        if isinstance(values, dict):
            former.check_version(values.get("format_version"), where=str(path), error=ArtifactError)
        return from_dict(EngineInfo, values, where=str(path))
    except (OSError, ValueError, ConfigError) as error:
        raise ArtifactError(f"{path} cannot be read ({reason_of(error)})", hint=hint) from error
