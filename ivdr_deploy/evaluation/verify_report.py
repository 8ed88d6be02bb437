"""What ``verify`` found: the verdict on a bundle and on each of its variants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ivdr_deploy.artifacts.manifest import OutputParity
from ivdr_deploy.evaluation.metrics import Accuracy
from ivdr_deploy.records import to_dict


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
    """A listed video that no variant saw."""

    uri: str
    code: str
    message: str
    hint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantReport:
    """What was found about one variant."""

    id: str
    description: str = ""
    not_run: str = ""
    """Why it could not run here; empty when it ran."""

    golden: tuple[OutputParity, ...] = ()
    """Against the recorded outputs."""

    parity: tuple[OutputParity, ...] = ()
    """Against the reference, over every clip of the listed videos; empty for the reference itself."""

    agreement: Accuracy | None = None
    """Videos with the same label as from the reference."""

    flips: tuple[Flip, ...] = ()
    flip_margin: float = 0.0
    """Largest margin of a flip that passes: between labels as close as this the precision decides."""

    accuracy: Accuracy | None = None
    """Video accuracy, when the list has labels."""

    retrieval: Accuracy | None = None
    """R@1 among the listed videos with ``feature``, when the list has labels."""

    @property
    def passed(self) -> bool:
        """Whether it ran, every difference is within tolerance and every flip is within its margin."""
        agrees = all(entry.passed for entry in (*self.golden, *self.parity))
        return not self.not_run and agrees and all(flip.margin <= self.flip_margin for flip in self.flips)


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

    bad_videos: tuple[BadVideo, ...]
    decode_mean_diff: Mapping[str, float]
    """How far the decoder is from the recorded clips of each golden video, in levels."""

    variants: tuple[VariantReport, ...]

    @property
    def passed(self) -> bool:
        """Whether every variant that was to be judged ran and passed."""
        return all(variant.passed for variant in self.variants)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it, with ``passed`` added for the whole and for each variant."""
        variants = []
        for variant in self.variants:
            values = to_dict(variant)
            for name in ("agreement", "accuracy", "retrieval"):
                measured: Accuracy | None = getattr(variant, name)
                values[name] = measured.to_dict() if measured is not None else None
            for entry in (*values["golden"], *values["parity"]):
                # An absent or broken output differs infinitely, which JSON cannot say.
                entry["max_abs_diff"] = (
                    entry["max_abs_diff"] if math.isfinite(entry["max_abs_diff"]) else None
                )
            variants.append({**values, "passed": variant.passed})
        return {**to_dict(self), "variants": variants, "passed": self.passed}
