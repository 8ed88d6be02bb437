"""Training in processes of its own, one or several, on the loopback interface."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import TCPStore

HERE = Path(__file__).parent


def start(code: str, *arguments: str, processes: int = 1) -> list[subprocess.Popen[str]]:
    """Start Python code in processes that train together; it finds what lies beside the tests of training."""
    # Where they meet is here, as with ``torchrun``: a port that is only looked up may be another's when it is wanted.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if processes > 1 else None
    started: list[subprocess.Popen[str]] = []
    for rank in range(processes):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE), str(HERE.parent)]),
            "OMP_NUM_THREADS": "1",
        }
        if store is not None:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "GLOO_SOCKET_IFNAME": "lo",
            }
        started.append(
            subprocess.Popen(
                [sys.executable, "-P", "-c", code, *arguments],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    weakref.finalize(started[0], lambda kept: None, store)  # until nobody has the processes any more
    return started


def finish(started: Sequence[subprocess.Popen[str]], *, seconds: float = 400.0) -> list[tuple[int, str]]:
    """Wait for processes; return exit code and stderr of each. Where one fails the others are killed, and come last."""
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in started):
        if any(process.poll() for process in started) or time.monotonic() > deadline:
            for process in started:
                process.kill()
        time.sleep(0.05)
    errors = [process.communicate()[1] for process in started]
    ended = [(process.returncode, error) for process, error in zip(started, errors, strict=True)]
    return sorted(ended, key=lambda one: one[0] == -signal.SIGKILL)
