"""Every runtime by name: where its code lies, what it needs, and how willingly it is taken.

Adding one is an entry here and a module with two functions:

* ``misfit(variant, device) -> str``: why a variant cannot run on this machine, without loading it; empty when it can;
* ``open_variant(request) -> Runtime``: open it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol, cast

from ivdr_deploy._optional import pip_install
from ivdr_deploy._text import QUOTED, one_line, quoted, reason_of
from ivdr_deploy.artifacts.manifest import Variant
from ivdr_deploy.environment import instruction_sets, let_threads_sleep
from ivdr_deploy.errors import MissingDependencyError
from ivdr_deploy.runtimes.base import OpenRequest, Runtime
from ivdr_deploy.spec import Device, RuntimeName


class RuntimeModule(Protocol):
    """What the module of a runtime offers."""

    def misfit(self, variant: Variant, device: Device) -> str:
        """Say why ``variant`` cannot run here on ``device``; empty when it can."""

    def open_variant(self, request: OpenRequest) -> Runtime:
        """Open a variant."""


@dataclass(frozen=True, slots=True)
class RuntimeEntry:
    """One runtime."""

    module: str
    extra: str
    """Extra of this package that installs what it needs."""

    rank: int
    """Of several variants that fit, that of the lowest rank is taken."""

    machine_code: bool = False
    """Whether to load a file is to run what is in it."""


REGISTRY: dict[RuntimeName, RuntimeEntry] = {
    "tensorrt": RuntimeEntry("ivdr_deploy.runtimes.trt_runtime", "trt", 0),
    "onnxruntime": RuntimeEntry("ivdr_deploy.runtimes.ort_runtime", "cpu", 1),
    "torch": RuntimeEntry("ivdr_deploy.runtimes.torch_runtime", "export", 2),
    "aoti": RuntimeEntry("ivdr_deploy.runtimes.aoti_runtime", "export", 3, machine_code=True),
}


def load_runtime(name: RuntimeName) -> RuntimeModule:
    """Import the module of a runtime.

    Raises:
        MissingDependencyError: if a package that it needs is not installed; names the extra that installs it.
    """
    entry = REGISTRY[name]
    let_threads_sleep()
    try:
        return cast(RuntimeModule, importlib.import_module(entry.module))
    except ImportError as error:
        raise MissingDependencyError(
            f"the runtime {quoted(name)} cannot be loaded ({reason_of(error)})",
            hint=f"install what it needs: {pip_install(entry.extra)}",
        ) from error


def misfit(variant: Variant, device: Device) -> str:
    """Say why a variant cannot run on this machine and device; empty when it can."""
    if variant.target.device not in (None, device):
        return f"it runs on {variant.target.device}, not on {device}"
    if reason := missing_instructions(variant.target.instruction_set):
        return reason
    try:
        return load_runtime(variant.runtime).misfit(variant, device)
    except MissingDependencyError as error:
        return str(error)


def missing_instructions(needed: str) -> str:
    """Say that instructions which something needs are not there; empty when they are, or none are needed."""
    if not needed or needed in instruction_sets():
        return ""
    return f"it needs a processor with {one_line(needed[:QUOTED])}, which this one is not known to have"
