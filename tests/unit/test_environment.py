from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from ivdr_deploy import environment
from ivdr_deploy.environment import (
    engine_threads,
    environment_facts,
    git_revision,
    gpus,
    let_threads_sleep,
    package_versions,
    signal_name,
)


def test_facts_name_machine_and_software():
    facts = environment_facts()

    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpu"]
    assert facts["cores"] >= 1
    assert facts["memory_gib"] > 0.1
    assert facts["python"] == platform.python_version()
    assert facts["packages"]["numpy"] == metadata.version("numpy")


IMPORT_ALL = """
import importlib, os, pkgutil, sys
import multiprocessing.pool, psutil, subprocess, tempfile, torch  # what others need to be there
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in ("sched_getaffinity", "getloadavg", "sysconf", "getuid", "setpriority", "getpriority", "killpg"):
    delattr(os, name)
import ivdr_deploy
from ivdr_deploy.environment import environment_facts, usable_cores
for module in pkgutil.walk_packages(ivdr_deploy.__path__, "ivdr_deploy."):
    if not module.name.endswith(("__main__", "trt_runtime", "._forkserver", "._preload")):
        importlib.import_module(module.name)
print(usable_cores() == os.cpu_count(), environment_facts()["cores"] == os.cpu_count())
"""


def test_every_module_can_be_imported_where_the_system_is_not_linux() -> None:
    """What only Linux has is imported where it is used: the rest works on."""
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True True\n"), done.stderr[-2000:]


def test_absent_packages_are_left_out(monkeypatch):
    monkeypatch.setattr("ivdr_deploy.environment.PACKAGES", ("numpy", "no-such-package"))

    assert list(package_versions()) == ["numpy"]


def test_command_line_can_be_pasted_into_a_shell(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/ivdr", "bench", "my bundle"])

    assert environment_facts()["command"] == "ivdr bench 'my bundle'"


def test_command_of_a_module_is_written_with_its_name():
    code = "from ivdr_deploy.environment import environment_facts; print(environment_facts()['command'])"
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "some_tool"
        package.mkdir()
        (package / "__main__.py").write_text(code)
        command = [sys.executable, "-m", "some_tool", "--fast"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "python -m some_tool --fast\n"


def test_thread_limits_are_recorded(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")

    assert environment_facts()["threads"]["OMP_NUM_THREADS"] == "3"


def test_nothing_is_claimed_where_the_programs_are_absent(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))

    assert gpus() == []
    assert git_revision() == ""


def test_gpus_are_read_from_the_driver(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA T4, 15360 MiB, 550.54'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    assert gpus() == [{"name": "NVIDIA T4", "memory": "15360 MiB", "driver": "550.54"}]


@pytest.mark.parametrize(
    ("failing", "name"), [("", "NVIDIA T4"), ("cuInit", ""), ("cuDeviceGet", ""), ("cuDeviceGetName", "")]
)
def test_the_first_gpu_is_asked_of_the_driver(tmp_path: Path, failing: str, name: str) -> None:
    """Of a driver of our own; a real one goes by CUDA_VISIBLE_DEVICES."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler")
    source = """
        #include <stdlib.h>
        #include <string.h>
        static int fails(const char *name) { return !strcmp(getenv("FAILING"), name) ? 100 : 0; }
        int cuInit(unsigned flags) { return fails("cuInit"); }
        int cuDeviceGet(int *device, int place) { *device = 7 + place; return fails("cuDeviceGet"); }
        int cuDeviceGetName(char *name, int size, int device) {
            strncpy(name, device == 7 ? "NVIDIA T4" : "NVIDIA A100", size);
            return fails("cuDeviceGetName");
        }
    """
    (tmp_path / "driver.c").write_text(source)
    command = [compiler, "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"]
    subprocess.run(command, check=True)
    asking = "from ivdr_deploy.artifacts.speed import this_machine; print(this_machine('cuda').processor)"
    done = subprocess.run(
        [sys.executable, "-c", asking],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "FAILING": failing, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{name}\n"


def test_revision_names_the_commit_and_says_when_files_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert git_revision(tmp_path) == ""
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "first")
    clean = git_revision(tmp_path)
    assert len(clean) == 40
    (tmp_path / "a").write_text("2")
    assert git_revision(tmp_path) == f"{clean}-dirty"


def test_revision_is_a_commit_or_nothing():
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", git_revision())


@pytest.mark.parametrize(
    ("usable", "physical", "processes", "expected"),
    [(8, 8, 1, 8), (8, 4, 1, 4), (2, 8, 1, 2), (8, 8, 3, 2), (2, 2, 4, 1), (8, None, 1, 8)],
)
def test_an_engine_gets_a_thread_a_core_and_engines_share_them(
    usable: int, physical: int | None, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(environment, "usable_cores", lambda: usable)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: physical)
    assert engine_threads(processes) == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert engine_threads(processes) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert engine_threads(processes) == expected


def test_threads_are_let_sleep_unless_somebody_decided_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    let_threads_sleep()
    assert os.environ.pop("OMP_WAIT_POLICY") == "PASSIVE"
    for name in names:
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            let_threads_sleep()
            assert os.environ.get("OMP_WAIT_POLICY", "1") == "1"


def test_torch_is_loaded_with_threads_that_sleep() -> None:
    """Which counts only where it is said before torch is there."""
    code = (
        "import os, sys\n"
        "from ivdr_deploy.runtimes.registry import load_runtime\n"
        "assert 'torch' not in sys.modules\n"
        "load_runtime('torch')\n"
        "print(os.environ['OMP_WAIT_POLICY'])\n"
    )
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)
    assert done.stdout.strip() == "PASSIVE", done.stderr


def test_a_signal_without_a_name_is_told_by_its_number():
    assert signal_name(signal.SIGKILL) == "SIGKILL"
    assert signal_name(signal.SIGRTMIN + 3) == str(signal.SIGRTMIN + 3)


V3 = "avx2 fma bmi1 bmi2 f16c movbe abm"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", set()),
        ("avx sse4_2", set()),
        ("avx2 bmi1 bmi2 f16c movbe abm", set()),  # as on VIA's: compilers would multiply and add at once
        (V3, {"avx2"}),
        (f"{V3} avx_vnni", {"avx2", "vnni"}),
        (f"{V3} avx512f avx512cd", {"avx2"}),  # as on Knights Landing
        (V4, {"avx2", "avx512"}),
        (f"{V4} avx512_vnni avx512_bf16", {"avx2", "avx512", "vnni", "avx512_vnni", "bf16"}),
        (f"{V4} avx512_vnni amx_bf16 amx_int8", {"avx2", "avx512", "vnni", "avx512_vnni", "bf16", "amx"}),
    ],
)
def test_an_instruction_set_is_there_when_all_that_compilers_mean_by_it_is(
    flags: str, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\n")
    monkeypatch.setattr(environment, "_CPU_FILE", tmp_path / "cpuinfo")
    assert environment.instruction_sets() == expected


def test_without_a_word_of_the_system_no_instruction_set_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_CPU_FILE", tmp_path / "absent")
    assert environment.instruction_sets() == frozenset()
    assert environment.cpu_model()
