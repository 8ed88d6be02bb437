"""Checkpoint -> bundle, and bundle -> bundle with one more variant: each step proves what it adds.

A step takes a ``Draft`` and adds a variant to it; nobody sees the draft before every step has ended well.
"""

from __future__ import annotations

import importlib
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from ivdr_deploy import __version__
from ivdr_deploy._optional import import_onnxruntime, require
from ivdr_deploy.artifacts.bundle import (
    Bundle,
    Draft,
    changed_bundle,
    check_replaceable,
    new_bundle,
    open_bundle,
)
from ivdr_deploy.artifacts.checkpoint import Checkpoint, load_checkpoint
from ivdr_deploy.artifacts.golden import GOLDEN_FILE, GOLDEN_PLAN, Golden, read_golden, write_golden
from ivdr_deploy.artifacts.golden_video import make_golden_videos
from ivdr_deploy.artifacts.manifest import ArtifactManifest, OutputParity, OutputSpec, Target, Variant
from ivdr_deploy.artifacts.onnx_metadata import OnnxMetadata
from ivdr_deploy.errors import ConfigError, ExportError
from ivdr_deploy.runtimes.compare import check_parity, reference_outputs
from ivdr_deploy.spec import OUTPUT_NAMES, CheckpointInfo, Provenance
from ivdr_deploy.video.clips import load_clips

CHECKPOINT_FILE = "model.safetensors"
ONNX_FILE = "model.onnx"
REFERENCE_ID = "torch-fp32"
ONNX_ID = "onnx-fp32"

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
    """Write a bundle with the variants ``torch-fp32`` and ``onnx-fp32``, or nothing.

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
        ConfigError: if the name or version cannot be served.
        FolderError: if ``out`` holds something that is not ours to replace.
        ExportError: if the export fails; ``ParityError`` if the exported model computes something else.
        MissingDependencyError: if a package that is needed is not installed.
    """
    out = Path(out).resolve()
    name = name or out.name
    _check_name("name", name)
    _check_name("version", version)
    check_replaceable(out)
    # Before the minutes of work that a missing package would waste.
    for package in ("torch", "torchvision", "onnx", "onnxscript"):
        require(package, extra="export")
    import_onnxruntime()  # each exported model is run and compared
    if tensorrt:
        _require_tensorrt(compute_capabilities)
    loaded = load_checkpoint(checkpoint)
    info = loaded.info
    outputs = choose_outputs(info, include_stale=include_stale)
    manifest = ArtifactManifest(
        name=name,
        version=version,
        clip=info.clip,
        contract_hash=info.clip.contract_hash,
        view_plan=info.view_plan,
        model=info.model,
        labels=info.labels if "logits" in outputs else (),
        outputs=tuple(OutputSpec(name=output, shape=()) for output in outputs),
        training=info.training,
        variants=(),
        files=(),
        provenance=_with_export_versions(info.provenance),
        ivdr_version=__version__,
    )
    with new_bundle(out, manifest) as draft:
        add_reference(draft, loaded)
        add_onnx(draft)
        if tensorrt:
            add_tensorrt(draft, compute_capabilities)
    return open_bundle(out)


def add_plan(path: str | Path, *, compute_capabilities: Sequence[str] | None = None) -> Bundle:
    """Add a TensorRT plan to an existing bundle, or replace the one for the same GPUs.

    Raises:
        ArtifactError: if the bundle is damaged, or has no ONNX variant to build from.
        FolderError: if it holds files that are not its own, or was changed meanwhile.
        ExportError: if the plan cannot be built; ``ParityError`` if it computes something else.
        MissingDependencyError: if no TensorRT is installed.
    """
    _require_tensorrt(compute_capabilities)
    bundle = open_bundle(path)
    with changed_bundle(bundle) as draft:
        add_tensorrt(draft, compute_capabilities)
    return open_bundle(path)


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


def add_reference(draft: Draft, checkpoint: Checkpoint) -> None:
    """Add the checkpoint, which the other variants are held against, and the golden clips and videos."""
    from ivdr_deploy.runtimes.torch_runtime import TorchRuntime

    clip, outputs = draft.manifest.clip, draft.manifest.output_names
    with TorchRuntime(checkpoint.model, clip=clip, output_names=outputs) as reference:
        expected = reference_outputs(reference, checkpoint.golden)
    shutil.copyfile(checkpoint.path, draft.add_file(CHECKPOINT_FILE, kind="model"))
    videos = make_golden_videos(draft.folder)
    for video in videos:
        draft.kinds[video] = "golden"
    clips = {video: load_clips(draft.folder / video, clip, GOLDEN_PLAN).video for video in videos}
    draft.add_file(GOLDEN_FILE, kind="golden")
    write_golden(draft.folder, Golden(video=checkpoint.golden, expected=expected, clips=clips))
    draft.manifest = replace(
        draft.manifest,
        outputs=tuple(OutputSpec(name=name, shape=expected[name].shape[1:]) for name in outputs),
    )
    draft.add_variant(Variant(id=REFERENCE_ID, runtime="torch", precision="fp32", files=(CHECKPOINT_FILE,)))


