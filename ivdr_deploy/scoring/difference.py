"""What differs between two score tables, in plan and in rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ivdr_deploy._optional import import_pyarrow
from ivdr_deploy.errors import DataError
from ivdr_deploy.scoring.ledger import read_ledger
from ivdr_deploy.scoring.reader import read_present
from ivdr_deploy.scoring.report import first_of_lists
from ivdr_deploy.scoring.store import open_store

NAMED = 20
"""Videos that are named for each kind of difference; the rest are counted."""

_SAME_SCORE = 1e-5
_SAME_VECTOR = 1e-4
"""Of the largest number of a vector."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What differs between two tables."""

    first: str
    second: str
    first_state: str
    """Whether every input of the list has its row, in words."""

    second_state: str
    complete: bool
    """Whether that is so of both: a row that is not there yet is not compared."""

    plan: dict[str, str]
    """Settings that differ, each as ``first, not second``."""

    compared: int
    """Videos that are in both."""

    counts: dict[str, int]
    """Videos by what differs: ``only in the first``, ``only in the second``, ``another file``, ``outcome``, ``label``
    (the most probable one), ``scores`` and ``vectors`` (by more than the last digits)."""

    examples: dict[str, tuple[str, ...]]
    """The first uris of each."""

    largest_score_change: float | None
    """Of the most probable label, where it is the same; None where no video has one in both."""


def difference(first: str | Path, second: str | Path) -> Difference:
    """Compare two tables, video by video.

    Raises:
        DataError: if a table is damaged, or none, or neither has a row.
    """
    compute = import_pyarrow().compute
    plans = [read_ledger(open_store(each)).plan for each in (first, second)]
    vectors = [name for name in plans[0].outputs if name in plans[1].outputs]
    columns = ["video_id", "uri", "error_code", "labels", "scores", *vectors]
    ours, theirs = (read_present(each, columns=columns) for each in (first, second))
    if not ours.rows.num_rows and not theirs.rows.num_rows:
        raise DataError(
            f"neither {first} ({ours.state}) nor {second} ({theirs.state}) has a row, so nothing can be compared"
        )
    videos, others = (each.rows["video_id"].combine_chunks() for each in (ours, theirs))
    places = compute.index_in(videos, value_set=others)
    mine, its = ours.rows.filter(places.is_valid()), theirs.rows.take(places.drop_null())
    found: dict[str, list[str]] = {
        "only in the first": ours.rows.filter(places.is_null())["uri"].to_pylist(),
        "only in the second": theirs.rows.filter(compute.invert(compute.is_in(others, value_set=videos)))[
            "uri"
        ].to_pylist(),
        **{what: [] for what in ("another file", "outcome", "label", "scores", "vectors")},
    }
    largest: float | None = None
    names = ("input_key", "error_code", "labels", "scores")
    rows, theirs_rows = (zip(*first_of_lists(table, names).values(), strict=True) for table in (mine, its))
    moved = _moved(mine, its, vectors)
    for uri, (key, code, label, score), (its_key, its_code, its_label, its_score), elsewhere in zip(
        mine["uri"].to_pylist(), rows, theirs_rows, moved, strict=True
    ):
        if key != its_key:
            found["another file"].append(uri)
        if code != its_code:
            found["outcome"].append(uri)
            continue
        if elsewhere:
            found["vectors"].append(uri)
        if label != its_label:
            found["label"].append(uri)
        elif score is not None and its_score is not None:
            change = abs(score - its_score)
            largest = max(largest or 0.0, change)
            if change > _SAME_SCORE:
                found["scores"].append(uri)
    return Difference(
        first=str(first),
        second=str(second),
        first_state=ours.state,
        second_state=theirs.state,
        complete=ours.complete and theirs.complete,
        plan=plans[0].differences(plans[1]),
        compared=mine.num_rows,
        counts={what: len(uris) for what, uris in found.items()},
        examples={what: tuple(uris[:NAMED]) for what, uris in found.items() if uris},
        largest_score_change=largest,
    )


def _moved(ours: Any, theirs: Any, names: list[str]) -> Iterator[bool]:
    """Tell of each row of two tables of equal length whether one of some vectors is another one."""
    for place in range(ours.num_rows):
        pairs = ((_numbers(ours[name][place]), _numbers(theirs[name][place])) for name in names)
        yield any(
            one.shape != other.shape
            or np.abs(one - other).max(initial=0.0) > _SAME_VECTOR * np.abs(one).max(initial=0.0)
            for one, other in pairs
        )


def _numbers(vector: Any) -> np.ndarray:
    """Return the numbers of a list of a table, however deep they lie; none of null."""
    values = vector.values
    while values is not None and hasattr(values, "flatten") and import_pyarrow().types.is_list(values.type):
        values = values.flatten()
    return np.empty(0, np.float32) if values is None else values.to_numpy(zero_copy_only=False)
