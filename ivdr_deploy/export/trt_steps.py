"""Export steps that add a TensorRT plan, built from an ONNX file in the draft."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ivdr_deploy._files import scratch_folder
from ivdr_deploy.artifacts.bundle import Draft
from ivdr_deploy.artifacts.manifest import OutputParity, Target, Variant
from ivdr_deploy.export.draft_files import TRT_FILE_IDS, golden_of
from ivdr_deploy.export.onnx_steps import held_variant, onnx_metadata, prove_onnx
from ivdr_deploy.runtimes.compare import check_parity
from ivdr_deploy.spec import Precision

_log = logging.getLogger(__name__)


def add_tensorrt(
    draft: Draft, compute_capabilities: Sequence[str] | None = None, *, precision: Precision = "fp32"
) -> None:
    """Add a TensorRT plan; its parity is empty where it cannot run.

    Args:
        draft: Holds the ONNX variant of the same precision: a plan computes in the types of its ONNX file.
        compute_capabilities: See ``to_tensorrt.choose_targets``.
        precision: A key of ``TRT_FILE_IDS``.

    Raises:
        ExportError: if it cannot be built; ``ParityError`` if it computes something else.
    """
    import torch

    from ivdr_deploy.export.to_tensorrt import (
        build_engine,
        choose_targets,
        log_path,
        timings_path,
        wants_two_axes,
    )
    from ivdr_deploy.runtimes.trt_runtime import TrtRuntime

    source = held_variant(draft, TRT_FILE_IDS[precision])
    provider, _, targets = choose_targets(compute_capabilities, precision)
    variant_id = f"trt-{precision}-sm{'-'.join(target.replace('.', '') for target in targets)}"
    path = draft.add_file(f"{variant_id}.engine", kind="model")
    sidecar = draft.add_file(f"{variant_id}.engine.json", kind="sidecar")
    metadata = onnx_metadata(draft.manifest)
    form = None
    if wants_two_axes(provider, targets):
        form = _over_two_axes(draft, draft.folder / source.files[0], precision)
    info = build_engine(
        draft.folder / source.files[0],
        path,
        metadata=metadata,
        precision=precision,
        compute_capabilities=compute_capabilities,
        form=form,
    )
    for kept in (log_path(path), timings_path(path, targets)):
        if kept.is_file():
            draft.kinds[kept.name] = "record"
    parity: tuple[OutputParity, ...] = ()
    here = "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""
    if here in info.compute_capabilities:
        with TrtRuntime(path, clip=metadata.contract, onnx_sha256=info.onnx_sha256) as candidate:
            parity = check_parity(golden_of(draft), candidate)
    else:
        _log.warning("%s was built but not run: this machine has no GPU it is for", variant_id)
    draft.add_variant(
        Variant(
            id=variant_id,
            runtime="tensorrt",
            precision=precision,
            provider=provider,
            target=Target(device="cuda", compute_capabilities=targets),
            files=(path.name, sidecar.name),
            derived_from=source.id,
            parity=parity,
            build={} if form is None else {"form": "convolutions over two axes"},
        )
    )


def _over_two_axes(draft: Draft, path: Path, precision: Precision) -> bytes:
    """Rewrite an ONNX file, and prove on the golden clips that it computes the same; see ``export.to_two_axes``."""
    import onnx

    from ivdr_deploy.export.to_two_axes import over_two_axes

    with scratch_folder("ivdr-export-") as folder:
        written = folder / path.name
        onnx.save_model(over_two_axes(onnx.load(path)), written)
        prove_onnx(draft, written, onnx_metadata(draft.manifest, precision), precision)
        return written.read_bytes()
