"""From what was measured to a verdict: the same for a run and for ``--recheck`` of a record, check by check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ivdr_deploy.artifacts.manifest import OutputParity
from ivdr_deploy.evaluation.confidence import ConfidenceParity, compare_confidence
from ivdr_deploy.evaluation.invariance import BatchInvariance
from ivdr_deploy.evaluation.metrics import Accuracy
from ivdr_deploy.evaluation.paired import PairedChange
from ivdr_deploy.evaluation.records import VariantRecord
from ivdr_deploy.evaluation.thresholds import Thresholds
from ivdr_deploy.evaluation.verify_report import Check, Flip, VariantReport
from ivdr_deploy.runtimes.compare import describe_failures


def judge(record: VariantRecord, thresholds: Thresholds) -> VariantReport:
    """Judge what was measured on one variant.

    Args:
        record: The measurements.
        thresholds: For its precision, or others.

    Returns:
        The verdict with every check that applies. The reference is judged as well: by its golden clips, for NaN, over
        batches, and for answers that do not depend on the input.
    """
    scale = thresholds.tolerance / record.tolerance
    videos = record.videos
    right = _right(videos.found, videos.truth)
    expected_right = _right(videos.expected, videos.truth)
    flips = tuple(
        Flip(uri=uri, expected=old, found=new, margin=margin)
        for uri, old, new, margin in zip(
            videos.uris, videos.expected, videos.found, videos.margins, strict=False
        )
        if old != new
    )
    confidence = None
    if videos.confidence:
        confidence = compare_confidence(
            videos.uris,
            videos.expected_confidence,
            videos.confidence,
            expected_right=expected_right,
            right=right,
            abstain=thresholds.abstain,
            tie_margin=thresholds.tie_margin,
        )
    compared = not record.is_reference
    report = VariantReport(
        id=record.variant,
        description=record.runtime,
        thresholds=thresholds,
        golden=_at(record.golden, scale),
        parity=_at(record.outputs, scale),
        agreement=Accuracy(len(videos.found) - len(flips), len(videos.found))
        if videos.found and compared
        else None,
        flips=flips,
        accuracy=Accuracy(sum(right), len(right)) if right else None,
        accuracy_change=PairedChange.between(expected_right, right) if right and compared else None,
        recall=Accuracy(sum(videos.hits), len(videos.hits)) if videos.hits else None,
        recall_change=PairedChange.between(videos.expected_hits, videos.hits)
        if videos.hits and compared
        else None,
        confidence=confidence,
        record=record,
    )
    return replace(report, checks=tuple(_checks(report, record, thresholds, scale)))


def _checks(
    report: VariantReport, record: VariantRecord, limits: Thresholds, scale: float
) -> Iterator[Check]:
    if record.failure:
        yield Check(name="runs", passed=False, text=f"it failed {record.failure}, expected to run through")
    yield from _parity_checks("golden", report.golden, "the recorded outputs of the golden clips", limits)
    yield from _parity_checks("outputs", report.parity, "the reference's outputs", limits)
    if record.videos.uris:
        yield Check(
            name="finite",
            passed=not record.not_finite,
            text=f"NaN, infinity or nothing for {record.not_finite} videos, expected none",
        )
    if report.agreement is not None:
        yield from _label_checks(report, limits)
    for name, what, change in (
        ("accuracy", "accuracy", report.accuracy_change),
        ("recall", "R@1", report.recall_change),
    ):
        if change is not None:
            low, high = change.interval
            text = f"{what} changed by {change.value:+.1%} [{low:+.1%}, {high:+.1%}], may fall by {limits.max_drop:.1%}"
            yield Check(name=name, passed=high >= -limits.max_drop, text=text)
    if report.confidence is not None and not record.is_reference:
        yield from _confidence_checks(report.confidence, len(record.videos.uris), limits)
    if record.batch is not None:
        batch, outputs = record.batch, _at(record.batch.outputs, scale)
        tied = batch.max_flip_margin <= limits.tie_margin
        text = f"{batch.flips} flips of {batch.clips} clips over {_covered(batch)}"
        if batch.flips:
            text += f", with a margin of up to {batch.max_flip_margin:.4f} (a tie is {limits.tie_margin:g})"
        if differing := describe_failures(outputs):
            text += f"; {differing}"
        yield Check(name="batch", passed=tied and not differing, text=text)
    if record.sensitivity:
        least = min(record.sensitivity, key=lambda entry: entry.ratio)
        yield Check(
            name="sensitivity",
            passed=least.ratio >= limits.min_sensitivity,
            text=f"a real change of the input moves {least.output} by {least.moved:.1e}, {least.ratio:.3g} times the "
            f"parity error {least.error:.1e}, expected {limits.min_sensitivity:g} times",
        )


def _parity_checks(
    name: str, entries: Sequence[OutputParity], against: str, limits: Thresholds
) -> Iterator[Check]:
    if not entries:
        return
    failures = describe_failures(tuple(entries))
    yield Check(name=name, passed=not failures, text=failures or f"within the tolerance of {against}")
    if name == "outputs":
        least = min(entries, key=lambda entry: entry.min_cosine)
        yield Check(
            name="cosine",
            passed=least.min_cosine >= limits.min_cosine,
            text=f"smallest cosine {least.min_cosine:.6f} ({least.output}), expected {limits.min_cosine:g}",
        )


def _label_checks(report: VariantReport, limits: Thresholds) -> Iterator[Check]:
    assert report.agreement is not None
    total = report.agreement.total
    real = [flip for flip in report.flips if flip.margin > limits.tie_margin]
    share, ties = (total - len(real)) / total, len(report.flips) - len(real)
    yield Check(
        name="agreement",
        passed=share >= limits.min_agreement,
        text=f"{total - len(real)} of {total} videos have the reference's label ({share:.1%}, {ties} ties included), "
        f"expected {limits.min_agreement:.1%}",
    )
    surest = max((flip.margin for flip in report.flips), default=0.0)
    yield Check(
        name="sure_flips",
        passed=surest <= limits.max_flip_margin,
        text=f"the surest label that flipped has a margin of {surest:.4f}, expected at most {limits.max_flip_margin:g}",
    )


def _confidence_checks(found: ConfidenceParity, videos: int, limits: Thresholds) -> Iterator[Check]:
    yield Check(
        name="confidence",
        passed=abs(found.shift) <= limits.max_confidence_shift,
        text=f"the mean confidence went from {found.expected_mean:.4f} to {found.mean:.4f}, expected within "
        f"{limits.max_confidence_shift:g}",
    )
    share = (videos - len(found.crossings)) / videos
    yield Check(
        name="abstain",
        passed=share >= limits.min_agreement,
        text=f"{len(found.crossings)} of {videos} videos cross the confidence {found.abstain:g}, expected at most "
        f"{1 - limits.min_agreement:.1%}",
    )


def _covered(batch: BatchInvariance) -> str:
    """Say which sizes and places were tried."""
    parts = []
    if batch.sizes:
        parts.append(f"batches of {', '.join(map(str, batch.sizes))} at every place")
    if batch.calls:
        calls = ", ".join(f"{call.place + 1} of {call.size}" for call in batch.calls)
        parts.append(f"calls over the videos (place {calls})")
    text = " and ".join(parts)
    if batch.left_out:
        text += f"; {', '.join(map(str, batch.left_out))} left out for time"
    return text


def _right(labels: Sequence[str], truth: Sequence[str]) -> list[bool]:
    """Say which labels are right; empty where there is nothing to compare."""
    return [label == wanted for label, wanted in zip(labels, truth, strict=True)] if labels and truth else []


def _at(entries: Sequence[OutputParity], scale: float) -> tuple[OutputParity, ...]:
    """Return comparisons under another tolerance."""
    return tuple(replace(entry, tolerance=entry.tolerance * scale) for entry in entries)
