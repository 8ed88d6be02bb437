"""Export steps that add an ONNX variant in fp32 or fp16, and what other steps share with them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from ivdr_deploy._text import quoted
from ivdr_deploy.artifacts.bundle import Draft
from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.artifacts.manifest import PROVED_ON_KEY, ArtifactManifest, OutputParity, Variant
from ivdr_deploy.artifacts.onnx_metadata import OnnxMetadata
from ivdr_deploy.errors import ExportError, ParityError
from ivdr_deploy.export.draft_files import CHECKPOINT_FILE, ONNX_FILE, ONNX_ID, REFERENCE_ID, golden_of
from ivdr_deploy.runtimes.compare import check_parity
from ivdr_deploy.spec import Precision

if TYPE_CHECKING:
    from pathlib import Path

    from onnx import ModelProto


_log = logging.getLogger(__name__)


def add_onnx(draft: Draft, precision: Precision = "fp32") -> None:
    """Add an ONNX file, exported from the checkpoint in the draft, in fp32 or fp16.

    In fp16 only the backbone computes in half precision; pixels are normalised before, and the heads run after it, in
    fp32. Nodes of the backbone whose values fp16 does not hold stay in fp32 as well, and so do as few of the others as
    it takes to agree; see ``export.half``. That file is made with the help of the fp32 one in the draft.

    Raises:
        ExportError: if the network cannot be exported; ``ParityError`` if the file computes something else.
    """
    from ivdr_deploy.export.to_onnx import export_onnx

    metadata = onnx_metadata(draft.manifest, precision)
    name = ONNX_FILE if precision == "fp32" else f"model-{precision}.onnx"
    path = draft.add_file(name, kind="model")
    model = load_checkpoint(draft.folder / CHECKPOINT_FILE).model
    model.set_precision(precision)
    export_onnx(model, path, clip=metadata.contract, metadata=metadata)
    build: dict[str, str] = {}
    if precision == "fp16":
        parity, build = _fit_half(draft, path, metadata)
    else:
        parity = prove_onnx(draft, path, metadata, precision)
    draft.add_variant(
        Variant(
            id=f"onnx-{precision}",
            runtime="onnxruntime",
            precision=precision,
            files=(name,),
            derived_from=REFERENCE_ID,
            parity=parity,
            build=build,
        )
    )


def _fit_half(
    draft: Draft, path: Path, metadata: OnnxMetadata
) -> tuple[tuple[OutputParity, ...], dict[str, str]]:
    """Keep in fp32 what fp16 does not hold, and then what it takes to agree; returns parity and what to note."""
    import onnx

    from ivdr_deploy.export.half import HalfGraph, UnlikeGraphsError

    clips = golden_of(draft).video
    assert clips is not None  # without golden clips no export ends
    half = onnx.load(path)
    # Values that do not fit are looked for below: there they would not show.
    build = {PROVED_ON_KEY: "a CPU, which computes fp16 in fp32"}
    try:
        graph = HalfGraph(half, onnx.load(draft.folder / held_variant(draft, ONNX_ID).files[0]))
    except UnlikeGraphsError as error:
        _log.warning("%s: its constants stay as the exporter rounded them", error.message)
        graph = HalfGraph(half, half)
        build["constants"] = f"rounded by the exporter: {error.message}"
    large = sorted(graph.overflowing(clips))

    def prove(kept: Collection[str]) -> tuple[OutputParity, ...]:
        onnx.save_model(graph.keeping([*large, *kept]), path)
        return prove_onnx(draft, path, metadata, "fp16")

    parity, kept = keeping(prove, lambda: graph.by_error(clips, without=large))
    return parity, {**build, **note_kept(onnx.load(path), {"overflows": large, "inexact": kept})}


def keeping(
    prove: Callable[[Collection[str]], tuple[OutputParity, ...]], by_error: Callable[[], Sequence[str]]
) -> tuple[tuple[OutputParity, ...], list[str]]:
    """Prove a file, and where it fails with as few nodes in fp32 as it takes.

    Args:
        prove: Writes the file with these nodes in fp32, and proves it.
        by_error: Names the nodes, the one that adds most error first.

    Raises:
        ParityError: if it fails with all of them but one.
    """
    from ivdr_deploy.export.layers import fewest

    try:
        return prove(()), []
    except ParityError as error:
        _log.warning("%s; looking for the layers at fault", error.message)

        def passes(nodes: Collection[str]) -> bool:
            try:
                prove(nodes)
            except ParityError:
                return False
            return True

        # With all of them nothing would be left of the precision but its name.
        kept = fewest(by_error()[:-1], passes)
        if kept is None:
            raise
        return prove(kept), kept


def note_kept(model: ModelProto, kept: Mapping[str, Collection[str]]) -> dict[str, str]:
    """Say which layers stayed in fp32, and why; returns the entries for ``Variant.build``."""
    from ivdr_deploy.export.layers import describe_layers

    noted = {}
    for why, names in kept.items():
        if layers := describe_layers(model, names):
            noted[f"fp32_{why}"] = layers
            _log.warning("kept in fp32 (%s): %s", why, layers)
    return noted


def held_variant(draft: Draft, variant_id: str) -> Variant:
    """Find the variant that another one is made from.

    Raises:
        ExportError: if the draft does not hold it.
    """
    for variant in draft.variants:
        if variant.id == variant_id:
            return variant
    raise ExportError(
        f"the bundle has no variant {variant_id} to make this one from",
        hint="export the checkpoint again: `ivdr export CHECKPOINT -o BUNDLE`",
    )


def onnx_metadata(
    manifest: ArtifactManifest, precision: Precision = "fp32", *, instruction_set: str = ""
) -> OnnxMetadata:
    """Return what an ONNX file of a bundle says about itself."""
    return OnnxMetadata(
        name=manifest.name,
        version=manifest.version,
        contract_hash=manifest.contract_hash,
        contract=manifest.clip,
        view_plan=manifest.view_plan,
        labels=manifest.labels,
        outputs=manifest.output_names,
        precision=precision,
        instruction_set=instruction_set,
        ivdr_version=manifest.ivdr_version,
    )


def prove_onnx(
    draft: Draft, path: Path, metadata: OnnxMetadata, precision: Precision
) -> tuple[OutputParity, ...]:
    """Run a file on the golden clips, and see that it says about itself what it should."""
    from ivdr_deploy.runtimes.ort_runtime import OrtRuntime

    with OrtRuntime(
        path, clip=metadata.contract, output_names=metadata.outputs, precision=precision
    ) as found:
        if found.metadata != metadata:
            raise ExportError(f"the metadata of {path.name} did not survive: {quoted(str(found.metadata))}")
        return check_parity(golden_of(draft), found)
