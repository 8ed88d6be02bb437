"""Who may import whom, what loads nothing heavy, and which numbers exist once."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS: tuple[set[str], ...] = (
    {"_text", "_memory"},
    {"errors", "_files", "environment"},
    {"records", "_optional", "_console"},
    {"spec"},
    {"video", "models"},
    {"datasets"},
    {"artifacts"},
    {"decoding", "runtimes", "results", "events"},
    {"batching"},
    {"pipeline"},
    {"timeline"},
    {"evaluation", "serving.core", "serving.client", "serving.remote", "scoring", "benchmarks"},
    {"export", "serving.torchserve", "serving.http"},
    {"api"},
    {"cli"},
)
"""Parts of ivdr_deploy from the bottom up. A part imports what stands on lower lines, and itself."""

USERS: dict[str, set[str]] = {
    "train": {
        "evaluation",
        "pipeline",
        "batching",
        "decoding",
        "runtimes",
        "results",
        "artifacts",
        "datasets",
        "video",
        "models",
    },
    "handlers": {"serving.core", "serving.torchserve"},
}
"""Folders outside the package, and the parts that they may import besides those of the first four lines.
``examples`` may import everything; nothing imports ``train``, ``handlers``, ``examples`` or ``cli``."""

NEVER_MODELS = {
    "timeline",
    "pipeline",
    "batching",
    "decoding",
    "serving.core",
    "serving.torchserve",
    "serving.http",
    "serving.client",
    "serving.remote",
    "scoring",
}
"""They run what was exported: none of them needs the network's definition, or torch."""


def _sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def _part(path: Path) -> str:
    """Name the part of the project that a file belongs to."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "ivdr_deploy":
        return parts[0]
    inside = parts[1:]
    if inside[0] == "serving" and len(inside) > 1:
        return "serving" if inside[1] == "__init__" else f"serving.{inside[1]}"
    return inside[0]


def _imports(tree: ast.AST) -> set[str]:
    """Return the dotted names of all imported modules, wherever the import stands."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _project_parts(path: Path) -> set[str]:
    """Return the parts that a file imports, its own excepted."""
    found = set()
    for name in _imports(ast.parse(path.read_text())):
        words = name.split(".")
        if words[0] in {"train", "handlers", "examples"}:
            found.add(words[0])
        elif words[0] == "ivdr_deploy" and len(words) > 1:
            part = ".".join(words[1:3]) if words[1] == "serving" else words[1]
            if (ROOT / "ivdr_deploy" / part.replace(".", "/")).is_dir() or (
                ROOT / "ivdr_deploy" / f"{part.replace('.', '/')}.py"
            ).is_file():
                found.add(part)
    return found - {_part(path), "serving"}


