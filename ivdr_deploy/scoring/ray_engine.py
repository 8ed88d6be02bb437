"""The stage as actors of Ray Data: one item of the data set is a shard, and each actor commits what it scored.

Ray starts an actor that died anew, and gives it the shard again; what is committed is not lost by that, nor scored
twice. Inside an actor runs the same supervisor as without Ray: an input that kills its process does not kill the actor.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from ivdr_deploy._optional import require
from ivdr_deploy.errors import ConfigError, FolderError
from ivdr_deploy.scoring.attempts import Journal
from ivdr_deploy.scoring.plan import RunPlan
from ivdr_deploy.scoring.shard import Shard
from ivdr_deploy.scoring.stage import Row
from ivdr_deploy.scoring.store import open_store
from ivdr_deploy.scoring.supervisor import Supervisor
from ivdr_deploy.scoring.table import ScoreTable
from ivdr_deploy.scoring.task import Task
from ivdr_deploy.video.remote import is_url

_LOCAL = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
"""Of a cluster that is started for this run: nothing of it can be reached from another machine."""


class RayEngine:
    """Scores shards on a Ray cluster: that of ``RAY_ADDRESS``, or one of this machine. A context manager.

    Args:
        task: What each actor runs.
        where: The table, in a place that every node sees.

    Raises:
        MissingDependencyError: if Ray is not installed.
        IvdrError: what an actor met when it opened the model.
    """

    def __init__(self, task: Task, where: str) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report over the network
        self._ray = require("ray", extra="ray")
        require("ray.data", extra="ray")
        if task.decode.isolation != "process":
            raise ConfigError("with Ray videos are decoded in processes", hint="leave --isolation out")
        self._task, self._where = task, where if is_url(where) else os.path.abspath(where)
        local = {} if os.environ.get("RAY_ADDRESS") else _LOCAL
        self._ray.init(log_to_driver=False, logging_level="ERROR", **local)
        self._ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        have = self._ray.cluster_resources()
        self._cpus = min(task.decode.workers + 1, int(have.get("CPU", 1)))
        self._gpus = 1 if task.device == "cuda" else 0
        self._actors = max(
            1, int(have.get("GPU", 0)) if self._gpus else int(have.get("CPU", 1)) // self._cpus
        )
        shares = {"num_cpus": self._cpus, "num_gpus": self._gpus}
        try:
            opened = self._ray.get(self._ray.remote(_open).options(**shares).remote(task))
        except self._ray.exceptions.RayTaskError as error:
            self.close()
            raise error.cause from None
        self.plan: RunPlan = opened[0]
        self.manifest: Mapping[str, Any] = opened[1]

    def run(
        self, shards: Iterator[Shard], *, journal: Journal, scored: Callable[[], object]
    ) -> Iterator[tuple[Shard, list[Row] | None]]:
        """Yield each shard when an actor has committed it; the list is gone through before the first is begun."""
        data = self._ray.data
        waiting = {shard.name: shard for shard in shards}
        if not waiting:
            return
        items = [{"shard": pickle.dumps(shard)} for shard in waiting.values()]
        done = data.from_items(items, override_num_blocks=len(items)).map(
            _Actor,
            fn_constructor_args=(self._task, self._where, self.plan),
            compute=data.ActorPoolStrategy(min_size=1, max_size=self._actors),
            num_cpus=self._cpus,
            num_gpus=self._gpus,
        )
        for row in done.iter_rows():
            shard = waiting.pop(row["name"])
            for _ in shard.inputs:
                scored()
            yield shard, None

    def close(self) -> None:
        """Leave the cluster, and end it if it was started for this run."""
        self._ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _open(task: Task) -> tuple[RunPlan, Mapping[str, Any]]:
    """Open the model where there is what it needs; returns what decides the rows, and what it says about itself."""
    with Supervisor(task) as engine:
        return engine.plan, engine.manifest


class _Actor:
    """Scores one shard after the other, and commits each."""

    def __init__(self, task: Task, where: str, plan: RunPlan) -> None:
        self._engine = Supervisor(task)
        if named := "; ".join(
            f"{name}: {values}" for name, values in plan.differences(self._engine.plan).items()
        ):
            raise FolderError(
                f"the nodes of the cluster differ ({named})", hint="install the same on every node"
            )
        self._store = open_store(where)
        self._table = ScoreTable(self._store, plan, manifest=self._engine.manifest)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        shard: Shard = pickle.loads(item["shard"])
        if not self._store.has(shard.name):  # an actor before this one may have died just after it
            journal = Journal(self._store)
            for done, rows in self._engine.run(iter([shard]), journal=journal, scored=lambda: None):
                self._table.write(done, rows)
                journal.forget(done)
        return {"name": shard.name}
