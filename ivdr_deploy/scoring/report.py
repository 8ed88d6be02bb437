"""What is in a score table, as figures: outcomes, labels, confidence, time; and what differs between two tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ivdr_deploy._optional import import_pyarrow
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.scoring.drift import Drift, label_psi, mmd, sample
from ivdr_deploy.scoring.table import read_present

NAMED = 20
"""Slowest and failed inputs, and differences, that a report names; the rest are counted."""

BINS = 10
_COLUMNS = (
    "video_id", "uri", "label", "error_code", "error_message", "labels", "scores",
    "num_frames", "duration_seconds", "decode_ms", "preprocess_ms", "infer_ms",
)  # fmt: skip
_VECTORS = ("feature", "inter")
_SAME_SCORE = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Figures of one table."""

    folder: str
    run: dict[str, Any]
    """The plan and when it was begun."""

    rows: int
    listed: int | None
    """Inputs of the list; None if it was not gone through to the end."""

    outcomes: dict[str, int]
    """Rows by error code, ``ok`` first, then the most frequent."""

    labels: dict[str, int]
    """Videos by their most probable label, the most frequent first."""

    confidence: dict[str, Any]
    """``mean``, ``median``, and ``bins``: videos by the probability of their label, ten equal bins from 0 to 1."""

    accuracy: dict[str, Any] | None
    """``videos`` that the list gives a label, the ``failed`` ones among them, and the share ``top1`` of all these that
    got it; None without labels."""

    seconds: dict[str, float]
    """Of video, and of decoding, preprocessing and the network over all videos."""

    slowest: tuple[dict[str, Any], ...]
    failed: tuple[dict[str, Any], ...]
    drift: Drift | None
    """Against another table, where one was given."""

    @property
    def failures(self) -> int:
        """How many inputs failed; ``failed`` names the first."""
        return self.rows - self.outcomes["ok"]


def report(folder: str | Path, *, reference: str | Path | None = None) -> Report:
    """Summarise a table, finished or not.

    Args:
        folder: Of the table.
        reference: Another table that its labels and features are held against.

    Raises:
        DataError: if a table is damaged, or none.
        ConfigError: if the tables are of different labels or outputs, so that nothing can be compared.
    """
    table, ledger, listed = read_present(folder, columns=_COLUMNS)
    rows = _columns(table, _COLUMNS)
    codes = Counter("ok" if code is None else code for code in rows["error_code"])
    best = [label for label in rows["labels"] if label is not None]
    sure = np.array([score for score in rows["scores"] if score is not None], np.float64)
    spent = [
        None if decode is None else decode + prepare + infer
        for decode, prepare, infer in zip(
            rows["decode_ms"], rows["preprocess_ms"], rows["infer_ms"], strict=True
        )
    ]
    times = ("decode_ms", "preprocess_ms", "infer_ms")
    return Report(
        folder=str(folder),
        run={"run_id": ledger.run_id, "started_at": ledger.started_at, **_facts(ledger.plan)},
        rows=table.num_rows,
        listed=listed,
        outcomes={"ok": codes.pop("ok", 0), **dict(codes.most_common())},
        labels=dict(Counter(best).most_common()),
        confidence={
            "mean": float(sure.mean()) if len(sure) else None,
            "median": float(np.median(sure)) if len(sure) else None,
            "bins": np.histogram(sure, BINS, (0.0, 1.0))[0].tolist(),
        },
        accuracy=_accuracy(rows),
        seconds={"video": float(np.nansum(_numbers(rows["duration_seconds"])))}
        | {name[:-3]: float(np.nansum(_numbers(rows[name])) / 1000.0) for name in times},
        slowest=tuple(
            {"uri": rows["uri"][place], "ms": spent[place], "num_frames": rows["num_frames"][place]}
            for place in sorted(
                (place for place, ms in enumerate(spent) if ms is not None),
                key=lambda place: -(spent[place] or 0.0),
            )[:NAMED]
        ),
        failed=tuple(
            {"uri": rows["uri"][place], "code": code, "message": rows["error_message"][place]}
            for place, code in enumerate(rows["error_code"])
            if code is not None
        )[:NAMED],
        drift=None if reference is None else _drift(folder, reference),
    )


def _columns(table: Any, names: Sequence[str]) -> dict[str, list[Any]]:
    """Return columns as lists; of ``labels`` and ``scores`` the first, None where there is none."""
    compute = import_pyarrow().compute
    first = {"labels", "scores"}
    return {
        name: (compute.list_element(table[name], 0) if name in first else table[name]).to_pylist()
        for name in names
    }


