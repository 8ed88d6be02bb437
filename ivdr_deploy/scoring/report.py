"""What is in a score table, as figures: outcomes, labels, confidence, time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ivdr_deploy._optional import import_pyarrow
from ivdr_deploy.datasets.entries import LeftOut
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.scoring.drift import Drift, label_psi, mmd, sample
from ivdr_deploy.scoring.ledger import read_ledger
from ivdr_deploy.scoring.reader import read_present
from ivdr_deploy.scoring.store import open_store

NAMED = 20
"""Slowest and failed inputs that a report names; the rest are counted."""

BINS = 10
_COLUMNS = (
    "video_id", "uri", "label", "error_code", "error_message", "labels", "scores",
    "num_frames", "duration_seconds", "decode_ms", "preprocess_ms", "infer_ms",
)  # fmt: skip
_VECTORS = ("feature", "inter")


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Figures of one table."""

    folder: str
    run: dict[str, Any]
    """The plan and when it was begun."""

    rows: int
    listed: int | None
    """Inputs of the list; None if it was not gone through to the end."""

    state: str
    """Whether every input of the list has its row, in words."""

    left_out: tuple[LeftOut, ...]
    """What the list passed over, by reason."""

    outcomes: dict[str, int]
    """Rows by error code, ``ok`` first, then the most frequent."""

    labels: dict[str, int]
    """Videos by their most probable label, the most frequent first."""

    confidence: dict[str, Any]
    """``mean``, ``median``, and ``bins``: videos by the probability of their label, ten equal bins from 0 to 1."""

    accuracy: dict[str, Any] | None
    """``videos`` that the list gives a label, the ``failed`` ones among them, and the share ``top1`` of all these that
    got it; None without labels, and where it cannot be told whether the model gives any."""

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
    found = read_present(folder, columns=_COLUMNS)
    ledger, rows = found.ledger, first_of_lists(found.rows, _COLUMNS)
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
        rows=found.rows.num_rows,
        listed=found.listed,
        state=found.state,
        left_out=found.left_out,
        outcomes={"ok": codes.pop("ok", 0), **dict(codes.most_common())},
        labels=dict(Counter(best).most_common()),
        confidence={
            "mean": float(sure.mean()) if len(sure) else None,
            "median": float(np.median(sure)) if len(sure) else None,
            "bins": np.histogram(sure, BINS, (0.0, 1.0))[0].tolist(),
        },
        accuracy=_accuracy(rows, only_vectors=bool(ledger.plan.outputs) and not best),
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


def first_of_lists(table: Any, names: Sequence[str]) -> dict[str, list[Any]]:
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


def _accuracy(rows: dict[str, list[Any]], *, only_vectors: bool) -> dict[str, Any] | None:
    pairs = [
        (said, found, code)
        for said, found, code in zip(rows["label"], rows["labels"], rows["error_code"], strict=True)
        if said is not None
    ]
    if not pairs or only_vectors:
        return None
    return {
        "videos": len(pairs),
        "failed": sum(code is not None for _, _, code in pairs),
        "top1": sum(said == found for said, found, _ in pairs) / len(pairs),
    }


def _drift(folder: str | Path, reference: str | Path) -> Drift:
    plans = [read_ledger(open_store(each)).plan for each in (folder, reference)]
    vector = next((name for name in _VECTORS if all(name in plan.outputs for plan in plans)), None)
    columns = ["labels", *([vector] if vector else [])]
    present = [read_present(each, columns=columns) for each in (folder, reference)]
    tables = [each.rows for each in present]
    best = [Counter(filter(None, first_of_lists(table, ["labels"])["labels"])) for table in tables]
    moved: tuple[float, float] | None = None
    with_vector = [0, 0]
    if vector:
        given = [table[vector].drop_null() for table in tables]
        with_vector = [*map(len, given)]
        kept = [column.take(sample(len(column))).to_pylist() for column in given]
        if all(kept) and len({len(row) for rows in kept for row in rows}) != 1:
            raise ConfigError(f"the {vector} of {folder} and of {reference} are of different lengths")
        if min(map(len, kept)) > 1:
            moved = mmd(*(np.array(rows, np.float64) for rows in kept))
    if moved is None and not all(best):
        raise ConfigError(
            f"{folder} ({present[0].state}) and {reference} ({present[1].state}) have neither labels nor the same "
            "vectors of two videos each, so nothing can be compared",
            hint="score both with --output feature, to their end",
        )
    return Drift(
        reference=str(reference),
        reference_state=present[1].state,
        labelled=(best[0].total(), best[1].total()),
        with_vector=(with_vector[0], with_vector[1]),
        labels_psi=label_psi(*best) if all(best) else None,
        vector=vector,
        mmd=None if moved is None else moved[0],
        mmd_by_chance=None if moved is None else moved[1],
    )
