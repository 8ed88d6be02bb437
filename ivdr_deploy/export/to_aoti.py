"""Network -> AOTInductor package: machine code for one kind of processor or GPU, with a dynamic batch."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from ivdr_deploy._files import NO_SPACE
from ivdr_deploy._text import reason_of
from ivdr_deploy.errors import ExportError
from ivdr_deploy.models.backbones import RemoveTemporalMean
from ivdr_deploy.models.network import ExportNetwork, VideoModel
from ivdr_deploy.spec import MAX_BATCH, ClipSpec, Device

# It warns of a missing GPU even where the package is for a CPU.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

CPU_TARGETS = {"avx2": ("x86-64-v3", 256), "avx512": ("x86-64-v4", 512)}
"""Instruction set -> what the C++ compiler is told, and bits of a register."""


def compile_package(
    model: VideoModel,
    path: Path,
    *,
    clip: ClipSpec,
    outputs: tuple[str, ...],
    device: Device,
    instruction_set: str = "",
) -> None:
    """Compile a network.

    Args:
        model: In eval mode and in the precision that its backbone is to compute in; it is moved to ``device``, and
            changed where the compiler wants another form of the same.
        path: File to write, ending in ``.pt2``.
        clip: The contract.
        outputs: What to return, in order.
        device: What to compile for; a GPU is the one of this machine.
        instruction_set: On a CPU a key of ``CPU_TARGETS``: the package runs on every processor that has it.

    Raises:
        ExportError: if it cannot be compiled.
        OSError: if a disk is full, here or in the temporary folder that the compiler works in.
    """
    if device == "cpu":
        _pool_means(model)
        _lay_channels_last(model)
    network = ExportNetwork(model, outputs).eval().to(device)
    # Two clips: with one, the exporter may take the batch axis for a constant.
    example = torch.zeros((2, *clip.clip_shape), dtype=torch.uint8, device=device)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    options: dict[str, object] = {"freezing": True}
    if device == "cpu":
        march, bits = CPU_TARGETS[instruction_set]
        # The number of threads is chosen where it runs, not where it was compiled.
        options |= {"cpp.march": march, "cpp.simdlen": bits, "cpp.dynamic_threads": True}
    try:
        with torch.no_grad(), fresh_cache():
            program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=options
            )
    except Exception as error:  # torch, its code generator and the C++ compiler raise what they like
        if (full := _full_disk(error)) is not None:
            raise full from error
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise ExportError(
            f"the network {model.spec.backbone} cannot be compiled ({reason})",
            hint="AOTInductor needs a C++ compiler (g++) on a CPU, and a GPU that Triton knows; see `ivdr doctor`",
        ) from error


class _PooledMean(nn.Module):
    """``RemoveTemporalMean`` by a pooling.

    Of a mean over frames, next to other work on each pixel, the compiler makes a parallel loop for every pixel: `tiny`
    took 40 times as long as without a compiler.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, T, H, W) to the same shape; a pooling of bf16 does not exist."""
        return x - F.avg_pool3d(x.float(), (x.shape[2], 1, 1)).to(x.dtype)


def _pool_means(model: VideoModel) -> None:
    for path, module in list(model.named_modules()):
        if isinstance(module, RemoveTemporalMean):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _PooledMean())


def _lay_channels_last(model: VideoModel) -> None:
    """Store the weights of convolutions with channels last, from which the compiler takes the layout of everything.

    The numbers are the same, and a package is quicker: decision 14.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)


def _full_disk(error: BaseException) -> OSError | None:
    """Return the full disk that an error came from, or that a compiler tells of in it; None for any other error."""
    said, place = str(error), tempfile.gettempdir()
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in NO_SPACE:
            return OSError(cause.errno, cause.strerror, cause.filename or place)
        cause = cause.__cause__ or cause.__context__
    told = [number for number in NO_SPACE if os.strerror(number) in said]
    return OSError(told[0], os.strerror(told[0]), place) if told else None