def add_onnx(draft: Draft) -> None:
    """Add the ONNX file, exported from the checkpoint in the draft.

    Raises:
        ExportError: if the network cannot be exported; ``ParityError`` if the file computes something else.
    """
    from ivdr_deploy.export.to_onnx import export_onnx
    from ivdr_deploy.runtimes.ort_runtime import OrtRuntime

    metadata = onnx_metadata(draft.manifest)
    clip, path = metadata.contract, draft.add_file(ONNX_FILE, kind="model")
    export_onnx(load_checkpoint(draft.folder / CHECKPOINT_FILE).model, path, clip=clip, metadata=metadata)
    with OrtRuntime(path, clip=clip, output_names=metadata.outputs) as candidate:
        if candidate.metadata != metadata:
            raise ExportError(f"the metadata of {ONNX_FILE} did not survive: {candidate.metadata}")
        parity = check_parity(_golden(draft), candidate)
    draft.add_variant(
        Variant(
            id=ONNX_ID,
            runtime="onnxruntime",
            precision="fp32",
            files=(ONNX_FILE,),
            derived_from=REFERENCE_ID,
            parity=parity,
        )
    )


def add_tensorrt(draft: Draft, compute_capabilities: Sequence[str] | None) -> None:
    """Add a TensorRT plan, built from the ONNX file in the draft; its parity is empty where it cannot run.

    Raises:
        ExportError: if it cannot be built; ``ParityError`` if it computes something else.
    """
    import torch

    from ivdr_deploy.export.to_tensorrt import build_engine, choose_targets
    from ivdr_deploy.runtimes.trt_runtime import TrtRuntime

    if ONNX_ID not in [variant.id for variant in draft.variants]:
        raise ExportError(
            f"the bundle has no variant {ONNX_ID} to build a plan from",
            hint="export the checkpoint again: `ivdr export CHECKPOINT -o BUNDLE --trt`",
        )
    provider, _, targets = choose_targets(compute_capabilities)
    variant_id = f"trt-fp32-sm{'-'.join(target.replace('.', '') for target in targets)}"
    path = draft.add_file(f"{variant_id}.engine", kind="model")
    sidecar = draft.add_file(f"{variant_id}.engine.json", kind="sidecar")
    metadata = onnx_metadata(draft.manifest)
    info = build_engine(
        draft.folder / ONNX_FILE, path, metadata=metadata, compute_capabilities=compute_capabilities
    )
    parity: tuple[OutputParity, ...] = ()
    here = "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""
    if here in info.compute_capabilities:
        with TrtRuntime(path, clip=metadata.contract, onnx_sha256=info.onnx_sha256) as candidate:
            parity = check_parity(_golden(draft), candidate)
    else:
        _log.warning("the TensorRT plan was built but not run: this machine has no GPU it is for")
    draft.add_variant(
        Variant(
            id=variant_id,
            runtime="tensorrt",
            precision="fp32",
            provider=provider,
            target=Target(device="cuda", compute_capabilities=targets),
            files=(path.name, sidecar.name),
            derived_from=ONNX_ID,
            parity=parity,
        )
    )


def onnx_metadata(manifest: ArtifactManifest) -> OnnxMetadata:
    """Return what the ONNX file of a bundle says about itself."""
    return OnnxMetadata(
        name=manifest.name,
        version=manifest.version,
        contract_hash=manifest.contract_hash,
        contract=manifest.clip,
        view_plan=manifest.view_plan,
        labels=manifest.labels,
        outputs=manifest.output_names,
        ivdr_version=__version__,
    )


def _golden(draft: Draft) -> Golden:
    return read_golden(draft.folder, clip=draft.manifest.clip, outputs=draft.manifest.outputs)


def _require_tensorrt(compute_capabilities: Sequence[str] | None) -> None:
    from ivdr_deploy.export.to_tensorrt import choose_targets

    choose_targets(compute_capabilities)


def _with_export_versions(provenance: Provenance) -> Provenance:
    """Add the time of this export, and the packages that shaped the exported files."""
    versions = {
        f"export:{name}": _installed(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime", "av")
    }
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return replace(provenance, created_at=now, packages={**provenance.packages, **versions})


def _installed(name: str) -> str:
    return str(importlib.import_module(name).__version__)


def _check_name(what: str, value: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value):
        raise ConfigError(
            f"the model's {what} {value[:60]!r} cannot be served under a URL",
            hint="use letters, digits, '_', '-' and '.', beginning with a letter or digit; give it with "
            + ("--name" if what == "name" else "--model-version"),
        )
