"""Checkpoint -> bundle: export, prove, describe, and only then put the folder in place."""

from __future__ import annotations

import importlib
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from ivdr_deploy import __version__
from ivdr_deploy._files import atomic_directory
from ivdr_deploy.artifacts.bundle import (
    GOLDEN_FILE,
    MANIFEST_FILE,
    MODEL_CARD_FILE,
    Bundle,
    file_entry,
    open_bundle,
    read_manifest,
    write_golden,
    write_manifest,
)
from ivdr_deploy.artifacts.checkpoint import Checkpoint, load_checkpoint
from ivdr_deploy.artifacts.model_card import render_model_card
from ivdr_deploy.artifacts.onnx_metadata import OnnxMetadata
from ivdr_deploy.errors import ArtifactError, ConfigError, ExportError
from ivdr_deploy.export.parity import check_parity, reference_outputs
from ivdr_deploy.spec import (
    OUTPUT_NAMES,
    ArtifactManifest,
    CheckpointInfo,
    OutputParity,
    OutputSpec,
    Provenance,
)

ONNX_FILE = "model.onnx"
CHECKPOINT_FILE = "model.safetensors"
ENGINE_FILE = "model.fp32.engine"

_log = logging.getLogger(__name__)


def export_bundle(
    checkpoint: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    version: str = "1.0",
    include_stale: bool = False,
    tensorrt: bool = False,
    compute_capabilities: Sequence[str] | None = None,
) -> Bundle:
    """Write a bundle, or nothing.

    Args:
        checkpoint: What ``python -m train`` wrote.
        out: Folder to write. An older bundle there is replaced as a whole.
        name: Name of the model; the folder's name by default.
        version: Version of the model, as it is served.
        include_stale: Also export the outputs of heads that were trained, but not together with this
            backbone.
        tensorrt: Also build a TensorRT plan.
        compute_capabilities: GPUs that the plan is for; see ``to_tensorrt.choose_targets``.

    Raises:
        CheckpointError: if the checkpoint is not usable.
        ConfigError: if the name or version cannot be served, or ``out`` holds something that is not ours to
            replace.
        ExportError: if the export fails; ``ParityError`` if the exported model computes something else.
        MissingDependencyError: if a plan is asked for and no TensorRT is installed.
    """
    out = Path(out).resolve()
    name = name or out.name
    _check_name("name", name)
    _check_name("version", version)
    _check_replaceable(out)
    if tensorrt:
        from ivdr_deploy.export.to_tensorrt import choose_targets

        choose_targets(compute_capabilities)  # before the minutes of work that a missing package would waste
    loaded = load_checkpoint(checkpoint)
    outputs = choose_outputs(loaded.info, include_stale=include_stale)
    info = loaded.info
    metadata = OnnxMetadata(
        name=name,
        version=version,
        contract_hash=info.clip.contract_hash,
        contract=info.clip,
        labels=info.labels if "logits" in outputs else (),
        outputs=outputs,
        ivdr_version=__version__,
    )
    with atomic_directory(out) as folder:
        expected, parity = _write_onnx(folder, loaded, metadata)
        shutil.copyfile(loaded.path, folder / CHECKPOINT_FILE)
        write_golden(folder, loaded.golden, expected)
        files = [
            file_entry(folder, ONNX_FILE, kind="model", runtime="onnxruntime", precision="fp32"),
            file_entry(folder, CHECKPOINT_FILE, kind="model", runtime="torch", precision="fp32"),
            file_entry(folder, GOLDEN_FILE, kind="golden"),
        ]
        if tensorrt:
            engine_parity = _write_engine(folder, loaded.golden, expected, metadata, compute_capabilities)
            parity += engine_parity
            files += [
                file_entry(folder, ENGINE_FILE, kind="model", runtime="tensorrt", precision="fp32"),
                file_entry(folder, f"{ENGINE_FILE}.json", kind="sidecar"),
            ]
        manifest = ArtifactManifest(
            name=name,
            version=version,
            clip=info.clip,
            contract_hash=info.clip.contract_hash,
            model=info.model,
            labels=metadata.labels,
            outputs=tuple(OutputSpec(name=output, shape=expected[output].shape[1:]) for output in outputs),
            training=info.training,
            files=tuple(files),
            parity=parity,
            provenance=_with_export_versions(info.provenance),
            ivdr_version=__version__,
        )
        _write_card(folder, manifest, golden_clips=len(loaded.golden))
    return open_bundle(out)


