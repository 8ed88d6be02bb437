"""Units of work side by side, each in a process of its own with a part of the cores."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess

from examples.training.measure import measure
from examples.training.methods import Unit
from ivdr_deploy._console import console, exiting
from ivdr_deploy.environment import ending, usable_cores
from ivdr_deploy.errors import IvdrError

LOG = "log.txt"
"""What a unit prints, in its folder."""

_INTERRUPTED = (130, 143, -2, -15)
"""Exit codes of a process that was told to stop."""


def side_by_side(units: Sequence[Unit], *, at_once: int) -> Iterator[Unit]:
    """Measure units, several at once, and yield each when it is done.

    A process of one thread trains ``tiny`` at two thirds of the speed of one that has two cores, so two of them do
    more. Each keeps what it has when it is told to stop.

    Args:
        units: What to do, in this order.
        at_once: Processes; they share the cores.

    Raises:
        IvdrError: if one of them fails. The others are stopped.
    """
    threads = str(max(1, usable_cores() // at_once))
    os.environ.setdefault("OMP_NUM_THREADS", threads)  # the processes take it over, before torch is loaded
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(units))
    running: dict[SpawnProcess, Unit] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                unit = waiting.pop()
                process = context.Process(target=_measure, args=(unit,))
                process.start()
                running[process] = unit
                console.print(f"{unit.title}: log in {unit.folder / LOG}", markup=False)
            wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                unit = running.pop(process)
                if process.exitcode:
                    raise _failed(unit, process.exitcode)
                yield unit
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join()


def _failed(unit: Unit, code: int) -> BaseException:
    if code in _INTERRUPTED:
        return KeyboardInterrupt()
    path = unit.folder / LOG
    last = (
        path.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        if path.is_file()
        else ""
    )
    return IvdrError(f"{unit.title}: the process {ending(code)}; {path} ends with: {last[:300]}")


def _measure(unit: Unit) -> None:
    unit.folder.mkdir(parents=True, exist_ok=True)
    with (unit.folder / LOG).open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    with exiting("results-training"):
        measure(unit)
