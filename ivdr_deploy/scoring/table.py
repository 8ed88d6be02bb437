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
from typing import Any

import numpy as np

from ivdr_deploy._optional import import_pyarrow
from ivdr_deploy.artifacts.kinds import SCORE_LEDGER_FILE as LEDGER_FILE
from ivdr_deploy.datasets.entries import some
from ivdr_deploy.errors import DataError, FolderError
from ivdr_deploy.scoring.attempts import is_attempt
from ivdr_deploy.scoring.index import INDEX_FILE, Index, read_index, write_index
from ivdr_deploy.scoring.ledger import claim_run
from ivdr_deploy.scoring.plan import RunPlan
from ivdr_deploy.scoring.reader import count_outcomes, first_of_each, refuse_foreign
from ivdr_deploy.scoring.shard import (
    SHARD_NAME,
    Shard,
    keys_digest,
    read_shard,
    shard_bytes,
    shard_metadata,
    shard_names,
    table_schema,
)
from ivdr_deploy.scoring.store import Store


class ScoreTable:
    """A table that this process writes; made by ``open_table``."""

    def __init__(self, store: Store, plan: RunPlan, *, manifest: Mapping[str, Any]) -> None:
        self.store = store
        self.plan = plan
        self.done: set[str] = set()
        """Keys of the rows that were there when the table was opened, and that stay."""

        self._failed: dict[str, list[str]] = {}
        """Keys of the rows that are to be scored again, and the shards that have them."""

        self._now: dict[str, str] = {}
        """Names of shards from which such rows were dropped, and the names they have since."""

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
            partial: It is a part of a longer list: inputs of the index before, and of rows that are there, stay behind
                its own.
        """
        if partial:
            if self.store.has(INDEX_FILE):
                index.add_absent(read_index(self.store, self.plan))
            index.add_absent(self._inputs_there())
        write_index(self.store, self.plan, index)

    def settle(self, listed: int) -> int:
        """Drop the rows that the list does not ask for any more, and correct labels that it changed.

        Args:
            listed: Inputs at the beginning of the index that this run went through: each must have its row.

        Returns:
            Number of rows that were dropped.

        Raises:
            DataError: if a row is not there, so that nothing is dropped.
        """
        index, names = read_index(self.store, self.plan), shard_names(self.store)
        parts = [read_shard(self.store, name, self.plan, columns=["label"]) for name in names]
        keys = import_pyarrow().chunked_array(
            [part["input_key"].combine_chunks() for part in parts], "string"
        )
        places = index.places(keys)
        if lost := listed - len(np.intersect1d(places, np.arange(listed))):
            raise DataError(
                f"{self.store} lacks {lost} of {listed} rows that were scored: files were removed from it, or it was "
                "moved, while they were written",
                hint="find out by whom; the same command scores again what is not there",
            )
        labels = index.labels_at(places)
        kept = first_of_each(places)
        start = 0
        for name, part in zip(names, parts, strict=True):
            rows = slice(start, start := start + part.num_rows)
            asked = labels.slice(rows.start, part.num_rows)
            if not kept[rows].all() or not asked.equals(part["label"].combine_chunks()):
                self._rewrite(name, kept[rows], asked)
        return int((~kept).sum())

    def make_way(self, shard: Shard) -> None:
        """Drop the rows that failed before of inputs that are about to be scored again."""
        failed: dict[str, set[str]] = {}
        for item in shard.inputs:
            for name in self._failed.pop(item.key, ()):
                failed.setdefault(self._now.get(name, name), set()).add(item.key)
        for name, keys in failed.items():
            table = read_shard(self.store, name, self.plan, columns=["label"])
            kept = np.array([key not in keys for key in table["input_key"].to_pylist()], bool)
            new = self._rewrite(name, kept, table["label"].combine_chunks())
            self._now |= {old: new for old, now in self._now.items() if now == name} | {name: new}

    def outcomes(self) -> Counter[str]:
        """Count the rows that are there by error code; ``"ok"`` stands for no error."""
        return count_outcomes(self.store, self.plan)

    def load(self, retry: Collection[str]) -> None:
        """Check every shard that is there, and note its keys; of rows that failed with a code of ``retry``, apart."""
        for name in shard_names(self.store):
            table = read_shard(self.store, name, self.plan)
            for key, code in zip(
                *(table[column].to_pylist() for column in ("input_key", "error_code")), strict=True
            ):
                if code in retry:
                    self._failed.setdefault(key, []).append(name)
                else:
                    self.done.add(key)

    def _inputs_there(self) -> Index:
        """Return the inputs of all rows that are there."""
        pa, columns = import_pyarrow(), ("input_key", "video_id", "label")
        parts = [
            read_shard(self.store, name, self.plan, columns=columns[1:]) for name in shard_names(self.store)
        ]
        table = pa.concat_tables(parts or [table_schema(self.plan).empty_table().select(columns)])
        return Index.of_columns(*(table[name] for name in columns))

    def _rewrite(self, name: str, kept: np.ndarray, labels: Any) -> str:
        """Put a shard with some of its rows in the place of one; the new one is there before the old one goes.

        Returns:
            The name of the new one.
        """
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
        return new


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
        retry: Error codes of rows that are not ``done``: their inputs are scored again where the list still has them.

    Raises:
        FolderError: if it holds other files or the rows of another plan, or another process is writing.
        DataError: if the ledger or a shard is damaged, or of another table version.
    """
    names = store.names()
    if LEDGER_FILE not in names and not any(map(SHARD_NAME.fullmatch, names)):
        _require_empty(store, names)
    with store.claim():
        refuse_foreign(store, error=FolderError)
        claim_run(store, plan)
        table = ScoreTable(store, plan, manifest=manifest)
        table.load(retry)
        yield table


def _require_empty(store: Store, found: Sequence[str]) -> None:
    """Refuse to write among files that are not ours; what is left of a table without ledger and rows is ours."""
    if foreign := [name for name in found if name != INDEX_FILE and not is_attempt(name)]:
        raise FolderError(
            f"{store} is not empty and is no score table (it holds {some(foreign)})",
            hint="choose another folder with -o",
        )
