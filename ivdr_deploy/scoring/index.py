"""The index of a score table: the inputs of the list that was gone through last, in its order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from ivdr_deploy._optional import import_pyarrow
from ivdr_deploy.scoring.inputs import Input
from ivdr_deploy.scoring.plan import RunPlan
from ivdr_deploy.scoring.store import Store, damaged, reading

INDEX_FILE = "_inputs.parquet"
_METADATA_KEY = b"ivdr"
_BATCH = 1 << 14


class Index:
    """Keys, video ids and labels of the inputs of a list, held as columns: 90 MB for a million."""

    def __init__(self) -> None:
        self._batches: list[Any] = []
        self._rows: list[Input] = []

    def __len__(self) -> int:
        return sum(len(batch) for batch in self._batches) + len(self._rows)

    def add(self, inputs: Iterable[Input]) -> None:
        """Add the next inputs."""
        self._rows += inputs
        if len(self._rows) >= _BATCH:
            self._pack()

    def table(self) -> Any:
        """Return ``key``, ``video_id`` and ``label`` as a ``pyarrow.Table``."""
        self._pack()
        return import_pyarrow().Table.from_batches(self._batches, schema=_schema())

    def places(self, keys: Any) -> np.ndarray:
        """Return the places in the list of some keys (a pyarrow array) as int64, -1 for those that are not in it."""
        compute = import_pyarrow().compute

        found = compute.index_in(keys, value_set=self.table()["key"])
        return compute.fill_null(found, -1).to_numpy().astype(np.int64)  # type: ignore[no-any-return]

    def labels_at(self, places: np.ndarray) -> Any:
        """Return the labels at some places as a pyarrow array, null at place -1."""
        pa = import_pyarrow()

        found = self.table()["label"].cast(pa.string()).take(pa.array(places, mask=places < 0))
        return pa.concat_arrays(found.chunks) if found.num_chunks else pa.array([], pa.string())

    def add_absent(self, other: Index) -> None:
        """Add the inputs of another index whose video is not in this one."""
        compute = import_pyarrow().compute

        mine, theirs = self.table(), other.table()
        known = compute.is_in(theirs["video_id"], value_set=mine["video_id"])
        self._batches += theirs.filter(compute.invert(known)).to_batches()

    def _pack(self) -> None:
        if self._rows:
            pa, rows = import_pyarrow(), self._rows
            labels = pa.array([item.label for item in rows], pa.string()).dictionary_encode()
            arrays = [
                pa.array([item.key for item in rows]),
                pa.array([item.video_id for item in rows]),
                labels,
            ]
            self._batches.append(pa.RecordBatch.from_arrays(arrays, schema=_schema()))
            self._rows = []


def _schema() -> Any:
    pa = import_pyarrow()

    label = pa.field("label", pa.dictionary(pa.int32(), pa.string()))
    return pa.schema([("key", pa.string()), ("video_id", pa.string()), label])


def write_index(store: Store, plan: RunPlan, index: Index) -> None:
    """Put the index of a list in the place of the one before."""
    pa = import_pyarrow()

    table = index.table().unify_dictionaries()
    facts = {"run_id": plan.run_id, "sha256": _digest(table)}
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(facts).encode()})
    pa.parquet.write_table(table, sink, compression="zstd", write_page_checksum=True)
    store.write(INDEX_FILE, sink.getvalue().to_pybytes())


def read_index(store: Store, plan: RunPlan) -> Index:
    """Read the index.

    Raises:
        DataError: if it is damaged.
        OSError: if it cannot be opened.
    """
    pa, index, where = import_pyarrow(), Index(), store.path(INDEX_FILE)
    with store.open(INDEX_FILE) as stream, reading(where):
        with pa.parquet.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False) as file:
            table = file.read(use_threads=False)
        table.validate(full=True)
        facts = json.loads(table.schema.metadata[_METADATA_KEY])
        table = table.cast(_schema())
        if facts != {"run_id": plan.run_id, "sha256": _digest(table)}:
            raise damaged(where, "it is not what was written")
    index._batches = table.to_batches()
    return index


def _digest(table: Any) -> str:
    """Return a digest over all that is in an index, however it is cut into batches."""
    digest = hashlib.sha256()
    for name in ("key", "video_id", "label"):
        for chunk in table[name].cast(import_pyarrow().string()).chunks:
            for text in chunk.to_pylist():  # one by one: how it is cut into chunks must not matter
                digest.update(b"\0" if text is None else f"{text}\n".encode())
    return digest.hexdigest()
