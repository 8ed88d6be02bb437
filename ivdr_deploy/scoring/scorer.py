"""A run on one page: a list becomes shards, an engine gives their rows, and the table takes them, one row per input."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ivdr_deploy.datasets.entries import LeftOut
from ivdr_deploy.datasets.lists import VideoList, VideoStream
from ivdr_deploy.errors import ConfigError, VideoCrashError, VideoTimeoutError
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.scoring.attempts import Journal
from ivdr_deploy.scoring.inputs import InputStream, Selection
from ivdr_deploy.scoring.lister import Lister
from ivdr_deploy.scoring.plan import RunPlan, ScoreOptions
from ivdr_deploy.scoring.shard import Shard
from ivdr_deploy.scoring.stage import InProcess, Row
from ivdr_deploy.scoring.store import open_store
from ivdr_deploy.scoring.table import ScoreTable, open_table

RETRIED = (VideoTimeoutError.code, VideoCrashError.code, "unreadable")
"""Failures that can be another time: those that depend on the load of the machine, and files that were not there."""

Progress = Callable[[int, int | None], object]
"""Called with the number of inputs that have a row so far, and of all that the run adds once that is known."""


class Engine(Protocol):
    """What scores shards: ``InProcess``, ``supervisor.Supervisor``, ``ray_engine.RayEngine``."""

    plan: RunPlan
    manifest: Mapping[str, Any]

    def run(
        self, shards: Iterator[Shard], *, journal: Journal, scored: Callable[[], object]
    ) -> Iterator[tuple[Shard, list[Row] | None]]:
        """Yield each shard with its rows, None if it is committed; ``scored`` is called once for every input."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSummary:
    """What is in the folder after a run, and what the run did."""

    folder: str
    run_id: str
    videos: int
    """Rows in the table."""

    ok: int
    failed: int
    errors: dict[str, int]
    """Failed videos by error code, the most frequent first."""

    scored: int
    """Rows that this run added; 0 when the table was complete already."""

    dropped: int
    """Rows that were removed, since the list does not have their input any more, or another file in its place."""

    stopped: bool
    """Whether it was asked to stop before all was scored."""

    partial: bool
    """Whether a part of the list was left for another run: as it was told to, or since folders could not be read."""

    left_out: tuple[LeftOut, ...]
    """What the list passed over, by reason."""

    seconds: float
    """That this run took, the loading of the model left out."""


def score(
    predictor: VideoPredictor,
    videos: VideoList | VideoStream,
    folder: str | Path,
    *,
    options: ScoreOptions | None = None,
    videos_per_shard: int | None = None,
    progress: Progress = lambda done, total: None,
) -> ScoreSummary:
    """Score every video of a list into a folder in this process; arguments and errors as ``score_with``."""
    engine = InProcess(predictor, options or ScoreOptions())
    inputs = InputStream(videos, Selection(), hash_files=engine.plan.hash_files)
    return score_with(engine, inputs, folder, videos_per_shard=videos_per_shard, progress=progress)


def score_with(
    engine: Engine,
    inputs: InputStream,
    folder: str | Path,
    *,
    videos_per_shard: int | None = None,
    retry: Collection[str] = (),
    progress: Progress = lambda done, total: None,
    stopping: Callable[[], bool] = lambda: False,
) -> ScoreSummary:
    """Score every input of a list into a folder, going on where an earlier call stopped.

    A video that cannot be used becomes a row with the reason. Any other exception is a defect, or the end of the run,
    and is raised; the shards written before it stay. Rows that are there stay while their input does; the list may have
    grown, shrunk or changed its order since.

    Args:
        engine: What scores.
        inputs: The list.
        folder: Where the table goes; see ``scoring.table``.
        videos_per_shard: Rows per file, what a kill can lose; None chooses by the place in the list.
        retry: Error codes of rows to be scored again.
        progress: Is told how far it is.
        stopping: Asked before a shard is begun; when it says so, those in work are finished, and no more is begun.

    Raises:
        ConfigError: if the model does not have what the options ask for.
        DataError: if the list, or the table in the folder, is damaged.
        FolderError: if the folder belongs to something else, or another process writes to it.
    """
    if videos_per_shard is not None and videos_per_shard < 1:
        raise ConfigError(f"videos_per_shard must be at least 1, found {videos_per_shard}")
    started = time.perf_counter()
    inputs.require_any()
    store = open_store(folder)
    with (
        open_table(store, engine.plan, manifest=engine.manifest, retry=retry) as table,
        Lister(inputs, table.done, engine.plan.run_id, videos_per_shard=videos_per_shard) as lister,
    ):
        run = _Run(table, inputs, lister, Journal(store), progress)
        stopped = not run.score(engine, stopping)
        dropped = 0 if stopped else run.settle()
        counts = table.outcomes()
    ok = counts.pop("ok", 0)
    return ScoreSummary(
        folder=str(folder),
        run_id=engine.plan.run_id,
        videos=ok + counts.total(),
        ok=ok,
        failed=counts.total(),
        errors=dict(counts.most_common()),
        scored=run.scored,
        dropped=dropped,
        stopped=stopped,
        partial=inputs.partial,
        left_out=inputs.left_out,
        seconds=time.perf_counter() - started,
    )


@dataclass
class _Run:
    """One run into an open table."""

    table: ScoreTable
    inputs: InputStream
    lister: Lister
    journal: Journal
    progress: Progress
    scored: int = 0
    """Rows that were committed."""

    counted: int = 0
    """Inputs that have a row, also those of shards in work."""

    listed: int | None = None
    """Inputs of the list, when it was gone through and is in the index."""

    def score(self, engine: Engine, stopping: Callable[[], bool]) -> bool:
        """Score and commit; returns whether all of the list was."""
        for shard, rows in engine.run(self._shards(stopping), journal=self.journal, scored=self._count):
            if rows is not None:
                self.table.write(shard, rows)
                self.journal.forget(shard)
            self.scored += len(shard.inputs)
            self._keep_list()
            if rows is None and stopping() and self.scored != self.lister.total:
                return False  # the engine has taken all shards, and would go on
        self._keep_list()
        return not self.lister.unscored

    def settle(self) -> int:
        """Leave the rows of the list alone; returns how many were dropped."""
        assert self.listed is not None, "all is scored only when the list has ended"
        dropped = self.table.settle(self.listed)
        self.journal.clear()
        return dropped

    def _shards(self, stopping: Callable[[], bool]) -> Iterator[Shard]:
        for shard in self.lister.shards(stopping):
            self.table.make_way(shard)
            yield shard

    def _count(self) -> None:
        self.counted += 1
        self.progress(self.counted, self.lister.total)

    def _keep_list(self) -> None:
        if self.listed is None and self.lister.total is not None:
            index, listed = self.lister.index, len(self.lister.index)
            index.left_out = self.inputs.left_out
            self.table.write_index(index, partial=self.inputs.partial)
            self.listed = listed
