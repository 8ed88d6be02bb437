from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from ivdr_deploy._optional import import_onnxruntime, require
from ivdr_deploy.errors import MissingDependencyError


def test_error_names_the_extra_and_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependencyError, match="onnxscript") as caught:
        require("onnxscript", extra="export")
    assert caught.value.hint == "install it with: pip install 'ivdr-deploy[export]'"


def test_both_extras_with_onnxruntime_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError) as caught:
        import_onnxruntime()
    assert caught.value.hint.endswith("pip install 'ivdr-deploy[cpu]', or 'ivdr-deploy[gpu]'")


def test_rest_of_an_uninstalled_onnxruntime_is_no_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    rest = types.ModuleType("onnxruntime")  # a folder without __init__.py imports like this
    rest.__path__ = ["somewhere"]
    monkeypatch.setitem(sys.modules, "onnxruntime", rest)
    with pytest.raises(MissingDependencyError, match="incomplete") as caught:
        import_onnxruntime()
    assert "pip uninstall onnxruntime onnxruntime-gpu" in caught.value.hint


@pytest.mark.parametrize("module", ["ivdr_deploy.runtimes.ort_runtime", "ivdr_deploy.cli.doctor"])
def test_importing_onnxruntime_leaves_nothing_in_the_home_folder(module: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    environment.pop("XDG_CACHE_HOME", None)
    code = (
        f"import sys, {module}\n"
        "from ivdr_deploy._optional import import_onnxruntime\n"
        "ort = import_onnxruntime()\n"
        "print('onnxruntime' in sys.modules, ort.get_available_providers())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("True")
    assert [str(path) for path in tmp_path.rglob("*")] == []
