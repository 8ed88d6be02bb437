"""Runs a command and ends its process group when whoever started this is gone, however that happened.

A program of its own, started by its path: ``guard.py COMMAND...``. Its standard input is a pipe that nothing is written
to; the system closes it when the process that holds the other end dies, killed or not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil

POLL_SECONDS = 0.2

END_SECONDS = 20.0
"""For processes to end after a signal; then they are killed."""

_ORPHAN_SECONDS = 3.0
"""The same where whoever started them is gone, and nobody waits for their answers."""


def end_group(group: int, *, spare: int | None = None, seconds: float | None = None) -> int:
    """End the processes of a group, all but ``spare``; return how many had to be killed.

    Args:
        group: The process group.
        spare: A process of it.
        seconds: For the others to end by themselves; ``END_SECONDS`` when None.
    """
    _signal(group, signal.SIGTERM)
    deadline = time.monotonic() + (END_SECONDS if seconds is None else seconds)
    while (left := _members(group, spare)) and time.monotonic() < deadline:
        psutil.wait_procs(left, timeout=POLL_SECONDS)
    if left:
        _signal(group, signal.SIGKILL)
    return len(left)


def _members(group: int, spare: int | None) -> list[psutil.Process]:
    """List the processes of a group, without those that have ended and only wait to be collected."""
    members = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if (
                process.pid != spare
                and os.getpgid(process.pid) == group
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                members.append(process)
    return members


def _signal(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _outlive(number: int, frame: object) -> None:
    """Let a signal to the group end the command first, whose end is waited for."""


_ending = threading.Event()
"""Whoever started this is gone, and the group is being ended."""


def _end_with_starter() -> None:
    os.read(0, 1)  # not through sys.stdin, whose lock would be held when the interpreter ends
    _ending.set()
    end_group(os.getpgrp(), spare=os.getpid(), seconds=_ORPHAN_SECONDS)


def main(command: list[str]) -> int:
    """Run the command in this process group; return its exit code."""
    signal.signal(signal.SIGTERM, _outlive)  # a function and not SIG_IGN, which the command would inherit
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    watch = threading.Thread(target=_end_with_starter, daemon=True)
    watch.start()
    code = server.wait()
    if _ending.is_set():  # the command has ended, others of its group may not have
        watch.join()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
