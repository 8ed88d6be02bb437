"""Rights on files, which root has whatever their mode says, and a folder that root cannot read either."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def without_rights() -> Iterator[None]:
    """Let go of the right to read and write everything, where this process has it."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def let_all_enter(path: Path) -> Path:
    """Let every user enter a temporary folder, unlike those of pytest; returns it."""
    own = Path(tempfile.gettempdir())
    for folder in (path, *path.parents):
        if folder != own and folder.is_relative_to(own):
            folder.chmod(0o755)
    return path


def hide_too_deep(folder: Path) -> Path:
    """Make a folder that holds nothing but one whose path is longer than the system reads; returns it."""
    folder.mkdir(parents=True)
    inside = os.open(folder, os.O_RDONLY)
    for _ in range(os.pathconf(folder, "PC_PATH_MAX") // 200 + 1):
        os.mkdir("d" * 200, dir_fd=inside)
        deeper = os.open("d" * 200, os.O_RDONLY, dir_fd=inside)
        os.close(inside)
        inside = deeper
    os.close(inside)
    return folder
