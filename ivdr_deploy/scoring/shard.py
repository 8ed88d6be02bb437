"""One shard of the score table: its columns, and the one way to read it, which checks what it reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ivdr_deploy._optional import import_pyarrow
from ivdr_deploy.errors import DataError
from ivdr_deploy.records import to_dict
from ivdr_deploy.scoring.plan import RunPlan, Shard
from ivdr_deploy.spec import canonical_json

METADATA_KEY = b"ivdr"
"""Key of the schema metadata: canonical JSON ``{"run_id", "plan", "manifest", "sha256"}``, the last over the others."""


def table_schema(plan: RunPlan) -> Any:
    """Return the columns of a run's table as a ``pyarrow.Schema``.

    Vectors are lists of float32, null where the video failed: ``feature`` (F,), ``inter`` (D,), and
    ``intra``, nested, (num_clips, S, D) in time order.
    """
    pa = import_pyarrow()

    text, real = pa.string(), pa.float64()
    vector = pa.list_(pa.float32())
    columns = [
        pa.field("position", pa.int64(), nullable=False),  # in the list, from 0
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


def read_shard(folder: Path, shard: Shard, plan: RunPlan, *, columns: Sequence[str] | None = None) -> Any:
    """Read a shard, and check that it is the one that its name says, and holds exactly its rows.

    Whoever calls a shard complete calls this.

    Args:
        folder: Of the table.
        shard: Which one.
        plan: The run.
        columns: Those to read, in this order; all when None.

    Raises:
        DataError: if it is damaged.
        OSError: if it cannot be opened.
    """
    pa = import_pyarrow()

    path = folder / shard.name
    with path.open("rb") as stream:
        try:
            # A column that the table does not have would be left out without a word, so the schema is checked first.
            with pa.parquet.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False) as file:
                schema = file.schema_arrow
                if not schema.equals(table_schema(plan)) or list(schema.metadata or ()) != [METADATA_KEY]:
                    raise _damaged(path, "its columns or metadata are not those of the run")
                facts = json.loads(schema.metadata[METADATA_KEY])
                table = file.read(
                    columns=None if columns is None else ["position", *columns], use_threads=False
                )
            table.validate(full=True)
            positions = table["position"].to_pylist()
            # The file holds it twice; whoever reads the table gets either.
            sound = table.schema.metadata == schema.metadata
            stated = facts.pop("sha256", None), facts.get("run_id"), facts.get("plan")
            sound &= stated == (_digest(facts), plan.run_id, to_dict(plan))
        except DataError:
            raise
        except MemoryError as error:  # too little of it, or a length that a damaged file claims
            raise DataError(
                f"{path} cannot be read: it asks for more memory than there is",
                hint="raise the memory limit of this process (`ulimit -v`); where there is enough, the file is "
                "damaged: delete it and run the same `ivdr score` command",
            ) from error
        except Exception as error:  # a damaged file makes the reader raise whatever it meets
            reason = (str(error).splitlines() or [""])[0][:100]
            raise _damaged(path, f"{type(error).__name__}: {reason}") from error
    if not sound or positions != list(range(shard.start, shard.stop)):
        raise _damaged(
            path,
            f"it holds {len(positions)} rows of run {str(facts.get('run_id'))[:60]}; "
            f"expected rows {shard.start} to {shard.stop - 1} of run {plan.run_id}",
        )
    return table


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} is damaged ({reason})",
        hint="delete it and run the same `ivdr score` command: it is made again",
    )