@pytest.mark.parametrize(
    "path", _sources("ivdr_deploy", "train", "handlers"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_imports_point_one_way(path: Path) -> None:
    part = _part(path)
    base = set().union(*LAYERS[:4])
    if part in USERS:
        allowed = base | USERS[part]
    elif part in {"__init__", "serving"}:
        allowed = set().union(*LAYERS[:-1]) if part == "__init__" else set()
    else:
        (level,) = [index for index, layer in enumerate(LAYERS) if part in layer]
        allowed = set().union(*LAYERS[:level])
    if part in NEVER_MODELS:
        allowed -= {"models"}
    found = _project_parts(path)
    assert found <= allowed, f"{path.name} ({part}) must not import {sorted(found - allowed)}"


def test_every_part_has_a_place() -> None:
    parts = {_part(path) for path in _sources("ivdr_deploy")} - {"__init__", "serving"}
    assert parts <= set().union(*LAYERS)


@pytest.mark.parametrize("path", [p for p in _sources("ivdr_deploy") if _part(p) in NEVER_MODELS], ids=str)
def test_what_serves_never_imports_torch(path: Path) -> None:
    assert not {
        name for name in _imports(ast.parse(path.read_text())) if name.split(".")[0].startswith("torch")
    }


def test_normalisation_numbers_stand_in_the_contract_only() -> None:
    numbers = {0.485, 0.456, 0.406, 0.229, 0.224, 0.225}
    places = {
        path.name
        for path in _sources("ivdr_deploy", "train", "handlers", "examples")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in numbers
    }
    assert places == {"spec.py"}


def test_messages_quote_foreign_values_cut_short() -> None:
    """With ``_text.quoted``: what ``!r`` or ``repr`` shows may be megabytes long."""
    places = {
        path.relative_to(ROOT).as_posix()
        for path in _sources("ivdr_deploy", "train", "handlers")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FormattedValue)
        and (node.conversion == ord("r") or _calls(node.value, "repr"))
    }
    # The first names attributes of the package; the second writes a line of Python.
    assert places <= {"ivdr_deploy/__init__.py", "ivdr_deploy/cli/score.py"}


def test_messages_cut_what_an_error_says_at_one_place() -> None:
    """With ``_text.reason_of``: cut by hand, it may still hold line ends and other control characters."""
    places = {
        f"{path.relative_to(ROOT).as_posix()}:{node.lineno}"
        for path in _sources("ivdr_deploy", "train", "handlers")
        for handler in ast.walk(ast.parse(path.read_text()))
        if isinstance(handler, ast.ExceptHandler)
        for node in ast.walk(handler)
        if (isinstance(node, ast.Subscript) and _calls(node.value, "str"))
        or (isinstance(node, ast.Attribute) and _calls(node.value, "str") and "split" in node.attr)
    }
    assert not places


def test_text_for_people_that_is_no_markup_is_printed_as_one_line() -> None:
    """With ``print_text``: it names files, whose names may hold line ends and escapes."""
    places = {
        path.relative_to(ROOT).as_posix()
        for path in _sources("ivdr_deploy", "train", "handlers")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg == "markup"
    }
    assert places == {
        "ivdr_deploy/_console.py",
        "ivdr_deploy/cli/show.py",
    }  # a table of what an artifact says


def _calls(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


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


def test_every_module_can_be_imported_on_a_system_without_fcntl() -> None:
    """Windows, as far as that can be seen from here: what only Unix has is imported where it is used."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in _sources("ivdr_deploy")
        if path.name not in {"__main__.py", "guard.py"}  # the latter is a program
    ]
    code = (
        "import importlib, sys\n"
        "import psutil  # whose module for Linux needs what is taken away\n"
        "sys.modules.update(dict.fromkeys(('fcntl', 'resource', 'pwd', 'grp', 'termios')))\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ModuleNotFoundError as error:\n"
        "        assert error.name.startswith('tensorrt'), (name, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_python_is_started_without_the_working_directory_among_its_modules() -> None:
    """``python -m`` and ``-c`` would take torch.py of any folder for torch; ``-P`` keeps it out."""
    started = 0
    for path in _sources("ivdr_deploy", "handlers"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.List) and node.elts and ast.unparse(node.elts[0]) == "sys.executable":
                started += 1
                assert ast.unparse(node.elts[1]) == "'-P'", f"{path}: {ast.unparse(node)[:80]}"
    assert started


def test_no_two_files_of_tests_have_the_same_name() -> None:
    """They lie in no packages, so pytest imports them by their name, and would refuse the second."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_git_holds_no_weights_or_videos() -> None:
    """Whatever their suffix: a file that large is none that a person wrote."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    found = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if found.returncode or not (ROOT / ".git").exists():
        pytest.skip(f"not a checkout that git reads: {found.stderr.strip()}")
    listed = found.stdout.split("\0")
    large = [
        name for name in listed if name and (ROOT / name).exists() and (ROOT / name).stat().st_size > 1 << 20
    ]
    assert "pyproject.toml" in listed
    assert large == []
