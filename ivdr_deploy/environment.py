"""The machine and the software, without which a measured figure means nothing."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "ivdr-deploy", "numpy", "torch", "torchvision", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt",
    "tensorrt-rtx", "av", "opencv-python-headless", "safetensors", "pyarrow", "torchserve",
)  # fmt: skip
"""Distributions whose version can change a figure."""

_ROOT = Path(__file__).resolve().parents[1]
_AVX2 = {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm"}
_AVX512 = {*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_INSTRUCTION_SETS = {
    "avx2": (_AVX2,),
    "avx512": (_AVX512,),
    "vnni": ({"avx512_vnni"}, {"avx_vnni"}),
    "avx512_vnni": ({*_AVX512, "avx512_vnni"},),
    "bf16": ({*_AVX512, "avx512_bf16"}, {*_AVX512, "amx_bf16"}),
    "amx": ({"amx_int8"},),
}
"""Name -> flags of ``/proc/cpuinfo`` that grant it together; of several sets any. The first two are what compilers mean
by ``x86-64-v3`` and ``-v4``: there are processors, and more virtual ones, with AVX2 and without FMA."""

_CPU_FILE = Path("/proc/cpuinfo")

_SPIN_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Any of which says how OpenMP's threads wait; all but the first belong to one implementation."""

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", *_SPIN_VARIABLES)


def environment_facts() -> dict[str, Any]:
    """Collect what this process runs on, as values that JSON holds.

    Returns:
        ``time`` (UTC), ``cpu``, ``instruction_sets``, ``cores`` (that this process may use), ``memory_gib``,
        ``load_average`` (over the last minute, other processes included), ``os``, ``python``, ``packages``,
        ``gpus``, ``threads`` (variables that limit them), ``git_revision`` and ``command``. What cannot be found out
        is an empty string or None.
    """
    import psutil

    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "instruction_sets": sorted(instruction_sets()),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": round(psutil.getloadavg()[0], 2),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "gpus": gpus(),
        "threads": {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
        "git_revision": git_revision(),
        "command": shlex.join([*_program(), *sys.argv[1:]]),
    }


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not everywhere
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def engine_threads(processes: int = 1) -> int:
    """Return how many threads an engine on the CPU gets: one a core, since two on a core wait for each other.

    Decoders are not left out of the count: they have a lower priority, and take what the engine leaves (see
    ``decoding``). ``OMP_NUM_THREADS``, where it is set, is what somebody wanted.

    Args:
        processes: How many engines run on this machine at the same time; they share the cores.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    import psutil

    cores = min(usable_cores(), psutil.cpu_count(logical=False) or usable_cores())
    return max(1, cores // processes)


def let_threads_sleep() -> None:
    """Let OpenMP's threads, which torch computes with, sleep while they wait, unless a variable says otherwise.

    It counts where it is said before torch is loaded. By themselves they spin at the end of every operator, on cores
    that decoders and other processes want: on two cores with a load of 7, one call of a small network took 206 to
    288 ms, and 16 to 25 ms so; one thread alone took 16.
    """
    if not any(name in os.environ for name in _SPIN_VARIABLES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def decode_workers() -> int:
    """Return how many videos are decoded at the same time while an engine runs: one for two cores."""
    return max(1, usable_cores() // 2)


def only_gpu(index: int) -> dict[str, str]:
    """Return the environment of a process that is to see one GPU, as its ``cuda``.

    Args:
        index: Place among the GPUs that this process may see; counted round where there are fewer.
    """
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return {"CUDA_VISIBLE_DEVICES": names[index % len(names)] if names else str(index)}


def _program() -> list[str]:
    """Return what started this process as a person types it, not where it is installed."""
    path = Path(sys.argv[0])
    module = sys.modules["__main__"].__spec__
    if path.name == "__main__.py" and module is not None:
        return ["python", "-m", module.parent or module.name]
    return [path.name]


def package_versions() -> dict[str, str]:
    """Return the installed version of each of ``PACKAGES``; those absent are left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def cpu_model() -> str:
    """Return the name of the processor, or of its architecture where the system does not tell."""
    try:
        lines = _CPU_FILE.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def instruction_sets() -> frozenset[str]:
    """Name the instruction sets of this processor that decide which engine runs on it.

    Returns:
        Of ``avx2``, ``avx512``, ``vnni`` (8-bit products summed in 32 bits, in whatever register width),
        ``avx512_vnni`` (the same in registers of 512 bits), ``bf16`` and ``amx``; empty where the system does not tell.
    """
    try:
        lines = _CPU_FILE.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
    return frozenset(name for name, sets in _INSTRUCTION_SETS.items() if any(one <= flags for one in sets))


def has_nvidia_driver() -> bool:
    """Whether a driver for NVIDIA GPUs is loaded, looked up without starting it."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))


def signal_name(number: int) -> str:
    """Return the name of a signal; most of the real-time ones have none, and are told by their number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def ending(code: int | None) -> str:
    """Say how a process ended, after its exit code; that of a signal is its negative number."""
    if code is not None and code < 0:
        return f"was ended by signal {signal_name(-code)}"
    return f"ended with exit code {code}"


def gpus() -> list[dict[str, str]]:
    """Return ``name``, ``memory`` and ``driver`` of every NVIDIA GPU; empty without a driver."""
    output = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    rows = [[cell.strip() for cell in line.split(",")] for line in output.splitlines()]
    return [dict(zip(("name", "memory", "driver"), row, strict=True)) for row in rows if len(row) == 3]


def first_gpu() -> str:
    """Return the name of the GPU that ``cuda`` is in this process, as its variables and the driver order them.

    Empty where there is none, or the driver does not tell. Asked of the driver itself, without torch: ``nvidia-smi``
    lists every GPU of the machine, in another order.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, len(name), device)
    ):
        return ""
    return name.value.decode(errors="replace")


def cpp_compiler() -> str:
    """Return what the C++ compiler of this machine says it is; empty where there is none that works."""
    said = (_output(name, "--version") for name in ("g++", "clang++"))
    return next((text.splitlines()[0] for text in said if text), "")


def git_revision(root: Path = _ROOT) -> str:
    """Return the commit of a checkout, with ``-dirty`` when files differ from it; by default of this package's.

    An installed package has none: the answer is an empty string.
    """
    if not (root / ".git").exists():  # a site-packages folder inside somebody else's repository is not ours
        return ""
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD").strip()
    changed = bool(commit) and bool(_output("git", "-C", str(root), "status", "--porcelain").strip())
    return f"{commit}-dirty" if changed else commit


def _output(program: str, *arguments: str) -> str:
    """Return what a program prints; empty when it is absent, fails or hangs."""
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
