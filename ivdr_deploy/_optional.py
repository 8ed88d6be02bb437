"""Import of packages that only an extra installs, with an error that names the extra."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from ivdr_deploy._text import quoted, reason_of
from ivdr_deploy.errors import MissingDependencyError


def require(module: str, *, extra: str) -> ModuleType:
    """Import ``module``, or say which extra installs it.

    Raises:
        MissingDependencyError: if the module, or something it needs, cannot be imported. The cause is in the message,
            since a broken installation looks the same as an absent one otherwise.
    """
    return _import(module, extra)


def import_onnxruntime() -> ModuleType:
    """Import ONNX Runtime with its telemetry off. Nothing else in the project imports it.

    From 1.29 on, the import alone writes a device id under the home folder and looks up a server, unless
    ``ORT_DISABLE_TELEMETRY`` is set before. A value that is already in the environment stays.

    Raises:
        MissingDependencyError: if it cannot be imported, or only a part of it is left: ``onnxruntime`` and
            ``onnxruntime-gpu`` share a folder, and whoever removes one of the two takes files of the other.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    module = _import("onnxruntime", "cpu", "gpu")
    if not hasattr(module, "InferenceSession"):
        raise MissingDependencyError(
            f"the package 'onnxruntime' is incomplete (no InferenceSession in {list(module.__path__)})",
            hint=f"pip uninstall onnxruntime onnxruntime-gpu, then {pip_install('cpu', 'gpu')}",
        )
    return module


def import_pyarrow() -> ModuleType:
    """Import pyarrow, its Parquet reader and what computes with columns, with the memory of the C library.

    The package imports it nowhere else. Its own allocator reserves 1 GiB of address space with the first column that is
    read: under a limit of the address space (``ulimit -v``) nothing was left for threads. An allocator that is already
    in the environment stays.
    """
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    for part in ("parquet", "compute"):
        importlib.import_module(f"pyarrow.{part}")
    return importlib.import_module("pyarrow")


def pip_install(*extras: str) -> str:
    """Return the command that installs an extra, or one of several that exclude each other."""
    return "pip install " + ", or ".join(f"'ivdr-deploy[{extra}]'" for extra in extras)


def _import(module: str, *extras: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"the package {quoted(module)} cannot be imported ({reason_of(error)})",
            hint=f"install it with: {pip_install(*extras)}",
        ) from error
