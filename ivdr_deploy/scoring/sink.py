"""The score table on disk: Parquet shards and a ledger in a folder; a row is either complete or absent.

::

    OUT/_run.json                              the ledger: which run this folder belongs to
    OUT/_run.lock                              held while a process writes here
    OUT/part-00000-of-00012-<run id>.parquet   one shard; appears by renaming a file that is already on disk

Names that begin with ``_`` or ``.`` are skipped by the usual readers of Parquet folders, so that
``pyarrow.parquet.read_table(OUT)`` works as well; ``read_scores`` also checks that the table is whole.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ivdr_deploy._files import atomic_path, fsync_directory
from ivdr_deploy.artifacts.kinds import SCORE_LEDGER_FILE as LEDGER_FILE
from ivdr_deploy.errors import ConfigError, DataError, FolderError
from ivdr_deploy.records import from_dict, to_dict
from ivdr_deploy.scoring.plan import TABLE_VERSION, RunPlan, Shard
from ivdr_deploy.spec import canonical_json

LOCK_FILE = "_run.lock"
METADATA_KEY = b"ivdr"
"""Key of the schema metadata: canonical JSON ``{"run_id", "plan", "manifest"}``."""

_TEMPORARY = re.compile(r"\.(_run\.json|part-.*\.parquet)\.[0-9a-f]+\.tmp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """``_run.json``: the run that a folder belongs to. The shards themselves tell which are done."""

    run_id: str
    started_at: str
    """UTC time, ISO 8601."""

    plan: RunPlan


class ScoreSink:
    """Writes the shards of one run; made by ``open_sink``."""

    def __init__(self, folder: Path, plan: RunPlan, *, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.plan = plan
        facts = {"run_id": plan.run_id, "plan": to_dict(plan), "manifest": manifest}
        self._schema = table_schema(plan).with_metadata({METADATA_KEY: canonical_json(facts).encode()})
        self.pending = _absent(folder, plan)
        """Shards that nobody has written yet, when the sink was opened."""

    def write(self, shard: Shard, rows: Sequence[Mapping[str, Any]]) -> None:
        """Commit one shard: after this returns its rows survive a crash of the machine.

        Args:
            shard: One of ``pending``.
            rows: One mapping per input of the shard, in order, with the columns of ``table_schema``.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        positions = [row["position"] for row in rows]
        assert positions == list(range(shard.start, shard.stop)), f"{shard} got the rows {positions}"
        table = pa.Table.from_pylist(rows, schema=self._schema)
        with atomic_path(self.folder / shard.name) as temporary:
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)

    def outcomes(self) -> Counter[str]:
        """Count the rows written so far by error code; ``"ok"`` stands for no error."""
        return summarise_shards(self.folder, self.plan)[1]


