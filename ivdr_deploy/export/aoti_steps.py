"""Export steps that add AOTInductor packages: for the CPU of this machine, and for its GPU where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ivdr_deploy.artifacts.bundle import Draft
from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.artifacts.manifest import OutputParity, Target, Variant, labels_sha256
from ivdr_deploy.environment import cpp_compiler, instruction_sets
from ivdr_deploy.errors import ExportError
from ivdr_deploy.export.draft_files import CHECKPOINT_FILE, REFERENCE_ID, golden_of
from ivdr_deploy.runtimes.compare import check_parity
from ivdr_deploy.spec import Device, Precision

if TYPE_CHECKING:
    from pathlib import Path

    from ivdr_deploy.models.network import VideoModel


def package_targets(precision: Precision) -> list[tuple[str, Target]]:
    """Return what packages are compiled for here, each with the end of its variant's id.

    A GPU takes every precision but int8. For the CPU there are a package for every processor with AVX2 and, where this
    one has AVX-512, one for that; in bf16 and in int8 one for processors that multiply it.

    Raises:
        ExportError: if a package in this precision would not run here, or not faster than fp32.
    """
    found = [] if precision == "int8" else _gpu_targets()
    try:
        found += _cpu_targets(precision)
    except ExportError:
        if not found:
            raise
    return found


def _gpu_targets() -> list[tuple[str, Target]]:
    import torch

    if not torch.cuda.is_available():
        return []
    here = "{}.{}".format(*torch.cuda.get_device_capability())
    return [(f"sm{here.replace('.', '')}", Target(device="cuda", compute_capabilities=(here,)))]


def _cpu_targets(precision: Precision) -> list[tuple[str, Target]]:
    found = instruction_sets()
    if "avx2" not in found:
        raise ExportError("AOTInductor packages for a CPU are made on x86-64 with AVX2, which this one lacks")
    if not cpp_compiler():
        raise ExportError("AOTInductor needs a C++ compiler, and neither g++ nor clang++ was found")
    if precision == "fp32":
        return [
            (f"cpu-{name}", Target(device="cpu", instruction_set=name))
            for name in ("avx2", "avx512")
            if name in found
        ]
    if precision == "bf16" and {"avx512", "bf16"} <= found:
        return [("cpu", Target(device="cpu", instruction_set="bf16"))]
    if precision == "int8" and "avx512_vnni" in found:
        return [("cpu", Target(device="cpu", instruction_set="avx512_vnni"))]
    raise ExportError(
        f"this processor does not multiply {precision}, so a package would be slower than in fp32"
    )


def add_aoti(draft: Draft, precision: Precision) -> None:
    """Compile the checkpoint in the draft and add a variant for each of ``package_targets``.

    Raises:
        ExportError: if it cannot be compiled; ``ParityError`` if a package computes something else.
    """
    for ending, target in package_targets(precision):
        variant_id = f"aoti-{precision}-{ending}"
        path = draft.add_file(f"{variant_id}.pt2", kind="model")
        model = load_checkpoint(draft.folder / CHECKPOINT_FILE).model
        model.set_precision(precision)
        parity = compile_and_prove(draft, path, model, precision, target)
        draft.add_variant(
            Variant(
                id=variant_id,
                runtime="aoti",
                precision=precision,
                target=target,
                files=(path.name,),
                derived_from=REFERENCE_ID,
                parity=parity,
                build=package_notes(draft),
            )
        )


def compile_and_prove(
    draft: Draft, path: Path, model: VideoModel, precision: Precision, target: Target
) -> tuple[OutputParity, ...]:
    """Compile a network into a file of the draft, and run it on the golden clips.

    Raises:
        As ``add_aoti``.
    """
    from ivdr_deploy.export.to_aoti import compile_package
    from ivdr_deploy.runtimes.aoti_runtime import AotiRuntime

    manifest = draft.manifest
    device: Device = target.device or "cpu"
    needed = target.instruction_set
    compile_package(
        model,
        path,
        clip=manifest.clip,
        outputs=manifest.output_names,
        device=device,
        instruction_set="avx512" if needed in ("bf16", "avx512_vnni") else needed,
    )
    with AotiRuntime(
        path, clip=manifest.clip, output_names=manifest.output_names, precision=precision, device=device
    ) as candidate:
        return check_parity(golden_of(draft), candidate)


def package_notes(draft: Draft) -> dict[str, str]:
    """Return what the manifest must say of a package before it may be opened."""
    import torch

    from ivdr_deploy.runtimes.aoti_runtime import LABELS_KEY, TORCH_KEY

    return {TORCH_KEY: torch.__version__, LABELS_KEY: labels_sha256(draft.manifest.labels)}
