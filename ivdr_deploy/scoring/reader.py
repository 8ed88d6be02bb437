"""Reads a score table, finished or not: whoever tells what is in one does it by these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ivdr_deploy._optional import import_pyarrow
from ivdr_deploy.datasets.entries import LeftOut
from ivdr_deploy.errors import DataError, FolderError
from ivdr_deploy.scoring.index import INDEX_FILE, read_index
from ivdr_deploy.scoring.ledger import Ledger, read_ledger
from ivdr_deploy.scoring.plan import RunPlan
from ivdr_deploy.scoring.shard import SHARD_NAME, read_shard, shard_names, table_schema
from ivdr_deploy.scoring.store import Store, open_store


@dataclass(frozen=True, kw_only=True, slots=True)
class Present:
    """What is there of a table that may not be finished."""

    rows: Any
    """A ``pyarrow.Table`` of the rows of the list that was gone through last, none twice, in the order of the list; all
    that are there where no list was gone through to the end yet."""

    ledger: Ledger
    listed: int | None
    """Inputs of the list; None if it was not gone through to the end yet."""

    others: int
    """Rows that are there beside these: of inputs that the list does not have."""

    left_out: tuple[LeftOut, ...]
    """What the list passed over, by reason."""

    @property
    def complete(self) -> bool:
        """Whether every input of the list has its row, and all of the list could be read."""
        return self.rows.num_rows == self.listed and not any(entry.unread for entry in self.left_out)

    @property
    def state(self) -> str:
        """Whether every input of the list has its row, in words."""
        rows = self.rows.num_rows
        if self.complete:
            state = "complete" if rows else "complete: the list has no input for it"
        elif rows == self.listed:
            state = f"not whole: {rows} rows, and a folder of the list could not be read"
        else:
            state = f"not finished: {rows}{'' if self.listed is None else f' of {self.listed}'} rows"
        more = (
            f"; {self.others} more rows are of inputs that the list which was gone through last does not have"
        )
        return state + more * bool(self.others)


def read_scores(folder: str | Path) -> Any:
    """Read a whole score table.

    Args:
        folder: Where it is: a folder, or a URL of an object store.

    Returns:
        A ``pyarrow.Table`` with the columns of ``table_schema`` behind ``position`` (in the list, from 0): exactly one
        row per input, in input order.

    Raises:
        DataError: if the folder is no score table, is of another version, is not finished, or holds a damaged or a
            foreign Parquet file.
    """
    pa = import_pyarrow()

    store = open_store(folder)
    plan = read_ledger(store).plan
    table = _all_rows(store, plan)
    if not store.has(INDEX_FILE):
        what = f"its list was not gone through to the end; {table.num_rows} rows are there"
        raise _unfinished(store, what)
    index = read_index(store, plan)
    places = index.places(table["input_key"])
    rows = np.flatnonzero(first_of_each(places))
    if len(rows) < len(index):
        raise _unfinished(store, f"it lacks {len(index) - len(rows)} of {len(index)} rows")
    table = table.take(pa.array(rows[np.argsort(places[rows])]))
    place = table.schema.get_field_index("label")
    table = table.set_column(place, table.schema.field(place), index.labels_at(np.arange(len(index))))
    position = pa.field("position", pa.int64(), nullable=False)
    return table.add_column(0, position, pa.array(range(len(index)), pa.int64()))


def read_present(folder: str | Path, *, columns: Sequence[str]) -> Present:
    """Read ``input_key`` and some columns of the rows that are there, of a table that may not be finished.

    Raises:
        DataError: as ``read_scores``, but not for a table that is not finished.
    """
    pa = import_pyarrow()

    store = open_store(folder)
    ledger = read_ledger(store)
    table = _all_rows(store, ledger.plan, columns)
    index = read_index(store, ledger.plan) if store.has(INDEX_FILE) else None
    keys = table["input_key"].combine_chunks()
    once = first_of_each(pa.compute.index_in(keys, value_set=keys).to_numpy(zero_copy_only=False))
    places = np.arange(len(once)) if index is None else index.places(table["input_key"])
    rows = np.flatnonzero(once & (places >= 0))
    return Present(
        rows=table.take(pa.array(rows[np.argsort(places[rows])])),
        ledger=ledger,
        listed=None if index is None else len(index),
        others=int(once.sum()) - len(rows),
        left_out=() if index is None else index.left_out,
    )


def _all_rows(store: Store, plan: RunPlan, columns: Sequence[str] | None = None) -> Any:
    """Read the rows of every shard; of a kill while one was put in the place of another there may be some twice."""
    refuse_foreign(store, error=DataError)
    parts = [read_shard(store, name, plan, columns=columns) for name in shard_names(store)]
    if not parts:
        empty = table_schema(plan).empty_table()
        parts = [empty if columns is None else empty.select(["input_key", *columns])]
    return import_pyarrow().concat_tables(parts)


def _unfinished(store: Store, what: str) -> DataError:
    """Return the error for a table that lacks rows."""
    return DataError(
        f"{store} is not finished: {what}",
        hint="run the same `ivdr score` command again; it goes on where it stopped",
    )


def count_outcomes(store: Store, plan: RunPlan) -> Counter[str]:
    """Count the rows that are there by error code; ``"ok"`` stands for no error.

    Raises:
        DataError: if a shard is damaged.
    """
    counts: Counter[str] = Counter()
    for name in shard_names(store):
        codes = read_shard(store, name, plan, columns=["error_code"])["error_code"].to_pylist()
        counts.update("ok" if code is None else code for code in codes)
    return counts


def first_of_each(places: np.ndarray) -> np.ndarray:
    """Tell which rows are the first with their place; those without one (-1) are not."""
    first = np.zeros(len(places), bool)
    first[np.unique(places, return_index=True)[1]] = True
    return first & (places >= 0)


def refuse_foreign(store: Store, *, error: type[FolderError] | type[DataError]) -> None:
    """Refuse Parquet files of other origin: a reader of the folder would take them for rows of this run."""
    for name in store.names():
        # Readers of Parquet folders pass over what begins so; what a killed writer left over does. In a store a part
        # of a name may be empty.
        hidden = any(part.startswith((".", "_")) for part in name.split("/"))
        if name.endswith(".parquet") and not hidden and not SHARD_NAME.fullmatch(name):
            raise error(
                f"{store.path(name)} is not a part of the run in {store}", hint="move it out of the folder"
            )
