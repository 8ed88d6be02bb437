"""Export steps that add an AOTInductor package: for the GPU of this machine where there is one, else for its CPU."""

from __future__ import annotations

import shutil

from ivdr_deploy.artifacts.bundle import Draft
from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.artifacts.manifest import Target, Variant, labels_sha256
from ivdr_deploy.environment import instruction_sets
from ivdr_deploy.errors import ExportError
from ivdr_deploy.export.draft_files import CHECKPOINT_FILE, REFERENCE_ID, golden_of
from ivdr_deploy.runtimes.compare import check_parity
from ivdr_deploy.spec import Device, Precision


def package_targets(precision: Precision) -> list[tuple[str, Target]]:
    """Return what packages are compiled for here, each with the end of its variant's id.

    A GPU takes every precision. For the CPU there are a package for every processor with AVX2 and, where this one has
    AVX-512, one for that; in bf16 one for processors that multiply it.

    Raises:
        ExportError: if a package in this precision would not run here, or not faster than fp32.
    """
    import torch

    if torch.cuda.is_available():
        here = "{}.{}".format(*torch.cuda.get_device_capability())
        return [(f"sm{here.replace('.', '')}", Target(device="cuda", compute_capabilities=(here,)))]
    found = instruction_sets()
    if "avx2" not in found:
        raise ExportError("AOTInductor packages for a CPU are made on x86-64 with AVX2, which this one lacks")
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise ExportError("AOTInductor needs a C++ compiler, and neither g++ nor clang++ was found")
    if precision == "fp32":
        return [
            (f"cpu-{name}", Target(device="cpu", instruction_set=name))
            for name in ("avx2", "avx512")
            if name in found
        ]
    if precision == "bf16" and {"avx512", "bf16"} <= found:
        return [("cpu", Target(device="cpu", instruction_set="bf16"))]
    raise ExportError(
        f"this processor does not multiply {precision}, so a package would be slower than in fp32"
    )


def add_aoti(draft: Draft, precision: Precision) -> None:
    """Compile the checkpoint in the draft and add a variant for each of ``package_targets``.

    Raises:
        ExportError: if it cannot be compiled; ``ParityError`` if a package computes something else.
    """
    import torch

    from ivdr_deploy.export.to_aoti import compile_package
    from ivdr_deploy.runtimes.aoti_runtime import LABELS_KEY, TORCH_KEY, AotiRuntime

    manifest = draft.manifest
    for ending, target in package_targets(precision):
        variant_id = f"aoti-{precision}-{ending}"
        device: Device = target.device or "cpu"
        path = draft.add_file(f"{variant_id}.pt2", kind="model")
        model = load_checkpoint(draft.folder / CHECKPOINT_FILE).model
        model.set_precision(precision)
        compile_package(
            model,
            path,
            clip=manifest.clip,
            outputs=manifest.output_names,
            device=device,
            instruction_set="avx512" if target.instruction_set == "bf16" else target.instruction_set,
        )
        with AotiRuntime(
            path,
            clip=manifest.clip,
            output_names=manifest.output_names,
            precision=precision,
            device=device,
        ) as candidate:
            parity = check_parity(golden_of(draft), candidate)
        draft.add_variant(
            Variant(
                id=variant_id,
                runtime="aoti",
                precision=precision,
                target=target,
                files=(path.name,),
                derived_from=REFERENCE_ID,
                parity=parity,
                build={TORCH_KEY: torch.__version__, LABELS_KEY: labels_sha256(manifest.labels)},
            )
        )
