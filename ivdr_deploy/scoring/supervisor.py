"""Runs the stage in a process that may die: its supervisor finds out which input that was, and goes on.

When a worker dies, or does not answer in time, the inputs of the shards in work are tried one by one in a new worker.
The one that ends this worker as well becomes a row, and the shard is scored again without it. So an input costs three
attempts at most, and its neighbours are scored together as ever.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ivdr_deploy._text import quoted
from ivdr_deploy.decoding import GRACE_SECONDS
from ivdr_deploy.errors import FolderError, ResourceError, VideoCrashError, VideoTimeoutError
from ivdr_deploy.scoring.attempts import ALONE_ENDS, UNSEEN_ENDS, Journal
from ivdr_deploy.scoring.inputs import Input
from ivdr_deploy.scoring.plan import name_differences
from ivdr_deploy.scoring.process import Worker
from ivdr_deploy.scoring.shard import Shard
from ivdr_deploy.scoring.stage import Group, Row, failed_row
from ivdr_deploy.scoring.task import DONE, FAILED, FLUSH, NEXT, ROW, Task

INFER_SECONDS = 300.0
"""Wall time for a call of the network, on top of what decoding may take; then the worker is taken for hung."""

_IDLE_DEATHS = 3
"""Workers that may die one after the other without work; then it is no matter of an input."""


@dataclass(eq=False)
class _Work:
    """A shard that was begun. Rows by key."""

    shard: Shard
    rows: dict[str, Row] = field(default_factory=dict)
    crashed: dict[str, Row] = field(default_factory=dict)
    """Of inputs that end the worker."""

    spare: dict[str, Row] = field(default_factory=dict)
    """Of inputs that were scored alone: used only if they end the worker together."""

    untried: deque[Input] = field(default_factory=deque)
    """Inputs that are still to be tried alone."""

    counted: set[str] = field(default_factory=set)
    """Keys of the inputs that a row was told of: one may be scored three times, and is one."""

    tried: bool = False
    begun: bool = False
    """Whether that is in the journal."""

    def try_alone(self, ends: Mapping[str, int]) -> None:
        """Begin to try the inputs one by one.

        Args:
            ends: Runs that ended while an input was tried, by key. These come last: so one is tried again only when
                all others have passed, and runs that somebody ends at any moment condemn nobody.
        """
        self.rows.clear()
        left = (item for item in self.shard.inputs if item.key not in self.crashed)
        self.untried.extend(sorted(left, key=lambda item: ends.get(item.key, 0)))

    def in_order(self) -> list[Row]:
        known = self.rows | self.crashed
        return [known[item.key] for item in self.shard.inputs]


class Supervisor:
    """Scores shards in a worker process. A context manager.

    Args:
        task: What the worker runs.
        infer_seconds: See ``INFER_SECONDS``.

    Raises:
        IvdrError: what the worker met when it opened the model.
    """

    def __init__(self, task: Task, *, infer_seconds: float = INFER_SECONDS) -> None:
        self._task, self._infer_seconds = task, infer_seconds
        self._works: dict[str, _Work] = {}
        """Shards that were begun and are not complete, by name."""

        self._again: deque[_Work] = deque()
        """Those of which every input was tried alone."""

        self._alone: tuple[_Work, Input] | None = None
        """The input that is being tried."""

        self._asked = self._sent = self._ended = False
        """The worker asks for a group; it has some that it was not told to finish; there are no more shards."""

        self._scored: Callable[[], object] = lambda: None
        self._idle_deaths = 0
        self._worker = Worker(self._task)
        opened = self._worker.opened
        self.plan, self.manifest = opened.plan, opened.manifest
        self._call_videos = opened.call_videos

    @property
    def pid(self) -> int:
        """Of the worker."""
        return self._worker.pid

    def run(
        self, shards: Iterator[Shard], *, journal: Journal, scored: Callable[[], object]
    ) -> Iterator[tuple[Shard, list[Row]]]:
        """Yield each shard with its rows.

        Args:
            shards: Asked for when the worker needs more.
            journal: Where attempts are noted.
            scored: Called once for every input, when it has a row; the row may have to be made again.

        Raises:
            IvdrError: what would hit every input.
        """
        self._ended, self._scored = False, scored
        while True:
            for work in [*self._works.values()]:
                if len(work.rows) + len(work.crashed) == len(work.shard.inputs):
                    del self._works[work.shard.name]
                    yield work.shard, work.in_order()
            if self._ended and not self._works:
                return
            if self._asked:
                self._answer(shards, journal)
                continue
            kind, *said = self._receive()
            if kind == ROW:
                self._took(journal, *said)
            elif kind == DONE:  # the row before it was taken, and the shard with it
                self._begin_next(journal)
                self._worker.tell(None)
            elif kind == NEXT:
                self._asked = True
            elif kind == FAILED:
                raise said[0]
            else:
                self._died(journal, said[0])

    def close(self) -> None:
        """End the worker, whatever it does; calling it twice is allowed."""
        self._worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _answer(self, shards: Iterator[Shard], journal: Journal) -> None:
        """Give the worker what it asks for."""
        if self._alone is not None:
            return self._send(FLUSH)
        if work := next((work for work in self._works.values() if work.untried), None):
            return self._send(FLUSH) if self._sent else self._try_next(work, journal)
        if self._again:
            work = self._again.popleft()
            inputs = tuple(item for item in work.shard.inputs if item.key not in work.crashed)
            return self._send((work.shard.name, inputs)) if inputs else None
        shard = None if self._ended else next(shards, None)
        if shard is None:
            self._ended = True
            return self._send(FLUSH) if self._sent else None
        before = journal.read(shard)
        self._works[shard.name] = work = _Work(shard)
        if len(self._works) == 1:
            self._begin_next(journal)
        if before.deaths or before.begun >= UNSEEN_ENDS:
            return work.try_alone(before.alone)
        return self._send((shard.name, shard.inputs))

    def _begin_next(self, journal: Journal) -> None:
        """Note that the network may take up the oldest shard that is not complete; those after it are only decoded."""
        work = next(iter(self._works.values()), None)
        if work is not None and not work.begun:
            work.begun = True
            journal.begin(work.shard)

    def _try_next(self, work: _Work, journal: Journal) -> None:
        item = work.untried.popleft()
        if (ends := journal.alone(work.shard, item.key)) >= ALONE_ENDS:
            reason = f"{ends} runs ended, nobody saw how, while it was scored alone"
            self._crashed(work, item, VideoCrashError(f"{quoted(item.uri)}: {reason}"))
            return
        self._alone = work, item
        self._send((work.shard.name, (item,)))

    def _took(self, journal: Journal, name: str, key: str, row: Row) -> None:
        """Take a row."""
        self._idle_deaths = 0
        work = self._works[name]
        self._count(work, key)
        if self._alone is None:
            work.rows[key] = row
            return
        self._alone = None
        work.spare[key] = row
        journal.answered(work.shard, key)
        self._was_tried(work)

    def _crashed(self, work: _Work, item: Input, error: VideoCrashError | VideoTimeoutError) -> None:
        work.crashed[item.key] = failed_row(item, self.plan, code=error.code, message=error.message)
        self._count(work, item.key)
        self._was_tried(work)

    def _count(self, work: _Work, key: str) -> None:
        if key not in work.counted:
            work.counted.add(key)
            self._scored()

    def _was_tried(self, work: _Work) -> None:
        if not work.untried:
            work.tried = True
            self._again.append(work)

    def _died(self, journal: Journal, error: VideoCrashError | VideoTimeoutError) -> None:
        """Find out what it was: whatever was being scored is tried alone in a new worker."""
        if self._alone is not None:
            work, item = self._alone
            self._alone = None
            journal.died(work.shard, error.message)
            self._crashed(work, item, type(error)(f"{quoted(item.uri)}: {error.message}"))
        else:
            in_work = [w for w in self._works.values() if not w.untried and w not in self._again]
            self._idle_deaths += not in_work
            if self._idle_deaths > _IDLE_DEATHS:
                raise ResourceError(f"{error.message}, again and again, and nothing was being scored")
            for work in in_work:
                if work.tried:  # only together do they end it
                    work.rows = {**work.spare}
                    continue
                journal.died(work.shard, error.message)
                work.try_alone({})
        self._worker.close()
        self._restart()

    def _receive(self) -> tuple[Any, ...]:
        """Return what the worker says next, or ``("died", error)``."""
        videos = 1 if self._alone is not None else self._call_videos
        turns = math.ceil(videos / self._task.decode.workers) + 1
        return self._worker.receive(
            turns * (self._task.limits.max_decode_seconds + GRACE_SECONDS) + self._infer_seconds
        )

    def _send(self, group: Group | None) -> None:
        self._asked, self._sent = False, group is not FLUSH
        self._worker.tell(group)

    def _restart(self) -> None:
        """Start a worker in the place of the one before, which opens the model again."""
        self._asked = self._sent = False
        self._worker = Worker(self._task)
        if differ := self.plan.differences(self._worker.opened.plan):
            raise FolderError(
                f"{self._task.artifact} was changed while it was scored with ({name_differences(differ)})",
                hint="one table holds the rows of one model: put the former one back, or score into another folder",
            )
