"""What a path is: the one place where kinds of artifact are told apart."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path

from ivdr_deploy.artifacts.manifest import MANIFEST_FILE
from ivdr_deploy.errors import ArtifactError

SCORE_LEDGER_FILE = "_run.json"
"""What makes a folder a score table."""


class Kind(StrEnum):
    """Of artifact; the value is its name for people."""

    BUNDLE = "bundle"
    CHECKPOINT = "checkpoint"
    ONNX = "ONNX file"
    ENGINE = "TensorRT plan"
    ARCHIVE = "archive"
    SCORES = "score table"
    SHARD = "shard of a score table"


_SUFFIXES = {
    ".safetensors": Kind.CHECKPOINT,
    ".onnx": Kind.ONNX,
    ".engine": Kind.ENGINE,
    ".mar": Kind.ARCHIVE,
    ".parquet": Kind.SHARD,
}
_EXPECTED = f"a bundle, a score table, or a file ending in {', '.join(_SUFFIXES)}"


def identify(path: str | Path) -> tuple[Kind, Path]:
    """Tell what a path is, and which path stands for it.

    A manifest stands for its bundle, a sidecar for its plan, a ledger for its table.

    Raises:
        ArtifactError: if nothing is there, or it is no artifact of ours.
    """
    path = Path(path)
    if path.name in (MANIFEST_FILE, SCORE_LEDGER_FILE) and os.path.isfile(path):
        path = path.parent
    elif path.name.endswith(".engine.json"):
        path = path.with_suffix("")
    if os.path.isdir(path):
        for name, kind in ((MANIFEST_FILE, Kind.BUNDLE), (SCORE_LEDGER_FILE, Kind.SCORES)):
            if os.path.isfile(path / name):
                return kind, path
        raise ArtifactError(
            f"{path} is a folder, but neither a bundle nor a score table", hint=f"expected {_EXPECTED}"
        )
    if not os.path.isfile(path):  # unlike Path.is_file, not a traceback for a name that is too long
        raise ArtifactError(f"{path} is absent", hint=f"expected {_EXPECTED}")
    if path.suffix not in _SUFFIXES:
        raise ArtifactError(f"{path} is no artifact of ivdr", hint=f"expected {_EXPECTED}")
    return _SUFFIXES[path.suffix], path
