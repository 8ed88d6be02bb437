"""Export steps that add a variant of 8 bits, calibrated on real clips: ONNX for CPU or TensorRT, AOTInductor."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ivdr_deploy._files import sha256_file
from ivdr_deploy.artifacts.bundle import Draft
from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.artifacts.manifest import OutputParity, Target, Variant
from ivdr_deploy.environment import instruction_sets
from ivdr_deploy.export.aoti_steps import compile_and_prove, package_notes, package_targets
from ivdr_deploy.export.calibration import Calibration, calibration_clips
from ivdr_deploy.export.draft_files import CHECKPOINT_FILE, ONNX_ID, TRT_FILE_IDS
from ivdr_deploy.export.onnx_steps import held_variant, keeping, note_kept, onnx_metadata, prove_onnx
from ivdr_deploy.spec import Precision, RuntimeName

if TYPE_CHECKING:
    from ivdr_deploy.export.int8.quantise import Calibrated, Quantised, Write

_Prove = Callable[["Quantised", Path, Collection[str]], tuple[OutputParity, ...]]
"""Writes a file with some nodes in fp32, and proves it."""


def add_onnx_int8(draft: Draft, calibration: Calibration) -> None:
    """Add the int8 ONNX file for the CPU, made from the fp32 file in the draft; see ``export.int8.channels_last``.

    Weights have 8 bits where this processor multiplies them exactly (VNNI), and then the variant asks for such a
    processor; elsewhere 7 bits, which are exact on every processor.

    Raises:
        ExportError: if the network has no int8 form; ``ParityError`` if the file computes something else.
        DataError: if too few clips can be had from the calibration list.
    """
    from ivdr_deploy.export.int8.channels_last import lower

    exact = "vnni" in instruction_sets()
    _add_onnx(
        draft,
        calibration,
        lower,
        weight_bits=8 if exact else 7,
        variant_id="onnx-int8-cpu-vnni" if exact else "onnx-int8-cpu",
        target=Target(device="cpu", instruction_set="vnni" if exact else ""),
    )


def add_onnx_trt(draft: Draft, calibration: Calibration, precision: Literal["int8", "fp8"]) -> None:
    """Add the ONNX file of 8 bits that a TensorRT plan is built from; see ``export.int8.qdq``.

    Raises:
        As ``add_onnx_int8``.
    """
    from ivdr_deploy.export.int8.qdq import insert_fp8_pairs, insert_pairs

    _add_onnx(
        draft,
        calibration,
        insert_pairs if precision == "int8" else insert_fp8_pairs,
        weight_bits=8,
        variant_id=TRT_FILE_IDS[precision],
        target=Target(),
        precision=precision,
    )


def holds_onnx_trt(draft: Draft, calibration: Calibration, precision: Precision) -> bool:
    """Say whether the draft has the file of ``add_onnx_trt`` already, calibrated on the same list."""
    return any(
        variant.id == TRT_FILE_IDS[precision]
        and variant.build.get("calibration_data") == calibration.videos.data_hash
        for variant in draft.variants
    )


def add_aoti_int8(draft: Draft, calibration: Calibration) -> None:
    """Add an AOTInductor package of the network with convolutions of 8 bits; see ``export.int8.modules``.

    Its ranges and weights are those that ``add_onnx_int8`` would take with the same list.

    Raises:
        As ``add_onnx_int8``; ``ExportError`` also if it cannot be compiled.
    """
    from ivdr_deploy.export.int8.channels_last import lower

    ((ending, target),) = package_targets("int8")

    def prove(made: Quantised, path: Path, kept: Collection[str]) -> tuple[OutputParity, ...]:
        from ivdr_deploy.export.int8.modules import quantise_modules

        model = load_checkpoint(draft.folder / CHECKPOINT_FILE).model
        quantise_modules(model, made, kept)
        return compile_and_prove(draft, path, model, "int8", target)

    name = f"aoti-int8-{ending}"
    variant = _variant(name, f"{name}.pt2", runtime="aoti", target=target, build=package_notes(draft))
    _add(draft, calibration, lower, prove, variant, weight_bits=8)


def _add_onnx(
    draft: Draft,
    calibration: Calibration,
    write: Write,
    *,
    weight_bits: int,
    variant_id: str,
    target: Target,
    precision: Precision = "int8",
) -> None:
    metadata = onnx_metadata(draft.manifest, precision, instruction_set=target.instruction_set)

    def prove(made: Quantised, path: Path, kept: Collection[str]) -> tuple[OutputParity, ...]:
        import onnx

        model = made.keeping(kept)
        onnx.helper.set_model_props(model, metadata.to_props())
        onnx.save_model(model, path)
        return prove_onnx(draft, path, metadata, precision)

    variant = _variant(
        variant_id, f"{variant_id}.onnx", runtime="onnxruntime", target=target, precision=precision
    )
    _add(draft, calibration, write, prove, variant, weight_bits=weight_bits)


def _variant(
    name: str,
    file: str,
    *,
    runtime: RuntimeName,
    target: Target,
    precision: Precision = "int8",
    build: dict[str, str] | None = None,
) -> Variant:
    return Variant(
        id=name,
        runtime=runtime,
        precision=precision,
        target=target,
        files=(file,),
        derived_from=ONNX_ID,
        build=build or {},
    )


def _add(
    draft: Draft,
    calibration: Calibration,
    write: Write,
    prove: _Prove,
    variant: Variant,
    *,
    weight_bits: int,
) -> None:
    """Calibrate, write the one file of a variant with as few layers in fp32 as it takes, and add the variant."""
    from ivdr_deploy.export.int8.quantise import quantise

    origin = held_variant(draft, ONNX_ID)
    calibrated = _calibrated(draft, calibration, draft.folder / origin.files[0], write, weight_bits)
    made = quantise(calibrated, write)
    path = draft.add_file(variant.files[0], kind="model")
    parity, kept = keeping(lambda kept: prove(made, path, kept), made.by_error)
    build = {
        **variant.build,
        "weight_bits": str(weight_bits),
        **note_kept(made.source.model, {"inexact": kept}),
        "calibration_data": calibration.videos.data_hash,
        "calibration_clips": str(calibrated.number),
        "ranges": made.method,
        **{f"error_{method}": f"{error:.4f}" for method, error in made.errors.items()},
    }
    draft.add_variant(replace(variant, parity=parity, build=build))


def _calibrated(
    draft: Draft, calibration: Calibration, graph: Path, write: Write, weight_bits: int
) -> Calibrated:
    """Return what the clips tell of a graph, found once for all forms that are asked for with one list."""
    from ivdr_deploy.export.int8.quantise import calibrate, require_form

    key = (sha256_file(graph), weight_bits)
    if key not in calibration.told:
        require_form(graph, write)
        clips = calibration_clips(calibration, draft.manifest.clip)
        calibration.told.clear()
        calibration.told[key] = calibrate(graph, clips, weight_bits=weight_bits)
    return calibration.told[key]
