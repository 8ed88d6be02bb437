"""A small labelled set of real video files: a bright square on a dark ground that moves up, or down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from videos import write_video


def moving_square(direction: str, *, seed: int, num_frames: int = 16) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    left, ground = int(rng.integers(4, 28)), int(rng.integers(0, 60))
    for place in range(num_frames):
        height = place if direction == "down" else num_frames - 1 - place
        frame = np.full((36, 48, 3), ground, np.uint8)
        frame[2 * height : 2 * height + 8, left : left + 10] = 220
        yield frame


def write_set(folder: Path, *, per_class: int, seed: int = 0) -> Path:
    """Write ``per_class`` videos of "down" and "up" each, and a csv that lists them; return the csv."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["path,label"]
    for number in range(per_class):
        for offset, label in enumerate(("down", "up")):
            name = f"{label}{number}.mp4"
            write_video(folder / name, moving_square(label, seed=seed + 2 * number + offset), gop=8)
            lines.append(f"{name},{label}")
    path = folder / "list.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
