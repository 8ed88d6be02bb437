"""The windows of a long video: every frame is decoded once, and held only while a window still needs it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ivdr_deploy.spec import ClipSpec, DecoderName, ViewPlan
from ivdr_deploy.video.clips import target_size
from ivdr_deploy.video.decode import open_video
from ivdr_deploy.video.preprocess import crops
from ivdr_deploy.video.reader import VideoInfo, VideoLimits, VideoReader
from ivdr_deploy.video.sampling import clip_at, count_clips, timeline
from ivdr_deploy.video.source import VideoSource


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """Some windows of a video that follow each other."""

    video: np.ndarray
    """uint8 RGB, C-contiguous, shape (n, T, crop, crop, 3): the centre crops."""

    seconds: np.ndarray
    """float64 (n, 2): when a window begins, and when the frame after its last one is shown or the video ends."""

    parts: np.ndarray
    """float64 (n, 2): the part of the video that is nearer to the middle of this window than to that of any other.
    The parts of all windows touch, and make up the whole video."""

    total: int
    """Windows of the whole video."""

    info: VideoInfo
    decode_ms: float
    """Decoding these windows; with the first ones, also opening and indexing."""

    preprocess_ms: float
    """Resizing, colour conversion and cropping."""

    def without_pixels(self) -> Windows:
        """Return everything but the pixels, which are an empty array then."""
        return replace(self, video=self.video[:0].copy())


def read_windows(
    source: VideoSource,
    spec: ClipSpec,
    *,
    hop: int,
    most: int,
    limits: VideoLimits,
    decoder: DecoderName = "pyav",
) -> Iterator[Windows]:
    """Decode a video from its beginning to its end, and yield its windows.

    A window starts at every ``hop``-th frame of the sampling grid until one reaches the end, as with the plan
    ``sliding``; each is equal, bit for bit, to that clip of ``load_clips``. Memory depends on the contract and on
    ``most``, not on the video: a frame is dropped once no later window shows it.

    Args:
        source: Path of a local file, its bytes, or a ``Source``.
        spec: The contract.
        hop: Grid frames from window to window, at least 1 and at most the length of a window.
        most: Windows to yield together; the last ones may be fewer.
        limits: What the video may cost. ``max_decode_seconds`` holds for opening it with the first windows, and for
            each following lot, not for the whole.
        decoder: Which decoder reads it.

    Raises:
        VideoError: if the video cannot be used; also after some windows.
    """
    start = time.perf_counter()
    with open_video(source, limits=limits, decoder=decoder) as reader:
        laid = _Laid(reader, spec, hop)
        frames = _Ring(reader, laid.needed(), spec)
        for first in range(0, laid.total, most):
            count = min(most, laid.total - first)
            video = np.empty((count, *spec.clip_shape), np.uint8)
            for row in range(count):
                indices = laid.clip(first + row)
                for place, index in enumerate(indices):
                    video[row, place] = frames.at(int(index))
                frames.drop_before(int(laid.clip(first + row + 1)[0]))
            preprocess, end = frames.take_seconds(), time.perf_counter()
            yield Windows(
                video=video,
                seconds=laid.seconds(first, count),
                parts=laid.parts(first, count),
                total=laid.total,
                info=reader.info,
                decode_ms=1000.0 * (end - start - preprocess),
                preprocess_ms=1000.0 * preprocess,
            )
            start = time.perf_counter()
            reader.renew_time()


class _Laid:
    """Where the windows of a video lie."""

    def __init__(self, reader: VideoReader, spec: ClipSpec, hop: int) -> None:
        self._grid = timeline(reader.pts_seconds, reader.info.fps, spec)
        self._times = np.append(reader.pts_seconds[self._grid], reader.info.duration_seconds)
        self._spec, self._hop = spec, hop
        self._window = spec.num_frames * spec.frame_stride
        self.total = count_clips(len(self._grid), spec, ViewPlan(placement="sliding", num_clips=1, hop=hop))

    def clip(self, number: int) -> np.ndarray:
        """Return int64 (T,): the frames of a window."""
        return np.asarray(self._grid[clip_at(number * self._hop, len(self._grid), self._spec)])

    def needed(self) -> list[int]:
        """Return every frame that a window shows, rising."""
        shown = np.zeros(len(self._grid), bool)
        starts = self._hop * np.arange(self.total, dtype=np.int64)
        for step in range(self._spec.num_frames):
            shown[np.minimum(starts + step * self._spec.frame_stride, len(self._grid) - 1)] = True
        return [int(index) for index in np.unique(self._grid[shown])]

    def seconds(self, first: int, count: int) -> np.ndarray:
        """See ``Windows.seconds``."""
        starts = self._hop * np.arange(first, first + count, dtype=np.int64)
        return np.stack([self._at(starts), self._at(starts + self._window)], axis=1)

    def parts(self, first: int, count: int) -> np.ndarray:
        """See ``Windows.parts``."""
        numbers = np.arange(first, first + count + 1, dtype=np.int64)
        borders = numbers * self._hop + (self._window - self._hop) // 2
        borders[numbers == 0] = 0
        borders[numbers == self.total] = len(self._grid)
        times = self._at(borders)
        return np.stack([times[:-1], times[1:]], axis=1)

    def _at(self, places: np.ndarray) -> np.ndarray:
        return np.asarray(self._times[np.minimum(places, len(self._grid))])


class _Ring:
    """The frames that windows are made of, decoded in order and cropped."""

    def __init__(self, reader: VideoReader, indices: list[int], spec: ClipSpec) -> None:
        self._reader, self._crop_size = reader, spec.crop_size
        self._size = target_size(reader.info, spec)
        self._decoded = reader.frames(indices)
        self._held: dict[int, np.ndarray] = {}
        self._seconds = 0.0

    def at(self, index: int) -> np.ndarray:
        """Return a frame that is not dropped, uint8 (crop, crop, 3); what comes before it is decoded on the way."""
        while index not in self._held:
            found, frame = next(self._decoded)
            begin = time.perf_counter()
            rgb = self._reader.to_rgb(frame, self._size)
            self._held[found] = crops(rgb, self._crop_size)[0].copy()  # a view would hold the whole frame
            self._seconds += time.perf_counter() - begin
        return self._held[index]

    def drop_before(self, index: int) -> None:
        """Let go of the frames before one."""
        for held in [held for held in self._held if held < index]:
            del self._held[held]

    def take_seconds(self) -> float:
        """Return the time that resizing and cropping took since the last call."""
        taken, self._seconds = self._seconds, 0.0
        return taken
