"""What a process and everything it started cost: memory together, and time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

_LOOK_SECONDS = 0.01


@dataclass(slots=True)
class Cost:
    """What a block cost; complete when it has ended."""

    memory_bytes: int = 0
    """Largest sum, over the processes that lived at one time, of the most memory that each has had until then."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Processor time: what a test can hold against a limit on a machine that does other things too."""


@contextmanager
def measured(pid: int) -> Iterator[Cost]:
    """Measure a process and its descendants while the block runs. Linux only.

    The system keeps the largest memory of a process, so that a short peak between two looks counts too.
    """
    cost, ended = Cost(), threading.Event()
    used: dict[int, float] = {}
    before = {one: _cpu_seconds(one) for one in _tree(pid)}

    def look() -> None:
        tree = _tree(pid)
        cost.memory_bytes = max(cost.memory_bytes, sum(map(_peak_bytes, tree)))
        used.update({one: max(used.get(one, 0.0), _cpu_seconds(one)) for one in tree})

    def watch() -> None:
        while not ended.wait(_LOOK_SECONDS):
            look()

    watching = threading.Thread(target=watch)
    begin = time.perf_counter()
    watching.start()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - begin
        ended.set()
        watching.join()
        look()
        cost.cpu_seconds = sum(used.values()) - sum(before.values())


def _tree(pid: int) -> list[int]:
    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _peak_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return 0
    kept = status.partition("VmHWM:")[2].split()  # a process that only waits to be collected has none
    return int(kept[0]) << 10 if kept else 0


def _cpu_seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:  # it has ended
        return 0.0
    return float(times.user + times.system)
