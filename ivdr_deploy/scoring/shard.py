"""One shard of the score table: its inputs and name, its columns, and the one way to read it, which checks it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ivdr_deploy._optional import import_pyarrow
from ivdr_deploy.records import to_dict
from ivdr_deploy.scoring.inputs import Input
from ivdr_deploy.scoring.plan import RunPlan
from ivdr_deploy.scoring.store import Store, damaged, reading
from ivdr_deploy.spec import canonical_json

METADATA_KEY = b"ivdr"
"""Key of the schema metadata: canonical JSON ``{"run_id", "plan", "manifest", "sha256"}``, the last over the others."""

MIN_SHARD_VIDEOS = 32
_SHARDS = 1000

SHARD_NAME = re.compile(r"part-\d{9}-(?P<digest>[0-9a-f]{16})\.parquet")


@dataclass(frozen=True, slots=True)
class Shard:
    """Inputs whose rows are one file."""

    name: str
    inputs: tuple[Input, ...]


def shard_videos(position: int) -> int:
    """Choose the rows of the shard that begins at a place of the list: 32, or a thousandth of what came before.

    A kill loses the shard in work. Smaller shards would lose less, but a folder of 30 000 small files is slow to read
    for ever after. The length of the list is not known when its first shards are scored.
    """
    return max(MIN_SHARD_VIDEOS, position // _SHARDS)


def make_shard(run_id: str, inputs: Sequence[Input]) -> Shard:
    """Name the shard of some inputs: the same inputs of one run have the same name, whoever scores them."""
    digest = keys_digest(run_id, [item.key for item in inputs])
    return Shard(f"part-{inputs[0].position:09d}-{digest}.parquet", tuple(inputs))


def keys_digest(run_id: str, keys: Sequence[str]) -> str:
    """Return the 16 hex digits in the name of the shard that holds the rows of these keys, in this order."""
    return hashlib.sha256("\n".join([run_id, *keys]).encode()).hexdigest()[:16]


def table_schema(plan: RunPlan) -> Any:
    """Return the columns of a shard as a ``pyarrow.Schema``.

    Vectors are lists of float32, null where the video failed: ``feature`` (F,), ``inter`` (D,), and
    ``intra``, nested, (num_clips, S, D) in time order.
    """
    pa = import_pyarrow()

    text, real = pa.string(), pa.float64()
    vector = pa.list_(pa.float32())
    columns = [
        pa.field("input_key", text, nullable=False),  # of uri, size and time of change, or of uri and SHA-256
        pa.field("video_id", text, nullable=False),
        pa.field("uri", text, nullable=False),  # as the list writes it
        pa.field("sha256", text),
        pa.field("label", text),  # as the list says, not the model
        pa.field("status", text, nullable=False),  # "ok" or "error"
        pa.field("error_code", text),
        pa.field("error_message", text),
        pa.field("labels", pa.list_(text)),  # best first
        pa.field("scores", vector),  # probabilities of ``labels``
        *(pa.field(name, pa.list_(pa.list_(vector)) if name == "intra" else vector) for name in plan.outputs),
        pa.field("num_frames", pa.int64()),
        pa.field("duration_seconds", real),
        pa.field("decode_ms", real),
        pa.field("preprocess_ms", real),
        pa.field("infer_ms", real),
        pa.field("model", text, nullable=False),
        pa.field("model_version", text, nullable=False),
        pa.field("variant", text, nullable=False),
        pa.field("contract_hash", text, nullable=False),
        pa.field("view_plan", text, nullable=False),  # in words; the schema metadata has its fields
        pa.field("run_id", text, nullable=False),
    ]
    return pa.schema(columns)


def shard_metadata(plan: RunPlan, manifest: Mapping[str, Any]) -> dict[bytes, bytes]:
    """Return the schema metadata of every shard of a run.

    Args:
        plan: The run.
        manifest: What the model says about itself.
    """
    facts = {"run_id": plan.run_id, "plan": to_dict(plan), "manifest": manifest}
    return {METADATA_KEY: canonical_json({**facts, "sha256": _digest(facts)}).encode()}


def shard_bytes(table: Any) -> bytes:
    """Return the file of a shard; ``table`` is a ``pyarrow.Table`` with schema and metadata of the run."""
    pa = import_pyarrow()

    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def read_shard(store: Store, name: str, plan: RunPlan, *, columns: Sequence[str] | None = None) -> Any:
    """Read a shard, and check that it is the one that its name says, and holds exactly its rows.

    Whoever calls a shard complete calls this.

    Args:
        store: Of the table.
        name: Which one.
        plan: The run.
        columns: Those to read besides ``input_key``, in this order; all when None.

    Raises:
        DataError: if it is damaged.
        OSError: if it cannot be opened.
    """
    pa = import_pyarrow()

    where = store.path(name)
    with store.open(name) as stream, reading(where):
        # A column that the table does not have would be left out without a word, so the schema is checked first.
        with pa.parquet.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False) as file:
            schema = file.schema_arrow
            if not schema.equals(table_schema(plan)) or list(schema.metadata or ()) != [METADATA_KEY]:
                raise damaged(where, "its columns or metadata are not those of the run")
            facts = json.loads(schema.metadata[METADATA_KEY])
            table = file.read(columns=None if columns is None else ["input_key", *columns], use_threads=False)
        table.validate(full=True)
        keys = table["input_key"].to_pylist()
        # The file holds it twice; whoever reads the table gets either.
        sound = table.schema.metadata == schema.metadata
        stated = facts.pop("sha256", None), facts.get("run_id"), facts.get("plan")
        sound &= stated == (_digest(facts), plan.run_id, to_dict(plan))
    match = SHARD_NAME.fullmatch(name)
    if not sound or match is None or match["digest"] != keys_digest(plan.run_id, keys):
        raise damaged(
            where,
            f"it holds {len(keys)} rows of run {str(facts.get('run_id'))[:60]}; "
            f"expected those that its name stands for, of run {plan.run_id}",
        )
    if odd := [name for name in table.column_names if not _is_finite(table[name])]:
        raise damaged(where, f"{odd[0]} holds NaN or infinity, which is never written")
    return table


def _is_finite(column: Any) -> bool:
    """Say whether no number of a column, or of the lists in it, is NaN or infinite."""
    pa = import_pyarrow()

    while pa.types.is_list(column.type):
        column = pa.compute.list_flatten(column)
    return (
        not pa.types.is_floating(column.type)
        or pa.compute.all(pa.compute.is_finite(column)).as_py() is not False
    )


def shard_names(store: Store) -> list[str]:
    """Return the names of the shards that are there."""
    return [name for name in store.names() if SHARD_NAME.fullmatch(name)]


def shard_plan(store: Store, name: str) -> Any:
    """Return the ``plan`` in the metadata of a shard, as JSON has it; None where it has none.

    Raises:
        DataError: if it cannot be read.
    """
    pa = import_pyarrow()

    with store.open(name) as stream, reading(store.path(name)):
        metadata = pa.parquet.read_schema(stream).metadata or {}
        return json.loads(metadata.get(METADATA_KEY, b"{}")).get("plan")


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()