@contextmanager
def open_sink(folder: Path, plan: RunPlan, *, manifest: Mapping[str, Any]) -> Iterator[ScoreSink]:
    """Claim a folder for one run, and hold it against other processes.

    A new or empty folder is claimed. A folder of the same run is continued: the shards in it are checked, and
    what a killed process left half written is removed. A folder whose run never finished a shard may be
    claimed by another.

    Args:
        folder: Where the table goes; made when absent.
        plan: The run.
        manifest: What the model says about itself, for the schema metadata.

    Raises:
        FolderError: if the folder holds other files or the shards of another run, or another process is
            writing.
        DataError: if the ledger or a shard is damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise FolderError(
            f"{folder} is a file; expected a folder for the score table", hint="choose another name"
        )
    if folder.is_dir() and not (folder / LEDGER_FILE).exists():
        _require_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fsync_directory(folder.parent)
    with (folder / LOCK_FILE).open("a") as lock:  # the kernel lets go of it however this process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderError(
                f"another process is writing scores to {folder}", hint="wait for it, or choose another folder"
            ) from error
        for path in folder.iterdir():
            if _TEMPORARY.fullmatch(path.name):
                path.unlink()
        _claim(folder, plan)
        for shard in plan.shards:
            if (folder / shard.name).exists():
                _check_shard(folder, shard, plan)
        yield ScoreSink(folder, plan, manifest=manifest)


def read_scores(folder: str | Path) -> Any:
    """Read a whole score table.

    Returns:
        A ``pyarrow.Table`` with the columns of ``table_schema``: exactly one row per input, in input order.

    Raises:
        DataError: if the folder is no score table, is not finished, or holds a damaged or a foreign Parquet
            file.
    """
    import pyarrow as pa

    folder = Path(folder)
    plan = read_ledger(folder).plan
    _refuse_foreign(folder, plan, error=DataError)
    if absent := _absent(folder, plan):
        raise DataError(
            f"{folder} is not finished: it lacks {sum(shard.size for shard in absent)} of {plan.videos} rows",
            hint="run the same `ivdr score` command again; it goes on where it stopped",
        )
    for shard in plan.shards:
        _check_shard(folder, shard, plan)
    return pa.concat_tables([_read_shard(folder, shard) for shard in plan.shards])


def summarise_shards(folder: Path, plan: RunPlan) -> tuple[int, Counter[str]]:
    """Count the rows of the shards that are there, and how they ended; ``"ok"`` stands for no error.

    Raises:
        DataError: if a shard is damaged.
    """
    counts: Counter[str] = Counter()
    for shard in plan.shards:
        if (folder / shard.name).exists():
            codes = _read_shard(folder, shard, columns=["error_code"])["error_code"].to_pylist()
            counts.update("ok" if code is None else code for code in codes)
    return counts.total(), counts


def table_schema(plan: RunPlan) -> Any:
    """Return the columns of a run's table as a ``pyarrow.Schema``.

    Vectors are lists of float32, null where the video failed: ``feature`` (F,), ``inter`` (D,), and
    ``intra``, nested, (num_clips, S, D) in time order.
    """
    import pyarrow as pa

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


def _require_empty(folder: Path) -> None:
    """Refuse to write among files that are not ours."""
    found = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in found if name != LOCK_FILE and not _TEMPORARY.fullmatch(name)]
    if foreign:
        raise FolderError(
            f"{folder} is not empty and is no score table (it holds {', '.join(foreign[:3])})",
            hint="choose another folder with -o",
        )


def _claim(folder: Path, plan: RunPlan) -> None:
    """Write the ledger, or check that the one that is there is of the same run."""
    if (folder / LEDGER_FILE).exists():
        ledger = read_ledger(folder)
        if ledger.plan == plan:
            _refuse_foreign(folder, plan, error=FolderError)
            return
        if any(folder.rglob("*.parquet")):
            raise FolderError(
                f"{folder} holds the scores of another run ({'; '.join(ledger.plan.differences(plan))})",
                hint="choose another folder with -o, or delete this one if its scores are not needed",
            )
    ledger = Ledger(run_id=plan.run_id, started_at=datetime.now(UTC).isoformat(timespec="seconds"), plan=plan)
    with atomic_path(folder / LEDGER_FILE) as temporary:
        temporary.write_text(
            json.dumps(to_dict(ledger), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def read_ledger(folder: Path) -> Ledger:
    """Read which run a folder belongs to; ``DataError`` if it is no score table, or the ledger is damaged."""
    path = folder / LEDGER_FILE
    if not path.is_file():
        raise DataError(f"{folder} is no score table: it has no {LEDGER_FILE}", hint="`ivdr score` makes one")
    try:
        ledger = from_dict(Ledger, json.loads(path.read_text(encoding="utf-8")), where=str(path))
    except (ValueError, ConfigError) as error:
        raise DataError(
            f"the ledger is damaged, or of another version of ivdr_deploy ({error})",
            hint=f"score into another folder; {folder} cannot be continued",
        ) from error
    if (ledger.run_id, ledger.plan.table_version) != (ledger.plan.run_id, TABLE_VERSION):
        raise DataError(
            f"{path} was changed, or is of another version: it names run {ledger.run_id} and table version "
            f"{ledger.plan.table_version}, expected {ledger.plan.run_id} and {TABLE_VERSION}",
            hint=f"score into another folder; {folder} cannot be continued",
        )
    return ledger


def _refuse_foreign(folder: Path, plan: RunPlan, *, error: type[FolderError] | type[DataError]) -> None:
    """Refuse Parquet files of other origin: a reader of the folder would take them for rows of this run."""
    ours = {folder / shard.name for shard in plan.shards}
    foreign = sorted(str(path) for path in folder.rglob("*.parquet") if path not in ours)
    if foreign:
        raise error(f"{foreign[0]} is not a part of the run in {folder}", hint="move it out of the folder")


def _absent(folder: Path, plan: RunPlan) -> tuple[Shard, ...]:
    return tuple(shard for shard in plan.shards if not (folder / shard.name).exists())


def _check_shard(folder: Path, shard: Shard, plan: RunPlan) -> None:
    """Check that a shard is the one that its name says, and holds exactly its rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / shard.name
    try:
        with pq.ParquetFile(path) as file:
            facts = json.loads((file.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}"))
            positions = file.read(columns=["position"])["position"].to_pylist() if facts else []
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from error
    if facts.get("run_id") != plan.run_id or positions != list(range(shard.start, shard.stop)):
        raise _damaged(
            path,
            f"it holds {len(positions)} rows of run {facts.get('run_id')}; "
            f"expected rows {shard.start} to {shard.stop - 1} of run {plan.run_id}",
        )


def _read_shard(folder: Path, shard: Shard, *, columns: list[str] | None = None) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / shard.name
    try:
        # Without partitioning=None a folder called ``day=3`` would add a column ``day`` to the table.
        return pq.read_table(path, columns=columns, page_checksum_verification=True, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from error


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} is damaged ({reason})",
        hint="delete it and run the same `ivdr score` command: it is made again",
    )
