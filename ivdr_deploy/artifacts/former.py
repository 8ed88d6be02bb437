"""Artifacts of former format versions, brought to the present one as they are read. Old files stay readable.

Version 1 kept the view plan (``num_clips``, ``placement``) inside the contract and its hash, and named a model of a
bundle by runtime and precision, with the parity of all models in one list.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ivdr_deploy._text import quoted
from ivdr_deploy.errors import ConfigError, IvdrError
from ivdr_deploy.records import from_dict, to_dict
from ivdr_deploy.spec import FORMAT_VERSION, ClipSpec, ViewPlan, canonical_json

_FORMER_IDS = {"torch": "torch-fp32", "onnxruntime": "onnx-fp32", "tensorrt": "trt-fp32"}
"""Version 1 held at most one model for each runtime, all fp32."""

_FORMER_ORIGINS = {"onnxruntime": "torch-fp32", "tensorrt": "onnx-fp32"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _FileV1:
    path: str
    sha256: str
    size_bytes: int
    kind: str
    runtime: str | None = None
    precision: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _ParityV1:
    runtime: str
    precision: str
    output: str
    max_abs_diff: float
    min_cosine: float
    tolerance: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _ListsV1:
    files: tuple[_FileV1, ...]
    parity: tuple[_ParityV1, ...]


def check_version(version: object, *, where: str, error: type[IvdrError]) -> int:
    """Return a format version that can be read, or raise ``error``."""
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
        raise error(
            f"{where} has format version {quoted(version)}, this ivdr reads 1 to {FORMAT_VERSION}",
            hint="use the version of ivdr_deploy that wrote it, or a later one",
        )
    return version


def split_contract(values: Mapping[str, Any], *, where: str) -> tuple[ClipSpec, ViewPlan]:
    """Take a contract of version 1 apart.

    Raises:
        ConfigError: if it is not one.
    """
    clip = dict(values)
    plan: dict[str, Any] = {name: clip.pop(name) for name in ("num_clips", "placement") if name in clip}
    return from_dict(ClipSpec, clip, where=where), from_dict(ViewPlan, plan, where=where)


def upgrade_checkpoint(values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Bring the ``CheckpointInfo`` of version 1 to the present form."""
    clip, plan = split_contract(_table(values, "clip", where), where=f"{where}: clip")
    return {**values, "format_version": FORMAT_VERSION, "clip": to_dict(clip), "view_plan": to_dict(plan)}


def upgrade_onnx_metadata(values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Bring the ``OnnxMetadata`` of version 1 to the present form."""
    clip, plan = split_contract(_table(values, "contract", where), where=f"{where}: contract")
    _check_hash(values.get("contract_hash"), values["contract"])
    return {
        **values,
        "format_version": FORMAT_VERSION,
        "contract": to_dict(clip),
        "contract_hash": clip.contract_hash,
        "view_plan": to_dict(plan),
    }


def upgrade_manifest(values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Bring the ``ArtifactManifest`` of version 1 to the present form."""
    clip, plan = split_contract(_table(values, "clip", where), where=f"{where}: clip")
    _check_hash(values.get("contract_hash"), values["clip"])
    lists = from_dict(_ListsV1, {key: values.get(key) for key in ("files", "parity")}, where=where)
    upgraded = {key: value for key, value in values.items() if key != "parity"}
    return {
        **upgraded,
        "format_version": FORMAT_VERSION,
        "clip": to_dict(clip),
        "contract_hash": clip.contract_hash,
        "view_plan": to_dict(plan),
        "variants": [_variant(entry, lists) for entry in lists.files if entry.kind == "model"],
        "files": [
            {"path": entry.path, "sha256": entry.sha256, "size_bytes": entry.size_bytes, "kind": entry.kind}
            for entry in lists.files
        ],
    }


def _variant(entry: _FileV1, lists: _ListsV1) -> dict[str, Any]:
    """Make a variant of a file that version 1 called a model."""
    runtime, sidecar = entry.runtime or "", f"{entry.path}.json"
    return {
        "id": _FORMER_IDS.get(runtime, runtime),
        "runtime": runtime,
        "precision": entry.precision,
        "target": {"device": "cuda"} if runtime == "tensorrt" else {},
        "files": [entry.path, *(other.path for other in lists.files if other.path == sidecar)],
        "derived_from": _FORMER_ORIGINS.get(runtime),
        "parity": [
            {
                "output": parity.output,
                "max_abs_diff": parity.max_abs_diff,
                "min_cosine": parity.min_cosine,
                "tolerance": parity.tolerance,
            }
            for parity in lists.parity
            if parity.runtime == runtime
        ],
    }


def _check_hash(found: object, contract: Mapping[str, Any]) -> None:
    """Compare with the hash of a contract of version 1, which was taken over all that is written in it."""
    if found != hashlib.sha256(canonical_json(contract).encode()).hexdigest():
        raise ConfigError(
            f"the contract hash {quoted(str(found)[:12])} is not that of the contract of format 1"
        )


def _table(values: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = values.get(key)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {key} is {type(value).__name__}, expected a table")
    return value
