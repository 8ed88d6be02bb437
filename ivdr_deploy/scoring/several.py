"""Several scoring processes that share the shards of one run: one a GPU, or several on each."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

from ivdr_deploy.errors import DeviceError
from ivdr_deploy.scoring.attempts import Journal
from ivdr_deploy.scoring.plan import RunPlan, name_differences
from ivdr_deploy.scoring.shard import Shard
from ivdr_deploy.scoring.stage import Row
from ivdr_deploy.scoring.supervisor import Supervisor
from ivdr_deploy.scoring.task import Task

_SCORED, _DONE, _ENDED = "scored", "done", "ended"

_WAITING = 64
"""What engines have said and nobody has taken, before they wait: a slow disk must not fill the memory with rows."""


class _Shared:
    """What the threads of the engines share: the shards to come, and what they say."""

    def __init__(self, shards: Iterator[Shard]) -> None:
        self.said: queue.Queue[tuple[str, Any]] = queue.Queue(_WAITING)
        self._shards, self._taking, self._failed = shards, threading.Lock(), False

    def work(self, engine: Supervisor, journal: Journal) -> None:
        """Score until there are no more shards, or another engine has failed."""
        error: BaseException | None = None
        try:
            for done in engine.run(self._take(), journal=journal, scored=self._scored):
                self.said.put((_DONE, done))
        except BaseException as raised:  # noqa: BLE001  # raised again where the run is
            error, self._failed = raised, True
        self.said.put((_ENDED, error))

    def _take(self) -> Iterator[Shard]:
        while True:
            with self._taking:
                shard = None if self._failed else next(self._shards, None)
            if shard is None:
                return
            yield shard

    def _scored(self) -> None:
        self.said.put((_SCORED, None))


class Several:
    """A supervisor for each of some tasks, which differ in nothing that decides a row. A context manager.

    A shard is scored by one of them, whichever asks first, so that the rows are those of a single one.

    Raises:
        DeviceError: if they would not give the same rows, since the GPUs differ.
        IvdrError: what one met when it opened the model.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        with ExitStack() as stack:
            self._engines = [stack.enter_context(Supervisor(task)) for task in tasks]
            self._stack = stack.pop_all()
        self.plan: RunPlan = self._engines[0].plan
        self.manifest: Mapping[str, Any] = self._engines[0].manifest
        for engine in self._engines[1:]:
            if differ := self.plan.differences(engine.plan):
                self.close()
                raise DeviceError(
                    f"the devices differ ({name_differences(differ)})",
                    hint="one table holds the rows of one kind of device: score on each kind into a folder of its own, "
                    "with --shard",
                )

    def run(
        self, shards: Iterator[Shard], *, journal: Journal, scored: Callable[[], object]
    ) -> Iterator[tuple[Shard, list[Row]]]:
        """Yield each shard with its rows, whoever scored it.

        What one of them raises ends the run when the shards in work of the others are done.
        """
        shared = _Shared(shards)
        for engine in self._engines:
            threading.Thread(target=shared.work, args=(engine, journal), name="score", daemon=True).start()
        working, failure = len(self._engines), None
        while working:
            kind, what = shared.said.get()
            if kind == _SCORED:
                scored()
            elif kind == _DONE:
                yield what
            else:
                working -= 1
                failure = failure or what
        if failure is not None:
            raise failure

    def close(self) -> None:
        """End all of them; calling it twice is allowed."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
