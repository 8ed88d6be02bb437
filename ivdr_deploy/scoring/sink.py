"""The score table on disk: Parquet shards and a ledger in a folder; a row is either complete or absent.

::

    OUT/_run.json                              the ledger: which run this folder belongs to
    OUT/_run.lock                              held while a process writes here
    OUT/part-00000-of-00012-<run id>.parquet   one shard; appears by renaming a file that is already on disk

Names that begin with ``_`` or ``.`` are skipped by the usual readers of Parquet folders, so that
``pyarrow.parquet.read_table(OUT)`` works as well; ``read_scores`` also checks that the table is whole.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ivdr_deploy._files import atomic_path, fsync_directory, left_over_name, remove_left_over, try_lock
from ivdr_deploy._optional import import_pyarrow
from ivdr_deploy._text import quoted
from ivdr_deploy.artifacts.kinds import SCORE_LEDGER_FILE as LEDGER_FILE
from ivdr_deploy.errors import ConfigError, DataError, FolderError
from ivdr_deploy.records import from_dict, to_dict
from ivdr_deploy.scoring.plan import TABLE_VERSION, RunPlan, Shard
from ivdr_deploy.scoring.shard import read_shard, shard_metadata, table_schema

LOCK_FILE = "_run.lock"


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
        self._schema = table_schema(plan).with_metadata(shard_metadata(plan, manifest))
        self.pending = _absent(folder, plan)
        """Shards that nobody has written yet, when the sink was opened."""

    def write(self, shard: Shard, rows: Sequence[Mapping[str, Any]]) -> None:
        """Commit one shard: after this returns its rows survive a crash of the machine.

        Args:
            shard: One of ``pending``.
            rows: One mapping per input of the shard, in order, with the columns of ``table_schema``.
        """
        pa = import_pyarrow()

        positions = [row["position"] for row in rows]
        assert positions == list(range(shard.start, shard.stop)), f"{shard} got the rows {positions}"
        table = pa.Table.from_pylist(rows, schema=self._schema)
        # As a stream: pyarrow takes a name such as ``a:b`` for a URI.
        with atomic_path(self.folder / shard.name) as temporary, temporary.open("wb") as stream:
            pa.parquet.write_table(table, stream, compression="zstd", write_page_checksum=True)

    def digests(self) -> Iterator[tuple[int, str]]:
        """Yield position and SHA-256 of every row that was there when the sink was opened and has one."""
        for shard in self.plan.shards:
            if shard not in self.pending:
                table = read_shard(self.folder, shard, self.plan, columns=["sha256"])
                for position, digest in enumerate(table["sha256"].to_pylist(), start=shard.start):
                    if digest is not None:
                        yield position, digest

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
        DataError: if the ledger or a shard is damaged, or of another table version.
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
        if not try_lock(lock.fileno()):
            raise FolderError(
                f"another process is writing scores to {folder}", hint="wait for it, or choose another folder"
            )
        remove_left_over(folder)
        _claim(folder, plan)
        for shard in plan.shards:
            if (folder / shard.name).exists():
                read_shard(folder, shard, plan)
        yield ScoreSink(folder, plan, manifest=manifest)


def read_scores(folder: str | Path) -> Any:
    """Read a whole score table.

    Returns:
        A ``pyarrow.Table`` with the columns of ``table_schema``: exactly one row per input, in input order.

    Raises:
        DataError: if the folder is no score table, is of another version, is not finished, or holds a damaged or a
            foreign Parquet file.
    """
    pa = import_pyarrow()

    folder = Path(folder)
    plan = read_ledger(folder).plan
    _refuse_foreign(folder, plan, error=DataError)
    if absent := _absent(folder, plan):
        raise DataError(
            f"{folder} is not finished: it lacks {sum(shard.size for shard in absent)} of {plan.videos} rows",
            hint="run the same `ivdr score` command again; it goes on where it stopped",
        )
    return pa.concat_tables([read_shard(folder, shard, plan) for shard in plan.shards])


def summarise_shards(folder: Path, plan: RunPlan) -> tuple[int, Counter[str]]:
    """Count the rows of the shards that are there, and how they ended; ``"ok"`` stands for no error.

    Raises:
        DataError: if a shard is damaged.
    """
    counts: Counter[str] = Counter()
    for shard in plan.shards:
        if (folder / shard.name).exists():
            codes = read_shard(folder, shard, plan, columns=["error_code"])["error_code"].to_pylist()
            counts.update("ok" if code is None else code for code in codes)
    return counts.total(), counts


def _require_empty(folder: Path) -> None:
    """Refuse to write among files that are not ours."""
    found = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in found if name != LOCK_FILE and not left_over_name(name)]
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
            raise _another_run(folder, ledger.plan.differences(plan))
    ledger = Ledger(run_id=plan.run_id, started_at=datetime.now(UTC).isoformat(timespec="seconds"), plan=plan)
    with atomic_path(folder / LEDGER_FILE) as temporary:
        temporary.write_text(
            json.dumps(to_dict(ledger), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def _another_run(folder: Path, differences: Mapping[str, str]) -> FolderError:
    named = "; ".join(f"{name}: {values}" for name, values in differences.items())
    hint = "choose another folder with -o, or delete this one if its scores are not needed"
    if differences.keys() <= {"videos", "videos_sha256", "shard_videos"}:
        hint = (
            "the list has other videos, labels or file sizes than the one that was scored: score it into another "
            "folder with -o; a list of the new files alone is enough, rows of both tables are told apart by video_id"
        )
    return FolderError(f"{folder} holds the scores of another run ({named})", hint=hint)


def read_ledger(folder: Path) -> Ledger:
    """Read which run a folder belongs to; ``DataError`` if it is no score table, or the ledger is damaged."""
    path = folder / LEDGER_FILE
    if not path.is_file():
        raise DataError(f"{folder} is no score table: it has no {LEDGER_FILE}", hint="`ivdr score` makes one")
    hint = f"score into another folder; {folder} cannot be continued"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        _check_version(values, folder)
        ledger = from_dict(Ledger, values, where=str(path))
    except (ValueError, RecursionError, ConfigError) as error:
        raise DataError(f"the ledger {path} is damaged ({str(error)[:300]})", hint=hint) from error
    if ledger.run_id != ledger.plan.run_id:
        raise DataError(
            f"{path} was changed: it names run {quoted(ledger.run_id)}, expected {ledger.plan.run_id}",
            hint=hint,
        )
    return ledger


def _check_version(ledger: object, folder: Path) -> None:
    """Refuse a table of another version by name: its columns, or what its shards say about themselves, are others."""
    plan = ledger.get("plan") if isinstance(ledger, dict) else None
    version = plan.get("table_version") if isinstance(plan, dict) else None
    if isinstance(version, int) and version != TABLE_VERSION:
        raise DataError(
            f"{folder} is a score table of version {quoted(version)}, this ivdr reads and continues version "
            f"{TABLE_VERSION}",
            hint="pyarrow.parquet.read_table reads its columns, unchecked; to go on, score into another folder",
        )


def _refuse_foreign(folder: Path, plan: RunPlan, *, error: type[FolderError] | type[DataError]) -> None:
    """Refuse Parquet files of other origin: a reader of the folder would take them for rows of this run."""
    ours = {folder / shard.name for shard in plan.shards}
    found = (path for path in folder.rglob("*.parquet") if path not in ours)
    # Readers of Parquet folders pass over what begins so; what a killed writer left over does.
    foreign = sorted(
        str(path) for path in found if not any(part[0] in "._" for part in path.relative_to(folder).parts)
    )
    if foreign:
        raise error(f"{foreign[0]} is not a part of the run in {folder}", hint="move it out of the folder")


def _absent(folder: Path, plan: RunPlan) -> tuple[Shard, ...]:
    return tuple(shard for shard in plan.shards if not (folder / shard.name).exists())
