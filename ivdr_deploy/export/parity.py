"""The gate of every export: the exported model must compute what the trained one computes, on real clips."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ivdr_deploy.errors import ExportError, ParityError
from ivdr_deploy.runtimes.base import Runtime
from ivdr_deploy.runtimes.compare import compare_outputs, describe_failures
from ivdr_deploy.spec import OutputParity


def reference_outputs(reference: Runtime, video: np.ndarray) -> dict[str, np.ndarray]:
    """Run the trained network on the golden clips.

    Raises:
        ExportError: if an output holds NaN or infinity: nothing could be compared with it.
    """
    outputs = reference.infer(video)
    broken = [name for name, value in outputs.items() if not np.isfinite(value).all()]
    if broken:
        raise ExportError(
            f"the trained network gives NaN or infinity in {', '.join(broken)} on its golden clips",
            hint="the training diverged; export an earlier checkpoint, or train with a lower learning rate",
        )
    return outputs


def check_parity(
    expected: Mapping[str, np.ndarray], candidate: Runtime, video: np.ndarray
) -> tuple[OutputParity, ...]:
    """Compare a runtime with the trained network on the golden clips.

    Args:
        expected: From ``reference_outputs``.
        candidate: The runtime to judge.
        video: The golden clips, uint8 (G, T, H, W, 3).

    Returns:
        The measured differences, all within tolerance.

    Raises:
        ParityError: if one is not, or an output is missing or not finite.
    """
    parity = compare_outputs(
        expected, candidate.infer(video), runtime=candidate.name, precision=candidate.precision
    )
    if failures := describe_failures(parity):
        raise ParityError(
            f"{candidate.description} does not compute what the trained network computes: {failures}",
            hint="nothing was written; please report this with the versions that `ivdr doctor` prints",
        )
    return parity
