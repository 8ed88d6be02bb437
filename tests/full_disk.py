"""A disk that is full, as far as a program can tell: no file of it, or of what it starts, may grow beyond a size."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_PROGRAM = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # otherwise it would be the end of the process instead of an error

def fill():
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))

{before}
from ivdr_deploy._console import exiting
with exiting("ivdr"):
    {statement}
"""


def run_on_full_disk(
    statement: str, *, limit: int, before: str = "fill()", environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Run a statement as a command would, in a process of its own.

    Args:
        statement: What to run, on one line.
        limit: Bytes that a file may have.
        before: Imports, and the call of ``fill()`` from which the limit holds.
        environment: Variables to set.

    Returns:
        The exit code and the last line on stderr.
    """
    program = _PROGRAM.format(limit=limit, before=before, statement=statement)
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1", **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]
