"""The journal of shards that were begun and are not there yet: what killed a process once is not met for ever.

One small file per shard, gone when the shard is committed. An end that the supervisor of a worker saw is told apart
from one that took the supervisor along, such as SIGKILL to all of a container: the latter says nothing about an input
until it has happened several times.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace

from ivdr_deploy.errors import ConfigError
from ivdr_deploy.records import from_dict, to_dict
from ivdr_deploy.scoring.shard import SHARD_NAME, Shard
from ivdr_deploy.scoring.store import Store

UNSEEN_ENDS = 3
"""Runs that ended in the same shard, nobody knows how, after which its inputs are tried one by one."""

ALONE_ENDS = 2
"""Runs that ended while an input was tried alone, after which it is not tried again."""

_NAME = "_attempt-{}.json"
_NAMED = re.compile(r"_attempt-[0-9a-f]{16}\.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempts:
    """What is known about the attempts at one shard."""

    begun: int = 0
    """How many processes began it."""

    deaths: tuple[str, ...] = ()
    """How workers ended that a supervisor saw end."""

    alone: dict[str, int] = field(default_factory=dict)
    """Keys of inputs that were being tried alone when a run ended that nobody saw end, and how often."""


class Journal:
    """Reads and writes the attempts at the shards of one table."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known = set(filter(is_attempt, store.names()))

    def begin(self, shard: Shard) -> Attempts:
        """Note that a shard is begun; returns what was known before."""
        before = self.read(shard)
        self._write(shard, replace(before, begun=before.begun + 1))
        return before

    def read(self, shard: Shard) -> Attempts:
        """Return what is known about a shard. A file that is damaged says nothing."""
        name = _name(shard)
        if name not in self._known:
            return Attempts()
        try:
            with self._store.open(name) as stream:
                return from_dict(Attempts, json.loads(stream.read()), where=name)
        except (FileNotFoundError, ValueError, RecursionError, ConfigError):
            return Attempts()  # it is written anew, and costs attempts at most

    def died(self, shard: Shard, how: str) -> None:
        """Note that a worker ended in this shard, and that this process lives."""
        before = self.read(shard)
        self._write(shard, replace(before, deaths=(*before.deaths, how), alone={}))

    def alone(self, shard: Shard, key: str) -> int:
        """Note that an input is tried alone; returns in how many earlier runs that was the last thing."""
        before = self.read(shard)
        ends = before.alone.get(key, 0)
        self._write(shard, replace(before, alone={**before.alone, key: ends + 1}))
        return ends

    def answered(self, shard: Shard, key: str) -> None:
        """Note that an input that was tried alone has its row."""
        before = self.read(shard)
        self._write(
            shard,
            replace(before, alone={other: ends for other, ends in before.alone.items() if other != key}),
        )

    def forget(self, shard: Shard) -> None:
        """Remove what is known about a shard that is committed."""
        if (name := _name(shard)) in self._known:
            self._store.remove(name)
            self._known.remove(name)

    def clear(self) -> None:
        """Remove what is left of shards that were committed just before a kill, or that a changed list has not."""
        for name in filter(is_attempt, self._store.names()):  # also what another process noted
            self._store.remove(name)
        self._known.clear()

    def _write(self, shard: Shard, attempts: Attempts) -> None:
        self._store.write(_name(shard), json.dumps(to_dict(attempts)).encode())
        self._known.add(_name(shard))


def is_attempt(name: str) -> bool:
    """Whether a file of a table is one of the journal."""
    return _NAMED.fullmatch(name) is not None


def _name(shard: Shard) -> str:
    match = SHARD_NAME.fullmatch(shard.name)
    assert match is not None, shard.name
    return _NAME.format(match["digest"])
