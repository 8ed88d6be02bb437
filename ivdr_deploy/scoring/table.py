"""The score table on disk: shards of rows, a ledger, and an index of the list; a row is either complete or absent.

::

    OUT/_run.json                               the ledger: which model and options these rows are of
    OUT/_inputs.parquet                         the index: the inputs of the list that was gone through last, in order
    OUT/_run.lock                               held while a process writes here; not in an object store
    OUT/_attempt-<digest>.json                  a shard that was begun and is not there yet, see ``attempts``
    OUT/part-000000320-<digest>.parquet         one shard: the place in the list where it begins, its keys

A row belongs to an input key: an input whose key has no row is scored, and a row whose key is not in the index is
dropped when all others are there. So the list may change between two runs. Names that begin with ``_`` or ``.`` are
skipped by the usual readers of Parquet folders, so that ``pyarrow.parquet.read_table(OUT)`` works as well;
``read_scores`` gives the rows in the order of the list, and checks that none is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ivdr_deploy._optional import import_pyarrow
from ivdr_deploy.artifacts.kinds import SCORE_LEDGER_FILE as LEDGER_FILE
from ivdr_deploy.errors import DataError, FolderError
from ivdr_deploy.scoring.index import INDEX_FILE, Index, read_index, write_index
from ivdr_deploy.scoring.ledger import Ledger, claim_run, read_ledger
from ivdr_deploy.scoring.plan import RunPlan
from ivdr_deploy.scoring.shard import (
    SHARD_NAME,
    Shard,
    keys_digest,
    read_shard,
    shard_bytes,
    shard_metadata,
    table_schema,
)
from ivdr_deploy.scoring.store import Store, open_store


class ScoreTable:
    """A table that this process writes; made by ``open_table``."""

    def __init__(self, store: Store, plan: RunPlan, *, manifest: Mapping[str, Any]) -> None:
        self.store = store
        self.plan = plan
        self.done: set[str] = set()
        """Keys of the rows that were there when the table was opened."""

        self._metadata = shard_metadata(plan, manifest)

    def write(self, shard: Shard, rows: Sequence[Mapping[str, Any]]) -> None:
        """Commit one shard: after this returns its rows survive a crash of the machine.

        Args:
            shard: What was scored.
            rows: One mapping per input of the shard, in order, with the columns of ``table_schema``.
        """
        keys, expected = [row["input_key"] for row in rows], [item.key for item in shard.inputs]
        assert keys == expected, f"{shard.name} got other rows"
        schema = table_schema(self.plan).with_metadata(self._metadata)
        self.store.write(shard.name, shard_bytes(import_pyarrow().Table.from_pylist(rows, schema=schema)))

    def write_index(self, index: Index, *, partial: bool) -> None:
        """Keep the list that was gone through.

        Args:
            index: Its inputs.
            partial: It is a part of a longer list: inputs of the index before that are not in this one stay behind it.
        """
        if partial and self.store.has(INDEX_FILE):
            index.add_absent(read_index(self.store, self.plan))
        write_index(self.store, self.plan, index)

    def settle(self) -> int:
        """Drop the rows that the list does not ask for any more, and correct labels that it changed.

        Returns:
            Number of rows that were dropped.
        """
        pa, index = import_pyarrow(), read_index(self.store, self.plan)
        names = shard_names(self.store)
        parts = [read_shard(self.store, name, self.plan, columns=["label"]) for name in names]
        if not parts:
            return 0
        places = index.places(pa.chunked_array([part["input_key"].combine_chunks() for part in parts]))
        labels = index.labels_at(places)
        kept = _first_of_each(places)
        start = 0
        for name, part in zip(names, parts, strict=True):
            rows = slice(start, start := start + part.num_rows)
            asked = labels.slice(rows.start, part.num_rows)
            if not kept[rows].all() or not asked.equals(part["label"].combine_chunks()):
                self._rewrite(name, kept[rows], asked)
        return int((~kept).sum())

    def drop_failed(self, codes: Collection[str]) -> int:
        """Drop the rows that failed with one of some codes, so that their inputs are scored again; returns how many."""
        dropped = 0
        for name in shard_names(self.store):
            table = read_shard(self.store, name, self.plan, columns=["error_code", "label"])
            kept = np.array([code not in codes for code in table["error_code"].to_pylist()], bool)
            if not kept.all():
                self._rewrite(name, kept, table["label"].combine_chunks())
                dropped += int((~kept).sum())
        return dropped

    def outcomes(self) -> Counter[str]:
        """Count the rows that are there by error code; ``"ok"`` stands for no error."""
        return summarise_shards(self.store, self.plan)[1]

    def load(self) -> None:
        """Check every shard that is there, and note its keys."""
        for name in shard_names(self.store):
            self.done.update(read_shard(self.store, name, self.plan)["input_key"].to_pylist())

    def _rewrite(self, name: str, kept: np.ndarray, labels: Any) -> None:
        """Put a shard with some of its rows in the place of one; the new one is there before the old one goes."""
        pa = import_pyarrow()

        table = read_shard(self.store, name, self.plan)
        place = table.schema.get_field_index("label")
        table = table.set_column(place, table.schema.field(place), labels).filter(pa.array(kept))
        keys = table["input_key"].to_pylist()
        new = f"{name.rpartition('-')[0]}-{keys_digest(self.plan.run_id, keys)}.parquet"
        if keys:
            self.store.write(new, shard_bytes(table.combine_chunks()))
        if not keys or new != name:
            self.store.remove(name)


def _first_of_each(places: np.ndarray) -> np.ndarray:
    """Tell which rows are the first with their place; those without one (-1) are not."""
    first = np.zeros(len(places), bool)
    first[np.unique(places, return_index=True)[1]] = True
    return first & (places >= 0)


@contextmanager
def open_table(
    store: Store, plan: RunPlan, *, manifest: Mapping[str, Any], retry: Collection[str] = ()
) -> Iterator[ScoreTable]:
    """Claim a place for the rows of one plan, and hold it against other processes.

    A new or empty folder is claimed. One with rows of the same plan is continued: the shards in it are checked. One in
    which no shard was ever finished may be claimed by another plan.

    Args:
        store: Where the table goes.
        plan: What decides the rows.
        manifest: What the model says about itself, for the schema metadata.
        retry: Error codes of rows that are dropped, so that their inputs are scored again.

    Raises:
        FolderError: if it holds other files or the rows of another plan, or another process is writing.
        DataError: if the ledger or a shard is damaged, or of another table version.
    """
    names = store.names()
    if LEDGER_FILE not in names and not any(map(SHARD_NAME.fullmatch, names)):
        _require_empty(store, names)
    with store.claim():
        claim_run(store, plan)
        _refuse_foreign(store, error=FolderError)
        table = ScoreTable(store, plan, manifest=manifest)
        if retry:
            table.drop_failed(retry)
        table.load()
        yield table


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
    _refuse_foreign(store, error=DataError)
    index = _finished_index(store, plan)
    parts = [read_shard(store, name, plan) for name in shard_names(store)]
    table = pa.concat_tables(parts or [table_schema(plan).empty_table()])
    places = index.places(table["input_key"])
    rows = np.flatnonzero(_first_of_each(places))
    if len(rows) < len(index):
        raise _unfinished(store, f"it lacks {len(index) - len(rows)} of {len(index)} rows")
    rows = rows[np.argsort(places[rows])]
    table = table.take(pa.array(rows))
    place = table.schema.get_field_index("label")
    table = table.set_column(place, table.schema.field(place), index.labels_at(np.arange(len(index))))
    position = pa.field("position", pa.int64(), nullable=False)
    return table.add_column(0, position, pa.array(range(len(index)), pa.int64()))


def read_present(folder: str | Path, *, columns: Sequence[str]) -> tuple[Any, Ledger, int | None]:
    """Read some columns of the rows that are there, of a table that may not be finished; no row comes twice.

    Returns:
        A ``pyarrow.Table`` with ``input_key`` and the columns, the ledger, and how many inputs the list has, as
        ``listed_inputs`` says. The rows of a finished table are in the order of the list.

    Raises:
        DataError: as ``read_scores``.
    """
    pa = import_pyarrow()

    store = open_store(folder)
    ledger = read_ledger(store)
    _refuse_foreign(store, error=DataError)
    parts = [read_shard(store, name, ledger.plan, columns=columns) for name in shard_names(store)]
    if not parts:
        raise _unfinished(store, "no row is there")
    table = pa.concat_tables(parts)
    if not store.has(INDEX_FILE):
        return table, ledger, None
    index = read_index(store, ledger.plan)
    places = index.places(table["input_key"])
    rows = np.flatnonzero(_first_of_each(places))
    return table.take(pa.array(rows[np.argsort(places[rows])])), ledger, len(index)


def listed_inputs(store: Store, plan: RunPlan) -> int | None:
    """Return how many inputs the list has; None if it was not gone through to the end yet."""
    return len(read_index(store, plan)) if store.has(INDEX_FILE) else None


def _finished_index(store: Store, plan: RunPlan) -> Index:
    if not store.has(INDEX_FILE):
        rows = summarise_shards(store, plan)[0]
        raise _unfinished(store, f"its list was not gone through to the end; {rows} rows are there")
    return read_index(store, plan)


def _unfinished(store: Store, what: str) -> DataError:
    return DataError(
        f"{store} is not finished: {what}",
        hint="run the same `ivdr score` command again; it goes on where it stopped",
    )


def summarise_shards(store: Store, plan: RunPlan) -> tuple[int, Counter[str]]:
    """Count the rows of the shards that are there, and how they ended; ``"ok"`` stands for no error.

    Raises:
        DataError: if a shard is damaged.
    """
    counts: Counter[str] = Counter()
    for name in shard_names(store):
        codes = read_shard(store, name, plan, columns=["error_code"])["error_code"].to_pylist()
        counts.update("ok" if code is None else code for code in codes)
    return counts.total(), counts


def shard_names(store: Store) -> list[str]:
    """Return the names of the shards that are there."""
    return [name for name in store.names() if SHARD_NAME.fullmatch(name)]


def _require_empty(store: Store, found: Sequence[str]) -> None:
    """Refuse to write among files that are not ours."""
    if found:
        raise FolderError(
            f"{store} is not empty and is no score table (it holds {', '.join(found[:3])})",
            hint="choose another folder with -o",
        )


def _refuse_foreign(store: Store, *, error: type[FolderError] | type[DataError]) -> None:
    """Refuse Parquet files of other origin: a reader of the folder would take them for rows of this run."""
    for name in store.names():
        # Readers of Parquet folders pass over what begins so; what a killed writer left over does.
        hidden = any(part[0] in "._" for part in name.split("/"))
        if name.endswith(".parquet") and not hidden and not SHARD_NAME.fullmatch(name):
            raise error(
                f"{store.path(name)} is not a part of the run in {store}", hint="move it out of the folder"
            )
