"""The side of a process that holds one engine: opens a variant, and runs a turn whenever it is told to.

``engines`` starts it with ``python -P -m`` and one argument, the JSON of ``Task``. It answers on standard output with a
line of JSON for each line that it reads; what libraries print goes to standard error. It ends when its input does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ivdr_deploy.benchmarks.timing import time_ms
from ivdr_deploy.errors import IvdrError, ResourceError
from ivdr_deploy.records import from_dict
from ivdr_deploy.runtimes.base import Runtime
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.spec import Device

_LEAST_WARM, _LEAST_TIMED = 2, 3
"""Calls of a turn, however long they take."""

_LOOK_SECONDS = 0.005
_QUIET_LOOKS = 4
"""In a row: on a busy machine a thread that spins may get no core between two looks."""

_REST_SECONDS = 5.0
"""Threads that have not come to rest by then are told to spin for ever."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What one process is to run."""

    bundle: str
    variant: str
    device: Device
    threads: int | None
    clips: str
    """A ``.npy`` file, uint8 (N, T, H, W, 3)."""

    batch: int


def main() -> None:
    """Serve turns until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to everybody; whoever started this ends it
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    task = from_dict(Task, json.loads(sys.argv[1]), where="task")
    try:
        _serve(task, answers)
    except IvdrError as error:
        _answer(answers, error=type(error).__name__, message=error.message, hint=error.hint)
    except BrokenPipeError:
        sys.exit(1)  # nobody is there any more


def _serve(task: Task, answers: TextIO) -> None:
    clips = np.load(task.clips)
    model = open_model(Path(task.bundle), variant=task.variant, device=task.device, threads=task.threads)
    with model.runtime as runtime:
        rest()
        _answer(answers, runtime=runtime.description)
        for line in sys.stdin:
            milliseconds = _turn(runtime, clips, task.batch, seconds=json.loads(line)["seconds"])
            rest()
            _answer(answers, ms=milliseconds)


def _turn(runtime: Runtime, clips: np.ndarray, batch: int, *, seconds: float) -> list[float]:
    """Run untimed calls, which bring caches and threads back, then timed ones; returns their milliseconds."""
    calls = [clips[start : start + batch] for start in range(0, len(clips) - batch + 1, batch)]
    milliseconds: list[float] = []
    for least, until in ((_LEAST_WARM, seconds / 4), (_LEAST_TIMED, seconds)):
        milliseconds.clear()
        start = time.perf_counter()
        while len(milliseconds) < least or time.perf_counter() - start < until:
            call = calls[len(milliseconds) % len(calls)]
            milliseconds.append(time_ms(lambda call=call: runtime.infer(call))[1])  # type: ignore[misc]
    return milliseconds


def rest() -> None:
    """Wait until the threads of this process sleep.

    OpenMP's go on spinning for some milliseconds after a call, on cores that the next process needs.

    Raises:
        ResourceError: if they do not.
    """
    begin, quiet = time.perf_counter(), 0
    while time.perf_counter() - begin < _REST_SECONDS:
        start, used = time.perf_counter(), time.process_time()
        time.sleep(_LOOK_SECONDS)
        quiet = quiet + 1 if time.process_time() - used < 0.2 * (time.perf_counter() - start) else 0
        if quiet == _QUIET_LOOKS:
            return
    raise ResourceError(
        f"the threads of the engine still run {_REST_SECONDS:g} s after the call, so that it would slow others",
        hint="unset OMP_WAIT_POLICY, GOMP_SPINCOUNT and KMP_BLOCKTIME",
    )


def _answer(answers: TextIO, **values: Any) -> None:
    print(json.dumps(values), file=answers, flush=True)


if __name__ == "__main__":
    main()
