"""A scoring process, seen from outside: started, spoken with, and how it ended."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Pipe
from typing import Any

from ivdr_deploy.environment import ending, only_gpu
from ivdr_deploy.errors import ResourceError, VideoCrashError, VideoTimeoutError
from ivdr_deploy.scoring.stage import Group
from ivdr_deploy.scoring.task import FAILED, READY, Opened, Task

_END_SECONDS = 10.0
"""How long it may take to close what it has open."""

DIED = "died"
"""What is received when it says nothing any more; with a ``VideoError`` that tells how it ended."""


class Worker:
    """The process of ``worker``; its model is open when this returns.

    Raises:
        IvdrError: what it met when it opened the model.
    """

    def __init__(self, task: Task) -> None:
        self._channel, theirs = Pipe()
        life, self._life = os.pipe()
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-W",  # a worker that dies leaves what its tracker removes, and then complains of
                "ignore::UserWarning:multiprocessing.resource_tracker",
                "-m",
                "ivdr_deploy.scoring.worker",
                str(theirs.fileno()),
                str(life),
            ],
            pass_fds=(theirs.fileno(), life),
            env=os.environ | ({} if task.gpu is None else only_gpu(task.gpu)),
            stdin=subprocess.DEVNULL,
            stdout=2,  # what libraries print; stdout is for results
            start_new_session=True,  # Ctrl-C is for the supervisor
        )
        self.pid = self._process.pid
        theirs.close()
        os.close(life)
        try:
            self._channel.send(task)
            self.opened = self._opening()
        except BaseException:
            self.close()
            raise

    def _opening(self) -> Opened:
        assert self._process is not None
        try:
            kind, said = self._channel.recv()
        except (EOFError, OSError):
            how = ending(self._process.wait())
            raise ResourceError(
                f"the scoring process {how} while it opened the model",
                hint="the machine's memory, or the engine: `ivdr predict` on one video shows it",
            ) from None
        if kind == FAILED:
            raise said
        assert kind == READY
        return said  # type: ignore[no-any-return]

    def receive(self, seconds: float) -> tuple[Any, ...]:
        """Return what it says next, or ``(DIED, error)``; it is killed if it says nothing for so long."""
        assert self._process is not None
        try:
            if self._channel.poll(seconds):
                return self._channel.recv()  # type: ignore[no-any-return]
        except (EOFError, OSError):
            how = ending(self._process.wait())
            return DIED, VideoCrashError(f"the process that scored it {how}")
        self._process.kill()
        return DIED, VideoTimeoutError(
            f"the process that scored it did not answer within {seconds:g} s and was killed; this may depend on the "
            "load of the machine"
        )

    def tell(self, what: Group | None) -> None:
        """Answer it."""
        with suppress(BrokenPipeError, ConnectionResetError):  # it died: what it says next is that
            self._channel.send(what)

    def close(self) -> None:
        """End it, whatever it does; calling it twice is allowed."""
        if self._process is not None:
            self._channel.close()  # it notices with the next row, or at once when it waits
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            os.close(self._life)
            self._process = None
