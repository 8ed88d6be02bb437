"""The stage as actors of Ray Data: one item of the data set is a shard, and each actor commits what it scored.

Ray starts an actor that died anew, and gives it the shard again; what is committed is not lost by that, nor scored
twice. Inside an actor runs the same supervisor as without Ray: an input that kills its process does not kill the actor.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from ivdr_deploy._optional import require
from ivdr_deploy.errors import ConfigError, FolderError, IvdrError
from ivdr_deploy.scoring.attempts import Journal
from ivdr_deploy.scoring.plan import RunPlan, name_differences
from ivdr_deploy.scoring.shard import Shard
from ivdr_deploy.scoring.stage import Row
from ivdr_deploy.scoring.store import open_store
from ivdr_deploy.scoring.supervisor import Supervisor
from ivdr_deploy.scoring.table import ScoreTable
from ivdr_deploy.scoring.task import Task
from ivdr_deploy.video.remote import is_url

_HERE = "127.0.0.1"
_LOCAL = {"address": "local", "include_dashboard": False, "_node_ip_address": _HERE}
"""Of a cluster that is started for this run."""

_LOOPBACK_ALONE = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
"""Read when Ray is imported. Without it Ray takes an address of the network in place of the one above, and whoever
reaches the machine may run code on it."""


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
        local = {} if os.environ.get("RAY_ADDRESS") else _LOCAL
        if local:
            os.environ.setdefault(*_LOOPBACK_ALONE)
        self._ray = require("ray", extra="ray")
        require("ray.data", extra="ray")
        if task.decode.isolation != "process":
            raise ConfigError("with Ray videos are decoded in processes", hint="leave --isolation out")
        # The working directories of the nodes are others.
        self._task = replace(task, artifact=task.artifact.absolute())
        self._where = where if is_url(where) else os.path.abspath(where)
        self._ray.init(log_to_driver=False, logging_level="ERROR", **local)
        if local and self._ray.nodes()[0]["NodeManagerAddress"] != _HERE:
            self.close()
            raise ConfigError(
                "the cluster of this machine can be reached from other machines",
                hint=f"set {'='.join(_LOOPBACK_ALONE)} before Ray is imported, or name a cluster in RAY_ADDRESS",
            )
        self._ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        have = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        self._gpus = 1 if task.device == "cuda" else 0
        self._cpus, self._actors = actor_shares(have, task.decode.workers + 1, gpus=self._gpus)
        shares = {"num_cpus": self._cpus, "num_gpus": self._gpus}
        try:
            opened = self._ray.get(self._ray.remote(_open).options(**shares).remote(self._task))
        except self._ray.exceptions.RayTaskError as error:
            self.close()
            raise error.cause from None
        self.plan: RunPlan = opened[0]
        self.manifest: Mapping[str, Any] = opened[1]

    def run(
        self, shards: Iterator[Shard], *, journal: Journal, scored: Callable[[], object]
    ) -> Iterator[tuple[Shard, list[Row] | None]]:
        """Yield each shard when an actor has committed it; the list is gone through before the first is begun.

        Raises:
            IvdrError, OSError: what an actor met, such as a full disk.
        """
        data = self._ray.data
        # Packed: there may be millions of inputs.
        items = [{"shard": pickle.dumps(found_everywhere(shard))} for shard in shards]
        if not items:
            return
        done = data.from_items(items, override_num_blocks=len(items)).map(
            _Actor,
            fn_constructor_args=(self._task, self._where, self.plan),
            compute=data.ActorPoolStrategy(min_size=1, max_size=self._actors),
            num_cpus=self._cpus,
            num_gpus=self._gpus,
        )
        for row in done.iter_rows():
            if row["failed"]:
                raise pickle.loads(row["failed"])
            shard: Shard = pickle.loads(row["shard"])
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


def found_everywhere(shard: Shard) -> Shard:
    """Return a shard whose files are found from every working directory."""
    inputs = (
        item._replace(file=os.path.abspath(item.file)) if isinstance(item.file, str) else item
        for item in shard.inputs
    )
    return replace(shard, inputs=tuple(inputs))


def _open(task: Task) -> tuple[RunPlan, Mapping[str, Any]]:
    """Open the model where there is what it needs; returns what decides the rows, and what it says about itself."""
    with Supervisor(task) as engine:
        return engine.plan, engine.manifest


class _Actor:
    """Scores one shard after the other, and commits each."""

    def __init__(self, task: Task, where: str, plan: RunPlan) -> None:
        self._engine = Supervisor(task)
        if differ := plan.differences(self._engine.plan):
            raise FolderError(
                f"the nodes of the cluster differ ({name_differences(differ)})",
                hint="install the same on every node",
            )
        self._store = open_store(where)
        self._table = ScoreTable(self._store, plan, manifest=self._engine.manifest)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        try:
            self._score(pickle.loads(item["shard"]))
        except (IvdrError, OSError) as error:  # as a value: Ray writes into the exceptions that it passes on
            return {**item, "failed": pickle.dumps(error)}
        return {**item, "failed": b""}

    def _score(self, shard: Shard) -> None:
        if not self._store.has(shard.name):  # an actor before this one may have died just after it
            journal = Journal(self._store)
            for done, rows in self._engine.run(iter([shard]), journal=journal, scored=lambda: None):
                self._table.write(done, rows)
                journal.forget(done)


def actor_shares(nodes: Sequence[Mapping[str, float]], wanted: int, *, gpus: int) -> tuple[int, int]:
    """Return the cores of an actor, and how many actors there may be.

    Args:
        nodes: Resources of each node, as Ray counts them.
        wanted: Cores that an actor would take; fewer where no node has as many, since an actor is on one node.
        gpus: GPUs of an actor.
    """
    cpus = max(1, min(wanted, max((int(node.get("CPU", 0)) for node in nodes), default=1)))
    fit = (int(node.get("CPU", 0)) // cpus for node in nodes)
    if gpus:
        fit = (min(ours, int(node.get("GPU", 0)) // gpus) for ours, node in zip(fit, nodes, strict=True))
    return cpus, max(1, sum(fit))
