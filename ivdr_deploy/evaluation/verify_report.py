"""What ``verify`` found: the verdict on a bundle and on each of its variants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ivdr_deploy.artifacts.manifest import OutputParity
from ivdr_deploy.evaluation.confidence import ConfidenceParity
from ivdr_deploy.evaluation.metrics import Accuracy
from ivdr_deploy.evaluation.paired import PairedChange
from ivdr_deploy.evaluation.records import VariantRecord, finite_differences
from ivdr_deploy.evaluation.thresholds import Thresholds
from ivdr_deploy.records import to_dict


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that a variant was judged by."""

    name: str
    """``runs`` (only where it did not), ``golden``, ``outputs``, ``cosine``, ``finite``, ``agreement``, ``sure_flips``,
    ``accuracy``, ``recall``, ``confidence``, ``abstain``, ``batch`` or ``sensitivity``."""

    passed: bool
    text: str
    """What was found and what was expected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flip:
    """A video to which a variant gives another label than the reference does."""

    uri: str
    expected: str
    """The reference's label."""

    found: str
    margin: float
    """How much more probable the reference finds its own label than the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadVideo:
    """A listed video that was not compared: it cannot be read, or the reference fails on it."""

    uri: str
    code: str
    message: str
    hint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantReport:
    """What was found about one variant, and what it was judged by; see ``judging.judge``."""

    id: str
    description: str = ""
    not_run: str = ""
    """Why it could not run here; empty when it ran."""

    thresholds: Thresholds | None = None
    checks: tuple[Check, ...] = ()
    golden: tuple[OutputParity, ...] = ()
    """Against the recorded outputs."""

    parity: tuple[OutputParity, ...] = ()
    """Against the reference, over every clip of the listed videos; empty for the reference itself."""

    agreement: Accuracy | None = None
    """Videos with the same label as from the reference."""

    flips: tuple[Flip, ...] = ()
    accuracy: Accuracy | None = None
    """Video accuracy, when the list has labels."""

    accuracy_change: PairedChange | None = None
    """Against the reference, on the same videos."""

    recall: Accuracy | None = None
    """R@1 among the listed videos with ``feature``, when the list has labels."""

    recall_change: PairedChange | None = None
    confidence: ConfidenceParity | None = None
    record: VariantRecord | None = None
    """What all of this was taken from; None where it did not run."""

    @property
    def passed(self) -> bool:
        """Whether it ran, was judged by something, and passed every check."""
        return not self.not_run and bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that it did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def figures(self) -> dict[str, float]:
        """Return the figures that a manifest keeps; see ``artifacts.verification.FIGURES``."""
        compared, record = self.parity or self.golden, self.record
        assert record is not None
        assert self.thresholds is not None
        tolerance, confidence, batch = self.thresholds.tolerance, self.confidence, record.batch
        figures: dict[str, float | None] = {
            "max_relative_diff": _relative(compared, tolerance),
            "min_cosine": min((entry.min_cosine for entry in compared), default=None),
            "sensitivity": min((entry.ratio for entry in record.sensitivity), default=None),
        }
        if self.agreement is not None:
            figures |= {"agreement": self.agreement.value, "flips": len(self.flips)}
        if self.accuracy is not None:
            figures["accuracy"] = self.accuracy.value
        if self.recall is not None:
            figures["recall"] = self.recall.value
        if batch is not None:
            figures |= {
                "batch_flips": batch.flips,
                "batch_relative_diff": _relative(batch.outputs, tolerance),
            }
        if confidence is not None:
            figures |= {"mean_confidence": confidence.mean, "ece": confidence.ece}
        if confidence is not None and not record.is_reference:
            figures |= {"confidence_shift": confidence.shift, "abstain_crossings": len(confidence.crossings)}
        for name, change in (
            ("accuracy_change", self.accuracy_change),
            ("recall_change", self.recall_change),
        ):
            if change is not None:
                low, high = change.interval
                figures |= {name: change.value, f"{name}_low": low, f"{name}_high": high}
        return {
            name: float(value)
            for name, value in figures.items()
            if value is not None and math.isfinite(value)
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class SkewedVideo:
    """One video as two decoders read it."""

    uri: str
    mean_diff: float | None
    """Largest mean difference of a frame of its clips, in levels of 0 to 255; None where ``error`` says why."""

    expected: str
    """Label from PyAV's clips; empty without a classifier, or where they differ in number."""

    found: str
    """Label from OpenCV's."""

    error: str = ""
    """Why one of them cannot read it, or nothing was compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """The verdict on one bundle."""

    bundle: str
    name: str
    version: str
    contract_hash: str
    view_plan: str
    data: str | None
    videos: int
    """Videos that every variant saw."""

    bad_videos: tuple[BadVideo, ...] = ()
    decode_mean_diff: Mapping[str, float] = field(default_factory=dict)
    """How far the decoder is from the recorded clips of each golden video, in levels."""

    skew: tuple[SkewedVideo, ...] = ()
    """PyAV beside OpenCV, where it was asked for. It is no fault of a variant, and not judged."""

    variants: tuple[VariantReport, ...]
    not_named: tuple[str, ...] = ()
    """Ids of the bundle's other variants, which were not asked for and are not judged."""

    @property
    def unusable(self) -> int:
        """Listed videos that could not be used: in this run, or in the one whose records were judged again."""
        recorded = (variant.record.bad_videos for variant in self.variants if variant.record is not None)
        return max([len(self.bad_videos), *recorded])

    @property
    def passed(self) -> bool:
        """Whether every variant that was to be judged, at least one, ran and passed."""
        return bool(self.variants) and all(variant.passed for variant in self.variants)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it, with ``passed`` added for the whole and for each variant.

        Of the records it holds all but the columns of the videos, which are in the bundle.
        """
        variants = []
        for variant in self.variants:
            values = to_dict(variant)
            for name in ("agreement", "accuracy", "accuracy_change", "recall", "recall_change"):
                measured: Accuracy | PairedChange | None = getattr(variant, name)
                values[name] = measured.to_dict() if measured is not None else None
            if values["record"] is not None:
                del values["record"]["videos"]
            variants.append({**values, "passed": variant.passed})
        return finite_differences({**to_dict(self), "variants": variants, "passed": self.passed})  # type: ignore[no-any-return]


def _relative(entries: tuple[OutputParity, ...], tolerance: float) -> float | None:
    """Return the largest difference by the size of the values, as a tolerance of a precision is."""
    return max((entry.max_abs_diff / entry.tolerance * tolerance for entry in entries), default=None)
