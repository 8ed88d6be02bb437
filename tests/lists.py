"""Makes lists of videos, and reads them, for the tests of every form."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.errors import DataError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.fsencode(name))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def entries(videos: VideoList) -> list[tuple[str, str | None]]:
    return [(item.uri, item.label) for item in videos.items]


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_video_list(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)
