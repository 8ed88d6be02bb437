"""Export steps that add the network itself in half precision, for the GPU of this machine."""

from __future__ import annotations

import numpy as np

from ivdr_deploy.artifacts.bundle import Draft
from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.artifacts.manifest import OutputParity, Target, Variant
from ivdr_deploy.benchmarks.timing import percentile, time_ms
from ivdr_deploy.errors import ExportError
from ivdr_deploy.export.draft_files import CHECKPOINT_FILE, REFERENCE_ID, golden_of
from ivdr_deploy.runtimes.base import Runtime
from ivdr_deploy.runtimes.compare import check_parity
from ivdr_deploy.spec import Precision

_TIMED_CALLS = 15


def require_gpu(precision: Precision) -> None:
    """Refuse a machine on which half precision is no gain.

    Raises:
        ExportError: if there is no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise ExportError(
            f"torch in {precision} is for a GPU, and no NVIDIA driver was found",
            hint="export it on the machine that it is for; for a CPU there are onnx int8 and aoti bf16",
        )


def add_torch(draft: Draft, precision: Precision) -> None:
    """Add the checkpoint in the draft in half precision, its weights laid out as they are faster on this GPU.

    Raises:
        ExportError: if there is no GPU; ``ParityError`` if it computes something else.
    """
    from ivdr_deploy.runtimes.torch_runtime import LAYOUT_KEY, LAYOUTS, TorchRuntime

    require_gpu(precision)
    manifest, golden = draft.manifest, golden_of(draft)
    tried: dict[str, tuple[float, tuple[OutputParity, ...]]] = {}
    for layout in LAYOUTS:
        model = load_checkpoint(draft.folder / CHECKPOINT_FILE).model
        with TorchRuntime(
            model,
            clip=manifest.clip,
            output_names=manifest.output_names,
            precision=precision,
            layout=layout,
            device="cuda",
        ) as candidate:
            parity = check_parity(golden, candidate)
            clips = np.zeros((1, *manifest.clip.clip_shape), np.uint8)
            tried[layout] = _median_ms(candidate, clips), parity
    fastest = min(tried, key=lambda layout: tried[layout][0])
    draft.add_variant(
        Variant(
            id=f"torch-{precision}",
            runtime="torch",
            precision=precision,
            target=Target(device="cuda"),
            files=(CHECKPOINT_FILE,),
            derived_from=REFERENCE_ID,
            parity=tried[fastest][1],
            build={
                LAYOUT_KEY: fastest,
                **{f"ms_{layout}": f"{milliseconds:.3f}" for layout, (milliseconds, _) in tried.items()},
            },
        )
    )


def _median_ms(runtime: Runtime, clips: np.ndarray) -> float:
    runtime.infer(clips)  # makes buffers and graph
    return percentile([time_ms(lambda: runtime.infer(clips))[1] for _ in range(_TIMED_CALLS)], 50)
