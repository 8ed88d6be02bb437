"""What stands in for a part of a server in the benchmark; Python runs it at the start of each process of that server.

The folder that ``sitecustomize`` lies in is put on the ``PYTHONPATH`` of those servers alone.
"""

from __future__ import annotations

import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

ACCELERATOR = "IVDR_BENCH_ACCELERATOR"
"""Set to the JSON of ``accelerator.Cost`` where one stands in for ONNX Runtime."""

TURN = "IVDR_BENCH_TURN"
"""A file that the workers of a server lock while they use the accelerator: it is one, however many they are."""

ECHO = "IVDR_BENCH_ECHO"
"""Set where the service is to answer at once, so that the server alone is measured."""


def variables(folder: Path, **stand_ins: str) -> dict[str, str]:
    """Write ``sitecustomize`` into a folder; return the environment of a server that has the stand-ins."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text("from examples.serving import stand_in\n\nstand_in.install()\n")
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(folder), str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    turn = folder / "turn"
    turn.touch()
    return {"PYTHONPATH": path, TURN: str(turn), **stand_ins}


def install() -> None:
    """Put in place what the environment asks for."""
    if ACCELERATOR in os.environ:
        from ivdr_deploy.runtimes.registry import REGISTRY, RuntimeEntry

        REGISTRY["onnxruntime"] = RuntimeEntry("examples.serving.accelerator", "cpu", 1)
    if ECHO in os.environ:
        from ivdr_deploy.serving.core.schema import Response
        from ivdr_deploy.serving.core.service import InferenceService

        def at_once(service: InferenceService, parts: Any, envelope: Any = None) -> Future[Response]:
            answer: Future[Response] = Future()
            answer.set_result(Response(status=200, body={"bytes": len(parts["body"])}))
            return answer

        setattr(InferenceService, "submit", at_once)  # noqa: B010  # mypy knows that it is not the same
