"""What a user installs: the wheel holds the package and the handler, and nothing of the training code."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_wheel_holds_the_package_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ivdr_deploy"}
    assert "ivdr_deploy/py.typed" in names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "ivdr_deploy").rglob("*.py")}
    assert sources <= set(names)
    carried = zipfile.ZipFile(wheel).read("ivdr_deploy/_assets/ivdr_handler.py")
    assert carried == (ROOT / "handlers" / "ivdr_handler.py").read_bytes()


def test_installed_wheel_finds_its_handler_and_brings_no_training_code(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import os, sys\n"
        "elsewhere = [p for p in sys.path if p and not os.path.isdir(os.path.join(p, 'train'))]  # no checkout\n"
        f"sys.path = [{str(site)!r}, *elsewhere]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "from importlib.util import find_spec\n"
        "from ivdr_deploy.serving.torchserve.archive import handler_source\n"
        "print(handler_source(), find_spec('train'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(site / "ivdr_deploy" / "_assets" / "ivdr_handler.py"), "None"]
