"""How decode workers are made: forked from a server that has the decoder loaded. Not every system can."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from multiprocessing import util
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from typing import Any

_SOCKET_PATH_BYTES = 103
"""Longest path of a Unix socket on macOS; on Linux it may have 107."""

_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")

_SAFE_PATH = "PYTHONSAFEPATH"
"""The variable that does what ``python -P`` does, in a process whose command line is the standard library's."""


def context() -> ForkServerContext:
    """Return how worker processes are made: forked from a server that has the decoder loaded."""
    multiprocessing.set_forkserver_preload(["ivdr_deploy.decoding._preload"])
    _keep_socket_path_short()
    return _Context()


def _keep_socket_path_short() -> None:
    """Let the server's socket lie in a short folder where the temporary one is too deep for it.

    The temporary folder of a TorchServe worker is that of its run folder. Python 3.14 does this by itself.
    """
    settings = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
    folder = settings.get("tempdir") or f"{tempfile.gettempdir()}/pymp-12345678"
    if len(os.fsencode(folder)) + len("/listener-12345678") <= _SOCKET_PATH_BYTES:
        return
    short = next((base for base in _SHORT_FOLDERS if os.access(base, os.W_OK | os.X_OK)), None)
    if short is not None:
        folder = tempfile.mkdtemp(prefix="pymp-", dir=short)
        util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-100)
        settings["tempdir"] = folder


class _Process(ForkServerProcess):
    """A worker process that runs neither the program that started it nor what lies in the working directory.

    The standard library would run ``__main__`` again in every worker. Jobs are functions of modules and do not need it:
    a TorchServe worker would load torch a second time, and a script without a guard around its main part would start
    itself over. It also starts its servers with ``python -c``, which looks for modules in the working directory first.
    """

    @staticmethod
    def _Popen(process: BaseProcess) -> Any:  # noqa: N802  # the standard library's name
        with _lock, _without_main(), _safe_path():
            return ForkServerProcess._Popen(process)


class _Context(ForkServerContext):
    Process = _Process


_lock = threading.Lock()
"""Held while this process looks different to what is started."""


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = before
