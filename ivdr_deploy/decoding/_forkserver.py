"""How decode workers are made: forked from a server that has the decoder loaded. Not every system can."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import threading
import types
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from typing import Any


def context() -> ForkServerContext:
    """Return how worker processes are made: forked from a server that has the decoder loaded."""
    multiprocessing.set_forkserver_preload(["ivdr_deploy.decoding._preload"])
    return _Context()


class _Process(ForkServerProcess):
    """A worker process that does not import the program that started it.

    The standard library would run ``__main__`` again in every worker. Jobs are functions of modules and do not need it:
    a TorchServe worker would load torch a second time, and a script without a guard around its main part would start
    itself over.
    """

    @staticmethod
    def _Popen(process: BaseProcess) -> Any:  # noqa: N802  # the standard library's name
        with _without_main():
            return ForkServerProcess._Popen(process)


class _Context(ForkServerContext):
    Process = _Process


_main_lock = threading.Lock()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    with _main_lock:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main
