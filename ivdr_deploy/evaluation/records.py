"""What was measured on one variant: kept in the bundle, and enough to judge it again without running anything."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivdr_deploy import __version__
from ivdr_deploy._files import read_bounded
from ivdr_deploy._text import reason_of
from ivdr_deploy.artifacts.bundle import Bundle, changed_bundle, open_bundle
from ivdr_deploy.artifacts.manifest import OutputParity, Variant
from ivdr_deploy.artifacts.verification import Verification
from ivdr_deploy.errors import ArtifactError, ConfigError, FolderError
from ivdr_deploy.evaluation.invariance import BatchInvariance, Sensitivity
from ivdr_deploy.records import from_dict, parse_json, require_range, to_dict
from ivdr_deploy.spec import Precision

if TYPE_CHECKING:
    from ivdr_deploy.evaluation.verify_report import VariantReport

_MOST_BYTES = 1 << 30
"""Of a record: some 200 for each video."""

_HINT = "verify the bundle again: `ivdr verify BUNDLE --videos LIST`"


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoColumns:
    """One value per compared video, in the order of the list. A column that does not apply is empty."""

    uris: tuple[str, ...] = ()
    truth: tuple[str, ...] = ()
    """Labels of the list; empty unless every video has one."""

    expected: tuple[str, ...] = ()
    """Label that the reference gives; these five are empty without a classifier."""

    found: tuple[str, ...] = ()
    margins: tuple[float, ...] = ()
    """How much more probable the reference finds its own label than the variant's; 0 where they are the same."""

    expected_confidence: tuple[float, ...] = ()
    """Probability that the reference gives to its label."""

    confidence: tuple[float, ...] = ()
    expected_hits: tuple[bool, ...] = ()
    """Whether the nearest other video is of the same class, by the reference's ``feature``; empty without labels."""

    hits: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        columns = (getattr(self, column.name) for column in fields(self))
        if any(len(column) not in (0, len(self.uris)) for column in columns):
            raise ConfigError(f"columns of different lengths for {len(self.uris)} videos")
        require_range("margin of a video", *self.margins, most=1.0)
        require_range("confidence of a video", *self.expected_confidence, *self.confidence, most=1.0)
        for together in (
            ("expected", "found", "margins", "expected_confidence", "confidence"),
            ("expected_hits", "hits"),
        ):
            if len({bool(getattr(self, name)) for name in together}) > 1:
                raise ConfigError(
                    f"of the columns {', '.join(together)} some are empty, so nothing can be compared"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantRecord:
    """All that one run of ``verify`` measured on one variant. It holds no verdict: thresholds change."""

    variant: str
    """Id of the variant."""

    variant_sha256: str
    """Digest over its files."""

    precision: Precision
    reference: str
    """Id of what it was held against; its own where it is the reference, empty where only golden clips were run."""

    runtime: str
    """What ran: library, version, device, precision."""

    view_plan: str
    decoder: str
    data: str
    """The list of videos; empty for golden clips alone."""

    measured_at: str
    """UTC time, ISO 8601."""

    ivdr_version: str = __version__
    tolerance: float
    """Largest relative difference that passed then: each ``OutputParity`` holds what that was in its own unit."""

    golden: tuple[OutputParity, ...]
    """Against the recorded outputs."""

    outputs: tuple[OutputParity, ...] = ()
    """Against the reference, over every clip of the videos; empty for the reference itself."""

    failure: str = ""
    """What it raised first, and on what: its opening, the golden clips, videos, batches. Empty where it ran through."""

    not_finite: int = 0
    """Videos for which it gave NaN or infinity, or nothing since it raised."""

    bad_videos: int = 0
    """Listed videos that could not be used."""

    batch: BatchInvariance | None = None
    """None where there were no clips to run."""

    sensitivity: tuple[Sensitivity, ...] = ()
    videos: VideoColumns = field(default_factory=VideoColumns)

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < math.inf:
            raise ConfigError(f"the tolerance {self.tolerance:g} cannot have been judged by")

    @property
    def is_reference(self) -> bool:
        """Whether the others are held against it."""
        return self.variant == self.reference


def now() -> str:
    """Return the present time as records hold it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def finite_differences(values: Any) -> Any:
    """Return a report or record as JSON can hold it: an infinite difference (a broken output) becomes null."""
    if isinstance(values, dict):
        return {name: finite_differences(value) for name, value in values.items()}
    if isinstance(values, list):
        return [finite_differences(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def read_record(bundle: Bundle, variant: Variant) -> VariantRecord:
    """Read the record of a variant.

    Raises:
        ArtifactError: if the bundle holds none, or one that is not readable or belongs to something else.
    """
    held = variant.verification
    if held is None or held.record not in {entry.path for entry in bundle.manifest.files}:
        raise ArtifactError(f"{bundle.path} holds no record of a verification of {variant.id}", hint=_HINT)
    path = bundle.path / held.record
    try:
        values = parse_json(read_bounded(path, _MOST_BYTES))
        _restore(values)
        record = from_dict(VariantRecord, values, where=str(path))
    except (ConfigError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is not the record of a verification ({reason_of(error, most=300)})", hint=_HINT
        ) from error
    if (record.variant, record.variant_sha256) != (variant.id, held.variant_sha256):
        raise ArtifactError(f"{path} belongs to another variant than {variant.id}", hint=_HINT)
    return record


def keep_records(path: str | Path, reports: Sequence[VariantReport]) -> Bundle:
    """Put what was measured over videos, and the verdict, into the bundle; the bundle changes as a whole.

    Args:
        path: The bundle.
        reports: Of its variants; those that did not run, or saw no video, are passed over.

    Raises:
        FolderError: if the bundle was changed while it was judged, or holds files that are not its own.
    """
    bundle = open_bundle(path)
    kept = {report.id: report for report in reports if report.record and report.record.videos.uris}
    held = {variant.id: variant for variant in bundle.manifest.variants}
    for name, report in kept.items():
        assert report.record is not None
        if name not in held or bundle.manifest.variant_sha256(held[name]) != report.record.variant_sha256:
            raise FolderError(
                f"{bundle.path} was changed while it was verified: {name} is another one now",
                hint="run the same command again",
            )
    if not kept:
        return bundle
    with changed_bundle(bundle) as draft:
        for place, variant in enumerate(draft.variants):
            if (found := kept.get(variant.id)) is None or found.record is None:
                continue
            name = _file_name(variant)
            values = finite_differences(to_dict(found.record))
            text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            draft.add_file(name, kind="record").write_text(text + "\n", encoding="utf-8")
            draft.variants[place] = replace(variant, verification=_summary(name, found, found.record))
    return open_bundle(path)


def _file_name(variant: Variant) -> str:
    """Name the file of a record; an id comes from the manifest, and need not be the name of a file."""
    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", variant.id)
    return f"verify-{variant.id if plain else hashlib.sha256(variant.id.encode()).hexdigest()[:16]}.json"


def _summary(name: str, report: VariantReport, record: VariantRecord) -> Verification:
    return Verification(
        record=name,
        variant_sha256=record.variant_sha256,
        passed=report.passed,
        failed=tuple(check.name for check in report.checks if not check.passed),
        videos=len(record.videos.uris),
        bad_videos=record.bad_videos,
        data=Path(record.data).name,
        measured_at=record.measured_at,
        runtime=record.runtime,
        figures=report.figures(),
    )


def _restore(values: dict[str, Any]) -> None:
    """Undo ``finite_differences``."""
    batch = values["batch"] or {"outputs": []}
    for entry in (*values["golden"], *values["outputs"], *batch["outputs"]):
        if entry["max_abs_diff"] is None:
            entry["max_abs_diff"] = math.inf
