"""Golden clips and golden videos: known inputs with known results, kept in a bundle and replayed by whoever opens it.

The clips prove the network: what the reference gave for them is recorded. The videos prove the decoder: the clips that
the contract makes of them are recorded. ``golden.npz`` holds ``video`` (the clips), one array per output of the
manifest, and ``clips:FILE`` for every golden video beside it.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ivdr_deploy._text import quoted, quoted_few, reason_of
from ivdr_deploy.artifacts.manifest import EXPORT_AGAIN, OutputSpec
from ivdr_deploy.errors import ArtifactError
from ivdr_deploy.spec import INPUT_NAME, ClipSpec, ViewPlan

GOLDEN_FILE = "golden.npz"
GOLDEN_PLAN = ViewPlan(num_clips=2)
"""The clips that are taken from a golden video. Part of the format: they are recorded in the file."""

_CLIPS = "clips:"

_MAX_BYTES = 1 << 30
"""Of all arrays together; 16 clips of 64 frames of 256 x 256 pixels need 201 MB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """What a bundle keeps to prove itself; any part may be missing."""

    video: np.ndarray | None = None
    """uint8 (G, T, H, W, 3); None where there are no golden clips."""

    expected: Mapping[str, np.ndarray] = field(default_factory=dict)
    """For every output of the model what the reference gave for ``video``: float32, first axis G, all finite."""

    clips: Mapping[str, np.ndarray] = field(default_factory=dict)
    """For every golden video, by its name in the bundle: uint8 (2, T, H, W, 3), its clips under ``GOLDEN_PLAN``."""

    def first(self) -> Golden:
        """Return the first golden clip alone, with what is expected of it."""
        assert self.video is not None
        return Golden(
            video=self.video[:1], expected={name: value[:1] for name, value in self.expected.items()}
        )


def write_golden(folder: Path, golden: Golden) -> None:
    """Write ``golden.npz`` into a bundle's folder; the golden videos are there already."""
    arrays = {} if golden.video is None else {INPUT_NAME: golden.video, **golden.expected}
    arrays |= {_CLIPS + name: clips for name, clips in golden.clips.items()}
    np.savez_compressed(folder / GOLDEN_FILE, **arrays)  # type: ignore[arg-type]


def read_golden(folder: Path, *, clip: ClipSpec, outputs: Sequence[OutputSpec]) -> Golden:
    """Read ``golden.npz`` and check that it holds what the manifest promises.

    Args:
        folder: Of the bundle.
        clip: The contract, which gives the shape of every clip.
        outputs: Of the model, with their shapes.

    Raises:
        ArtifactError: if it cannot be read, or holds other arrays, other shapes or values that are not finite.
    """
    path = folder / GOLDEN_FILE
    arrays = _read_arrays(path)
    clips = {name.removeprefix(_CLIPS): arrays.pop(name) for name in list(arrays) if name.startswith(_CLIPS)}
    for name, value in clips.items():
        _check_clips(path, _CLIPS + name, value, (GOLDEN_PLAN.max_views, *clip.clip_shape))
    expected = sorted([INPUT_NAME, *(output.name for output in outputs)])
    if not arrays:
        return Golden(clips=clips)
    if sorted(arrays) != expected:
        raise ArtifactError(
            f"{path} holds {quoted_few(sorted(arrays))}, expected {quoted_few(expected)}", hint=EXPORT_AGAIN
        )
    video = arrays.pop(INPUT_NAME)
    count = max(1, video.shape[0] if video.ndim else 1)
    _check_clips(path, INPUT_NAME, video, (count, *clip.clip_shape))
    for output in outputs:
        value, shape = arrays[output.name], (count, *output.shape)
        if value.dtype != np.float32 or value.shape != shape or not np.isfinite(value).all():
            raise ArtifactError(
                f"{path}: {output.name} has dtype {value.dtype} and shape {quoted(value.shape)}, "
                f"expected finite float32 {quoted(shape)}",
                hint=EXPORT_AGAIN,
            )
    return Golden(video=video, expected=arrays, clips=clips)


def _check_clips(path: Path, name: str, value: np.ndarray, shape: tuple[int, ...]) -> None:
    if value.dtype != np.uint8 or value.shape != shape:
        raise ArtifactError(
            f"{path}: {quoted(name)} has dtype {value.dtype} and shape {quoted(value.shape)}, expected uint8 {shape}",
            hint=EXPORT_AGAIN,
        )


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read an ``.npz`` file that may be damaged, and allocate for no more than ``_MAX_BYTES``.

    Raises:
        ArtifactError: if it cannot be read, or claims to hold more.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = [_array_bytes(archive, name) for name in archive.namelist()]
        if sum(sizes) > _MAX_BYTES:
            raise ArtifactError(
                f"{path} claims to hold {quoted(sum(sizes))} bytes, the limit is {_MAX_BYTES}",
                hint=EXPORT_AGAIN,
            )
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except ArtifactError:
        raise
    except Exception as error:  # numpy, zipfile and zlib raise what they like on damaged files
        raise ArtifactError(
            f"{path} cannot be read ({type(error).__name__}: {reason_of(error)})", hint=EXPORT_AGAIN
        ) from error


def _array_bytes(archive: zipfile.ZipFile, name: str) -> int:
    """Return the size in bytes that the header of an array claims."""
    with archive.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):  # a later one may have gigabytes of header
            raise ValueError(f"an array has the version {version} of the format, expected (1, 0)")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if any(axis < 0 for axis in shape):  # a negative size would make room for another array
        raise ValueError(f"an array has the shape {quoted(shape)}")
    return math.prod(shape) * dtype.itemsize
