from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, sys
from ivdr_deploy._memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory(64 << 20, large_bytes=16 << 20)
def use():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        bytearray(int(sys.argv[2]) << 20)[::4096] = b"x" * (int(sys.argv[2]) << 8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
use()
print(use())
"""


def page_faults(how: str, mib: int) -> int:
    command = [sys.executable, "-P", "-c", CODE, how, str(mib)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_what_is_freed_is_used_again_unless_it_is_large() -> None:
    assert page_faults("keep", 2) < 1_000  # of the 10,240 pages that are written
    assert page_faults("keep", 20) > 50_000
