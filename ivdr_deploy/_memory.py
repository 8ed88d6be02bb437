"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import os
import sys

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
"""glibc's numbers of the settings."""


def resident_bytes() -> int:
    """Return the memory that this process has; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm", "rb") as said:
        return int(said.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def give_back_freed_memory() -> None:
    """Give all that is freed back to the system, also what lies between pieces in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def keep_memory_of_requests() -> None:
    """Keep what a process frees that takes videos in: see ``keep_freed_memory``.

    Otherwise what a body of 2.3 MiB arrives in is taken from the system and given back with each request: 1,100 page
    faults, and half of the processor time that it takes to receive it.
    """
    keep_freed_memory(64 << 20, large_bytes=16 << 20)


def keep_freed_memory(kept_bytes: int, *, large_bytes: int) -> None:
    """Say what is kept for the next one when it is freed, where the C library is one that can be told.

    Args:
        kept_bytes: Of small pieces, together; what is more goes back to the system.
        large_bytes: From this size on a piece is large: it goes back at once, and is taken anew, page by page.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, large_bytes)
        mallopt(_M_TRIM_THRESHOLD, kept_bytes)
