"""How far apart the outputs of two runtimes may be: the rule for export, verify and every loader."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ivdr_deploy.spec import OutputParity, Precision, RuntimeName

TOLERANCE: dict[Precision, float] = {
    # Reordering the sums of an 18-layer network moves its outputs by some 1e-5 of their size, as does going from
    # fp32 to fp64. A wrong weight, a wrong normalisation or TF32 arithmetic moves them by more than 1e-4.
    "fp32": 1e-4,
    # Half precision keeps 11 bits of every number.
    "fp16": 2e-2,
    # Eight bits; whether that is good enough is judged by the labels, not by this bound.
    "int8": 2e-1,
}
"""Largest difference that passes, relative to the largest value of the output, or to 1 where all are smaller."""


def compare_outputs(
    expected: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    *,
    runtime: RuntimeName,
    precision: Precision,
) -> tuple[OutputParity, ...]:
    """Compare the outputs of one runtime with those of torch.

    Args:
        expected: float32 array per output, first axis clips; every one is compared.
        found: The same from the other runtime.
        runtime: Which one that is.
        precision: Of its model; picks the tolerance.

    Returns:
        One entry per output. An output that is absent, has another shape or holds NaN or infinity does not
        pass: its difference is infinite.
    """
    return tuple(
        OutputParity(
            runtime=runtime,
            precision=precision,
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
