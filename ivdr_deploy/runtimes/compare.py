"""How far apart the outputs of two runtimes may be: the rule for export, verify and every loader, and the gate."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ivdr_deploy.artifacts.golden import Golden
from ivdr_deploy.artifacts.manifest import OutputParity
from ivdr_deploy.errors import ExportError, ParityError
from ivdr_deploy.runtimes.base import Runtime, infer_all
from ivdr_deploy.spec import Precision

TOLERANCE: dict[Precision, float] = {
    # Reordering the sums of an 18-layer network moves its outputs by some 1e-5 of their size, as does going from
    # fp32 to fp64. A wrong weight, a wrong normalisation or TF32 arithmetic moves them by more than 1e-4.
    "fp32": 1e-4,
    # Half precision keeps 11 bits of every number, bfloat16 8.
    "fp16": 2e-2,
    "bf16": 1e-1,
    # Eight bits; whether that is good enough is judged by the labels, not by this bound.
    "int8": 2e-1,
}
"""Largest difference that passes, relative to the largest value of the output, or to 1 where all are smaller."""


def compare_outputs(
    expected: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    *,
    precision: Precision,
) -> tuple[OutputParity, ...]:
    """Compare the outputs of one runtime with those of torch.

    Args:
        expected: float32 array per output, first axis clips; every one is compared.
        found: The same from the other runtime.
        precision: Of its model; picks the tolerance.

    Returns:
        One entry per output. An output that is absent, has another shape or holds NaN or infinity does not
        pass: its difference is infinite.
    """
    return tuple(
        OutputParity(
            output=name,
            max_abs_diff=_max_abs_diff(value, found.get(name)),
            min_cosine=_min_cosine(value, found.get(name)),
            tolerance=TOLERANCE[precision] * max(1.0, float(np.abs(value).max(initial=0.0))),
        )
        for name, value in expected.items()
    )


def describe_failures(parity: tuple[OutputParity, ...]) -> str:
    """Name every output that does not pass, with its difference and the tolerance; empty when all pass."""
    return "; ".join(
        f"{entry.output} differs by {entry.max_abs_diff:.2e} (tolerance {entry.tolerance:.0e})"
        for entry in parity
        if not entry.passed
    )


def _comparable(expected: np.ndarray, found: np.ndarray | None) -> bool:
    return found is not None and found.shape == expected.shape and bool(np.isfinite(found).all())


def _max_abs_diff(expected: np.ndarray, found: np.ndarray | None) -> float:
    if found is None or not _comparable(expected, found):
        return float("inf")
    return float(np.abs(expected.astype(np.float64) - found).max(initial=0.0))


def _min_cosine(expected: np.ndarray, found: np.ndarray | None) -> float:
    if found is None or not _comparable(expected, found):
        return -1.0
    a, b = expected.astype(np.float64), found.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = np.where(norms > 0, (a * b).sum(axis=-1) / np.where(norms > 0, norms, 1.0), 1.0)
    return float(min(cosine.min(initial=1.0), 1.0))


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


def check_parity(golden: Golden, candidate: Runtime) -> tuple[OutputParity, ...]:
    """Compare a runtime with what the reference gave for the golden clips: the gate of every export.

    Returns:
        The measured differences, all within tolerance.

    Raises:
        ParityError: if one is not, or an output is missing or not finite.
        ExportError: if there are no golden clips to compare on.
    """
    if golden.video is None:
        raise ExportError("there are no golden clips, so nothing can be compared")
    parity = compare_outputs(
        golden.expected, infer_all(candidate, golden.video), precision=candidate.precision
    )
    if failures := describe_failures(parity):
        raise ParityError(
            f"{candidate.description} does not compute what the trained network computes: {failures}",
            hint="nothing was written; please report this with the versions that `ivdr doctor` prints",
        )
    return parity
