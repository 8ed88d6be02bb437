"""How far apart the outputs of two runtimes may be: the rule for export, verify and every loader, and the gate."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ivdr_deploy.artifacts.golden import Golden
from ivdr_deploy.artifacts.manifest import OutputParity
from ivdr_deploy.errors import ExportError, ParityError
from ivdr_deploy.runtimes.base import Runtime, infer_all, not_finite
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
    "fp8": 2e-1,
}
"""Largest difference that passes, relative to the size of a value; see ``_sizes``."""

_SPREAD = 4.0
"""How much larger than a middling value of an output all its values are taken for, if some are."""


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
        One entry per output: difference and tolerance of the value that fits worst. An output that is absent, has
        another shape or holds NaN or infinity on either side does not pass: its difference is infinite.
    """
    return tuple(
        _compare(name, value, found.get(name), tolerance=TOLERANCE[precision])
        for name, value in expected.items()
    )


def _compare(name: str, expected: np.ndarray, found: np.ndarray | None, *, tolerance: float) -> OutputParity:
    if found is None or found.shape != expected.shape or not expected.size:
        return OutputParity(output=name, max_abs_diff=float("inf"), min_cosine=-1.0, tolerance=tolerance)
    a, b = expected.astype(np.float64), found.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return OutputParity(output=name, max_abs_diff=float("inf"), min_cosine=-1.0, tolerance=tolerance)
    differences, allowed = np.abs(a - b).ravel(), tolerance * _sizes(a).ravel()
    worst = int((differences / allowed).argmax())
    lengths = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    norms = lengths[0] * lengths[1]
    # Zero has no direction: it agrees with zero alone.
    cosine = np.where(
        norms > 0, (a * b).sum(axis=-1) / np.where(norms > 0, norms, 1.0), lengths[0] == lengths[1]
    )
    return OutputParity(
        output=name,
        max_abs_diff=float(differences[worst]),
        min_cosine=float(min(cosine.min(), 1.0)),
        tolerance=float(allowed[worst]),
    )


def _sizes(expected: np.ndarray) -> np.ndarray:
    """Return what the difference of each value is measured by.

    The sums of a network move by a share of their largest terms, so small values are measured by the large ones beside
    them, and at least by 1. But a few huge ones, which a wrong network may share, must not excuse all the others: those
    count as ``_SPREAD`` times the median, and each for itself.
    """
    size = np.abs(expected)
    middling = float(np.quantile(size, 0.5, method="lower"))
    common = max(1.0, min(float(size.max()), _SPREAD * middling))
    sizes: np.ndarray = np.maximum(size, common)
    return sizes


def describe_failures(parity: tuple[OutputParity, ...]) -> str:
    """Name every output that does not pass, with its difference and the tolerance; empty when all pass."""
    return "; ".join(
        f"{entry.output} differs by {entry.max_abs_diff:.2e} (tolerance {entry.tolerance:.2e})"
        for entry in parity
        if not entry.passed
    )


def reference_outputs(reference: Runtime, video: np.ndarray) -> dict[str, np.ndarray]:
    """Run the trained network on the golden clips.

    Raises:
        ExportError: if an output holds NaN or infinity: nothing could be compared with it.
    """
    outputs = reference.infer(video)
    if broken := not_finite(outputs):
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