def _facts(plan: Any) -> dict[str, Any]:
    return {
        "model": f"{plan.model} {plan.model_version}",
        "variant": plan.variant,
        "runtime": plan.runtime,
        "clips": str(plan.view_plan),
        "contract_hash": plan.contract_hash,
    }


def _numbers(values: list[Any]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _accuracy(rows: dict[str, list[Any]]) -> dict[str, Any] | None:
    pairs = [
        (said, found, code)
        for said, found, code in zip(rows["label"], rows["labels"], rows["error_code"], strict=True)
        if said is not None
    ]
    if not pairs or all(label is None for label in rows["labels"]):
        return None
    return {
        "videos": len(pairs),
        "failed": sum(code is not None for _, _, code in pairs),
        "top1": sum(said == found for said, found, _ in pairs) / len(pairs),
    }


def _drift(folder: str | Path, reference: str | Path) -> Drift:
    (_, ours, _), (_, theirs, _) = (read_present(each, columns=["video_id"]) for each in (folder, reference))
    vector = next(
        (name for name in _VECTORS if name in ours.plan.outputs and name in theirs.plan.outputs), None
    )
    columns = ["labels", *([vector] if vector else [])]
    tables = [read_present(each, columns=columns)[0] for each in (folder, reference)]
    best = [Counter(label for label in _columns(table, ["labels"])["labels"] if label) for table in tables]
    if not vector and not all(best):
        raise ConfigError(
            f"{folder} and {reference} have neither labels nor the same vectors, so nothing can be compared",
            hint="score both with --output feature",
        )
    moved = None
    if vector:
        given = [table[vector].drop_null() for table in tables]
        kept = [column.take(sample(len(column))).to_pylist() for column in given]
        if all(kept) and len({len(row) for rows in kept for row in rows}) != 1:
            raise ConfigError(f"the {vector} of {folder} and of {reference} are of different lengths")
        if min(map(len, kept)) > 1:
            moved = mmd(*(np.array(rows, np.float64) for rows in kept))
    return Drift(
        reference=str(reference),
        labels_psi=label_psi(*best) if all(best) else None,
        vector=vector,
        mmd=None if moved is None else moved[0],
        mmd_by_chance=None if moved is None else moved[1],
    )


class _Row(NamedTuple):
    """What two tables are held against each other by."""

    video: str
    key: str
    uri: str
    error_code: str | None
    label: str | None
    """The most probable one, with its score."""

    score: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What differs between two tables."""

    first: str
    second: str
    plan: dict[str, str]
    """Settings that differ, each as ``first, not second``."""

    compared: int
    """Videos that are in both."""

    counts: dict[str, int]
    """Videos by what differs: ``only in the first``, ``only in the second``, ``another file``, ``outcome``, ``label``
    (the most probable one), ``scores`` (by more than the last digits)."""

    examples: dict[str, tuple[str, ...]]
    """The first uris of each."""

    largest_score_change: float
    """Of the most probable label, where it is the same."""


def difference(first: str | Path, second: str | Path) -> Difference:
    """Compare two tables, video by video.

    Raises:
        DataError: if a table is damaged, or none.
    """
    (ours, mine, _), (theirs, other, _) = (read_present(each, columns=_COLUMNS) for each in (first, second))
    names = ("video_id", "input_key", "uri", "error_code", "labels", "scores")
    left, right = (
        {row[0]: _Row(*row) for row in zip(*_columns(table, names).values(), strict=True)}
        for table in (ours, theirs)
    )
    found: dict[str, list[str]] = {
        "only in the first": [row.uri for video, row in left.items() if video not in right],
        "only in the second": [row.uri for video, row in right.items() if video not in left],
        "another file": [],
        "outcome": [],
        "label": [],
        "scores": [],
    }
    largest = 0.0
    both = [(row, right[video]) for video, row in left.items() if video in right]
    for row, its in both:
        if row.key != its.key:
            found["another file"].append(row.uri)
        if row.error_code != its.error_code:
            found["outcome"].append(row.uri)
        elif row.score is not None and its.score is not None:
            if row.label != its.label:
                found["label"].append(row.uri)
                continue
            change = abs(row.score - its.score)
            largest = max(largest, change)
            if change > _SAME_SCORE:
                found["scores"].append(row.uri)
    return Difference(
        first=str(first),
        second=str(second),
        plan=mine.plan.differences(other.plan),
        compared=len(both),
        counts={what: len(uris) for what, uris in found.items()},
        examples={what: tuple(uris[:NAMED]) for what, uris in found.items() if uris},
        largest_score_change=largest,
    )