def choose_outputs(info: CheckpointInfo, *, include_stale: bool) -> tuple[str, ...]:
    """Name the outputs to export, in order.

    Args:
        info: Of the checkpoint.
        include_stale: Also take a head that was trained, but not together with this backbone. A head that was
            never trained is left out either way.
    """
    heads = {"feature": None, "logits": "classifier", "inter": "series_head", "intra": "series_head"}
    valid = info.training.valid_outputs()
    chosen = []
    for output in OUTPUT_NAMES:
        head = heads[output]
        if output in valid or (include_stale and head in info.training.head_steps):
            chosen.append(output)
        elif head in info.training.head_steps:
            _log.warning("%s is left out: its head is stale; --include-stale exports it anyway", output)
    return tuple(chosen)


def _write_onnx(
    folder: Path, checkpoint: Checkpoint, metadata: OnnxMetadata
) -> tuple[dict[str, np.ndarray], tuple[OutputParity, ...]]:
    """Write the ONNX file; return torch's golden outputs, and how far ONNX Runtime is from them."""
    from ivdr_deploy.export.to_onnx import export_onnx
    from ivdr_deploy.runtimes.ort_runtime import OrtRuntime
    from ivdr_deploy.runtimes.torch_runtime import TorchRuntime

    clip = metadata.contract
    with TorchRuntime(checkpoint.model, clip=clip, output_names=metadata.outputs) as reference:
        expected = reference_outputs(reference, checkpoint.golden)
    path = folder / ONNX_FILE
    export_onnx(checkpoint.model, path, clip=clip, metadata=metadata)
    with OrtRuntime(path, clip=clip, output_names=metadata.outputs) as candidate:
        if candidate.metadata != metadata:
            raise ExportError(f"the metadata of {ONNX_FILE} did not survive: {candidate.metadata}")
        return expected, check_parity(expected, candidate, checkpoint.golden)


def _write_engine(
    folder: Path,
    golden: np.ndarray,
    expected: dict[str, np.ndarray],
    metadata: OnnxMetadata,
    compute_capabilities: Sequence[str] | None,
) -> tuple[OutputParity, ...]:
    """Write the plan and its sidecar; return its parity, which is empty where the plan cannot run."""
    import torch

    from ivdr_deploy.export.to_tensorrt import build_engine
    from ivdr_deploy.runtimes.trt_runtime import TrtRuntime

    path = folder / ENGINE_FILE
    info = build_engine(
        folder / ONNX_FILE, path, metadata=metadata, compute_capabilities=compute_capabilities
    )
    here = "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""
    if here not in info.compute_capabilities:
        _log.warning("the TensorRT plan was built but not run: this machine has no GPU it is for")
        return ()
    with TrtRuntime(path, clip=metadata.contract, onnx_sha256=info.onnx_sha256) as candidate:
        return check_parity(expected, candidate, golden)


def _write_card(folder: Path, manifest: ArtifactManifest, *, golden_clips: int) -> None:
    """Write the model card and, last, the manifest that lists it."""
    card = render_model_card(manifest, golden_clips=golden_clips)
    (folder / MODEL_CARD_FILE).write_text(card, encoding="utf-8")
    document = file_entry(folder, MODEL_CARD_FILE, kind="document")
    write_manifest(folder, replace(manifest, files=(*manifest.files, document)))


def _with_export_versions(provenance: Provenance) -> Provenance:
    """Add the time of this export, and the packages that shaped the exported files."""
    versions = {f"export:{name}": _installed(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return replace(provenance, created_at=now, packages={**provenance.packages, **versions})


def _installed(name: str) -> str:
    return str(importlib.import_module(name).__version__)


def _check_name(what: str, value: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value):
        raise ConfigError(
            f"the model's {what} {value!r} cannot be served under a URL",
            hint="use letters, digits, '_', '-' and '.', beginning with a letter or digit",
        )


def _check_replaceable(out: Path) -> None:
    """Refuse to replace anything but an empty folder or a bundle with nothing else in it."""
    if not out.exists():
        return
    hint = "give another -o, or remove it yourself"
    if not out.is_dir():
        raise ConfigError(f"{out} exists and is a file", hint=hint)
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    if not found:
        return
    try:
        manifest = read_manifest((out / MANIFEST_FILE).read_bytes(), where=str(out / MANIFEST_FILE))
    except (OSError, ArtifactError) as error:
        raise ConfigError(f"{out} exists and is not a bundle", hint=hint) from error
    if foreign := sorted(found - {MANIFEST_FILE, *(entry.path for entry in manifest.files)}):
        raise ConfigError(f"{out} holds files that are not the bundle's: {', '.join(foreign[:5])}", hint=hint)
