"""Rights on files, which root has whatever their mode says, and what even root cannot read."""

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


def make_too_deep(folder: Path) -> None:
    """Make folders below one, which may be absent, that cannot be listed, whoever asks: their path is too long."""
    folder.mkdir(parents=True, exist_ok=True)
    inside = os.open(folder, os.O_RDONLY)
    for _ in range(os.pathconf(folder, "PC_PATH_MAX") // 250 + 1):
        os.mkdir("d" * 250, dir_fd=inside)
        outer, inside = inside, os.open("d" * 250, os.O_RDONLY, dir_fd=inside)
        os.close(outer)
    os.close(inside)
