"""Who may import whom, what loads nothing heavy, and which numbers exist once."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEAVES = {
    "errors",
    "records",
    "spec",
    "_files",
    "_optional",
    "_console",
    "environment",
    "datalist",
    "metrics",
}
RUNTIMES = LEAVES | {"models", "checkpoint", "bundle", "runtimes"}
PIPELINE = LEAVES | {"video", "runtimes", "pipeline"}
SERVICES = PIPELINE | {"bundle", "checkpoint"}

ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "records": {"errors"},
    "spec": {"errors", "records"},
    "_files": set(),
    "_optional": {"errors"},
    "environment": set(),
    "_console": {"errors"},
    "datalist": {"errors", "_files"},
    "metrics": {"errors"},
    "video": {"errors", "records", "spec", "_optional", "video"},
    "models": {"errors", "records", "spec", "_optional", "models"},
    "checkpoint": {"errors", "records", "spec", "_files", "models"},
    "bundle": {"errors", "records", "spec", "_files"},
    "runtimes": RUNTIMES,
    "pipeline": PIPELINE - {"datalist", "metrics", "_console", "environment"},
    "export": RUNTIMES | PIPELINE | {"export"},
    "serving": SERVICES | {"serving"},
    "scoring": SERVICES | {"scoring"},
    "benchmarks": SERVICES | {"benchmarks"},
    "train": SERVICES | {"models"},
    "handlers": {"serving"},
}
"""Part -> parts of ivdr_deploy that it may import, anywhere in its code. ``cli`` and ``train.demo`` may import all."""


def _sources() -> list[Path]:
    return [
        path
        for folder in ("ivdr_deploy", "train", "handlers")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]


def _part(path: Path) -> str:
    """Name the part of the project that a file belongs to."""
    relative = path.relative_to(ROOT)
    if relative.parts[0] != "ivdr_deploy":
        return "train.demo" if relative.parts[:2] == ("train", "demo") else relative.parts[0]
    return relative.parts[1] if len(relative.parts) > 2 else relative.stem


def _imports(tree: ast.AST) -> set[str]:
    """Return the dotted names of all imported modules, wherever the import stands."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _project_parts(names: set[str]) -> set[str]:
    parts = {name.split(".")[1] for name in names if name.startswith("ivdr_deploy.")}
    parts = {
        part
        for part in parts
        if (ROOT / "ivdr_deploy" / part).is_dir() or (ROOT / "ivdr_deploy" / f"{part}.py").is_file()
    }
    return parts | {name.split(".")[0] for name in names if name.split(".")[0] in {"train", "handlers"}}


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    part = _part(path)
    if part in {"cli", "train.demo"}:
        assert "handlers" not in _project_parts(_imports(ast.parse(path.read_text())))
        return
    found = _project_parts(_imports(ast.parse(path.read_text()))) - {"train" if part == "train" else ""}
    assert found <= ALLOWED[part], f"{path.name} ({part}) must not import {sorted(found - ALLOWED[part])}"


def test_every_part_has_a_rule() -> None:
    assert {_part(path) for path in _sources()} == set(ALLOWED) | {"cli", "train.demo"}


def test_normalisation_numbers_stand_in_the_contract_only() -> None:
    numbers = {0.485, 0.456, 0.406, 0.229, 0.224, 0.225}
    places = {
        path.name
        for path in _sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in numbers
    }
    assert places == {"spec.py"}


@pytest.mark.parametrize(
    "module", ["ivdr_deploy", "ivdr_deploy.cli", "ivdr_deploy.pipeline", "ivdr_deploy.runtimes.loading"]
)
def test_import_loads_nothing_heavy(module: str) -> None:
    heavy = "'torch', 'onnx', 'onnxruntime', 'av', 'cv2', 'pyarrow', 'tensorrt', 'tensorrt_rtx'"
    code = f"import sys, {module}; print([name for name in ({heavy}) if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"


def test_handler_file_defines_one_class() -> None:
    tree = ast.parse((ROOT / "handlers" / "ivdr_handler.py").read_text())
    assert len([node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]) == 1
