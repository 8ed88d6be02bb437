"""What a manifest keeps of a verification over videos: the verdict, and the figures that people ask for.

Standard library only. The whole record, from which ``ivdr verify --recheck`` judges again, is a file of the bundle: see
``evaluation.records``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ivdr_deploy._text import QUOTED, one_line, quoted
from ivdr_deploy.records import require_plain

FIGURES: dict[str, str] = {
    "max_relative_diff": "largest difference, by size",
    "min_cosine": "smallest cosine",
    "agreement": "same label as the reference",
    "flips": "flips",
    "accuracy": "accuracy",
    "accuracy_change": "change of accuracy",
    "accuracy_change_low": "its interval, low",
    "accuracy_change_high": "its interval, high",
    "recall": "R@1",
    "recall_change": "change of R@1",
    "recall_change_low": "its interval, low",
    "recall_change_high": "its interval, high",
    "mean_confidence": "mean confidence",
    "confidence_shift": "change of mean confidence",
    "ece": "calibration error (ECE)",
    "abstain_crossings": "videos that cross the abstain threshold",
    "batch_flips": "flips over batch sizes and places",
    "batch_relative_diff": "largest difference over batch sizes and places, by size",
    "sensitivity": "a real change moves the outputs by this many parity errors",
}
"""Name -> meaning of what ``Verification.figures`` may hold. What does not apply, or is infinite, is left out."""


_NAMED = 13
"""Checks that are named when they failed: all that there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """The verdict of ``ivdr verify`` on one variant, over videos, under the thresholds of the version that gave it."""

    record: str
    """File of the bundle that holds all that was measured; an archive does not carry it, since it names the videos."""

    variant_sha256: str
    """Digest over the files of the variant, see ``ArtifactManifest.variant_sha256``: it belongs to these alone."""

    passed: bool
    failed: tuple[str, ...] = ()
    """Names of the checks that it did not pass."""

    videos: int
    """Videos that were compared."""

    bad_videos: int = 0
    """Videos of the list that could not be used."""

    data: str
    """Name of the list, without its folder."""

    measured_at: str
    """UTC time, ISO 8601."""

    runtime: str
    """What ran: library, version, device, precision."""

    figures: dict[str, float] = field(default_factory=dict)
    """See ``FIGURES``. Shares and probabilities are in 0..1."""

    def __post_init__(self) -> None:
        require_plain("record of a verification", self.record)
        require_plain("runtime", self.runtime)
        require_plain("time", self.measured_at)

    def __str__(self) -> str:
        over = f"{quoted(self.videos)} videos of {one_line(self.data[:QUOTED])}"
        if self.bad_videos:
            over += f" ({quoted(self.bad_videos)} more could not be used)"
        more = f" and {len(self.failed) - _NAMED} more" if len(self.failed) > _NAMED else ""
        failed = one_line(", ".join(name[:QUOTED] for name in self.failed[:_NAMED])) + more
        return f"PASS over {over}" if self.passed else f"FAIL ({failed}) over {over}"


def describe_figures(figures: dict[str, float]) -> list[tuple[str, str]]:
    """Return what was measured as (name, text) for people, changes with their intervals."""
    rows = []
    for name, meaning in FIGURES.items():
        if name not in figures or name.endswith(("_low", "_high")):
            continue
        text = _text(name, figures[name])
        low, high = figures.get(f"{name}_low"), figures.get(f"{name}_high")
        if low is not None and high is not None:
            text += f" [{low:+.1%}, {high:+.1%}]"
        rows.append((meaning, text))
    return rows


def _text(name: str, value: float) -> str:
    if name in ("flips", "batch_flips", "abstain_crossings"):
        return f"{value:.0f}"
    if name in ("agreement", "accuracy", "recall"):
        return f"{value:.1%}"
    if name in ("accuracy_change", "recall_change"):
        return f"{value:+.1%}"
    if name == "min_cosine":
        return f"{value:.6f}"
    if name in ("mean_confidence", "ece"):
        return f"{value:.4f}"
    return f"{value:.2e}" if name.endswith(("_diff", "_shift")) else f"{value:.3g}"
