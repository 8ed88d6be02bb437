"""The index of a score table: the inputs of the list that was gone through last, in its order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from ivdr_deploy._optional import import_pyarrow
from ivdr_deploy._text import as_text
from ivdr_deploy.datasets.entries import LeftOut
from ivdr_deploy.scoring.inputs import Input
from ivdr_deploy.scoring.plan import RunPlan
from ivdr_deploy.scoring.store import Store, damaged, reading
from ivdr_deploy.spec import canonical_json

INDEX_FILE = "_inputs.parquet"
_METADATA_KEY = b"ivdr"
_BATCH = 1 << 14


class Index:
    """Keys, video ids and labels of the inputs of a list, held as columns: 90 MB for a million."""

    def __init__(self) -> None:
        self._batches: list[Any] = []
        self._rows: list[Input] = []
        self.left_out: tuple[LeftOut, ...] = ()
        """What the list passed over, by reason."""

    @classmethod
    def of_columns(cls, keys: Any, video_ids: Any, labels: Any) -> Index:
        """Make an index of three pyarrow arrays of text, or chunked ones; labels may be encoded as a dictionary."""
        pa, index = import_pyarrow(), cls()
        labels = labels if pa.types.is_dictionary(labels.type) else labels.dictionary_encode()
        table = pa.table([keys, video_ids, labels], names=_schema().names).cast(_schema())
        index._batches = table.to_batches()
        return index

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
        """Add the inputs of another index whose video is not in this one, each video once."""
        pa = import_pyarrow()

        theirs = other.table()
        videos = theirs["video_id"].combine_chunks()
        known = pa.compute.is_in(videos, value_set=self.table()["video_id"])
        first = pa.compute.equal(
            pa.compute.index_in(videos, value_set=videos), pa.array(range(len(videos)), pa.int32())
        )
        self._batches += theirs.filter(pa.compute.and_not(first, known)).to_batches()

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
    left_out = [
        [entry.reason, entry.count, [*map(as_text, entry.examples)], *[True] * entry.unread]
        for entry in index.left_out
    ]
    facts = {"run_id": plan.run_id, "left_out": left_out, "sha256": _digest(table, left_out)}
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
    pa, where = import_pyarrow(), store.path(INDEX_FILE)
    with store.open(INDEX_FILE) as stream, reading(where):
        with pa.parquet.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False) as file:
            table = file.read(use_threads=False)
        table.validate(full=True)
        facts = json.loads(table.schema.metadata[_METADATA_KEY])
        left_out = facts.pop("left_out", [])
        index = Index.of_columns(*(table[name] for name in _schema().names))
        sound = facts == {"run_id": plan.run_id, "sha256": _digest(index.table(), left_out)}
        if not sound or table.schema.names != _schema().names:
            raise damaged(where, "it is not what was written")
        index.left_out = tuple(
            LeftOut(str(reason), int(count), tuple(map(str, examples)), unread=unread == [True])
            for reason, count, examples, *unread in left_out
        )
    return index


def _digest(table: Any, left_out: list[Any]) -> str:
    """Return a digest over all that is in an index, however it is cut into batches."""
    digest = hashlib.sha256(canonical_json(left_out).encode() if left_out else b"")
    for name in ("key", "video_id", "label"):
        for chunk in table[name].cast(import_pyarrow().string()).chunks:
            for text in chunk.to_pylist():  # one by one: how it is cut into chunks must not matter
                digest.update(b"\0" if text is None else f"{text}\n".encode())
    return digest.hexdigest()
