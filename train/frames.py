"""The decoded frames of one video: in a file of the cache, or straight from the video.

Both give the same bytes: what a frame is in a file is what a decode worker sends, a JPEG picture or the plain pixels.
So it makes no difference to training which videos fit into the cache. Decode workers import this module: nothing here
needs torch.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ivdr_deploy._console import print_text
from ivdr_deploy._files import NO_SPACE
from ivdr_deploy.decoding import DecodePool, ScratchError
from ivdr_deploy.errors import VideoOpenError
from ivdr_deploy.spec import ClipSpec
from ivdr_deploy.video import Source, VideoLimits, open_frames
from train.kept import DIGEST_BYTES, removed_or_damaged, writing

Form = Literal["jpeg", "raw"]

_QUALITY = 95
"""Of JPEG, without thinning out the colours: on real clips one grey level away on average, at an eighth of the size."""

_END = struct.Struct("<8sQQQ")
"""What stands between the offsets of the frames and the digest: form, frames, height and width."""

Shape = tuple[int, int, int, int]
"""(L, height, width, 3) of all frames of a video."""


def made_with(form: Form) -> list[Any]:
    """Return what tells the frames of one form from those that something else would make."""
    if form == "raw":
        return [form]
    import cv2

    return [form, _QUALITY, cv2.__version__]


def encoded(frame: np.ndarray, form: Form) -> bytes:
    """Return the bytes of a frame, uint8 RGB (H, W, 3)."""
    if form == "raw":
        return frame.tobytes()
    import cv2

    how = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
    how += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2BGR), how)
    assert done
    return data.tobytes()


def decoded(data: np.ndarray, form: Form, height: int, width: int) -> np.ndarray:
    """Return the frame, uint8 RGB (H, W, 3), whose bytes are given, uint8 (N,).

    Raises:
        ValueError: if they are not those of such a frame.
    """
    if form == "raw":
        return data.reshape(height, width, 3)
    import cv2

    picture = cv2.imdecode(np.asarray(data), cv2.IMREAD_COLOR)
    if picture is None:
        raise ValueError("no picture")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


@dataclass(frozen=True, slots=True)
class Frames(ABC):
    """The frames of one video."""

    shape: Shape
    form: Form

    def take(self, places: np.ndarray) -> np.ndarray:
        """Return some frames, uint8 (..., H, W, 3).

        Args:
            places: int64 (...), each in [0, L); a place may be asked for more than once.
        """
        unique, inverse = np.unique(places, return_inverse=True)
        _, height, width, _ = self.shape
        found = np.empty((len(unique), height, width, 3), np.uint8)
        for target, picture in zip(found, self.pictures(unique), strict=True):
            target[...] = picture
        taken: np.ndarray = found[inverse.reshape(np.shape(places))]
        return taken

    @abstractmethod
    def pictures(self, places: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the frames at growing places."""


@dataclass(frozen=True, slots=True)
class StraightFrames(Frames):
    """Frames that a decode worker takes from the video whenever they are wanted."""

    source: Source
    clip: ClipSpec
    pool: DecodePool
    limits: VideoLimits

    def pictures(self, places: np.ndarray) -> Iterator[np.ndarray]:
        """Let a worker decode them.

        Raises:
            VideoError: if the video cannot be used any more.
        """
        what = (self.source, self.clip, self.form, places, self.shape)
        data, sizes = self.pool.submit(send_frames, *what, limits=self.limits).result()
        _, height, width, _ = self.shape
        for part in np.split(data, np.cumsum(sizes)[:-1]):
            yield decoded(part, self.form, height, width)


@dataclass(frozen=True, slots=True)
class KeptFrames(Frames):
    """Frames in a file of the cache."""

    file: Path
    video: StraightFrames
    """Gives the same, where another run has removed the file to make room."""

    gone: set[Path]
    """Files of which that was said."""

    def pictures(self, places: np.ndarray) -> Iterator[np.ndarray]:
        """Read them from the mapped file.

        Raises:
            DataError: if it has changed since it was found whole.
            VideoError: if it has gone, and the video cannot be used any more.
        """
        try:
            data = np.memmap(self.file, np.uint8, "r")
            length, height, width, _ = self.shape
            if _shape(data) != self.shape:
                raise ValueError("other frames")
            end = len(data) - DIGEST_BYTES - _END.size
            starts = data[end - 8 * (length + 1) : end].view("<u8")
            for place in places:
                yield decoded(data[int(starts[place]) : int(starts[place + 1])], self.form, height, width)
        except FileNotFoundError:
            if self.file not in self.gone:
                self.gone.add(self.file)
                said = (
                    f"{self.file} has gone from the cache: {self.video.source.uri} is decoded in every step"
                )
                print_text(said, style="yellow")
            yield from self.video.pictures(places)
        except (OSError, ValueError, struct.error) as error:
            raise removed_or_damaged(self.file, error) from error


def send_frames(
    source: Source, /, clip: ClipSpec, form: Form, places: np.ndarray, shape: Shape, *, limits: VideoLimits
) -> tuple[np.ndarray, list[int]]:
    """Decode frames of a video that was opened before: a job of the decode workers.

    Args:
        source: The video.
        clip: The contract.
        form: Of the frames.
        places: Which, growing.
        shape: Of all its frames, as it was.
        limits: What the video may cost.

    Returns:
        Their bytes, and how many each has.

    Raises:
        VideoError: if the video cannot be used, or is another one by now.
    """
    another = VideoOpenError(
        f"{source.uri} is another video than when the run began: it had {shape[0]} frames of {shape[1]} x {shape[2]}",
        hint="run the same command again: every video is read anew",
    )
    try:
        with open_frames(source, clip, places=places, limits=limits) as stream:
            if stream.shape != shape:
                raise another
            parts = [encoded(frame, form) for frame in stream.frames]
    except IndexError as error:  # it has fewer frames
        raise another from error
    return np.frombuffer(b"".join(parts), np.uint8), [len(part) for part in parts]


def write_frames(source: Source, /, clip: ClipSpec, file: Path, form: Form, *, limits: VideoLimits) -> Shape:
    """Decode all frames of a video into a file of the cache, holding one at a time; returns their shape.

    Raises:
        VideoError: if the video cannot be used.
        ScratchError: if there is no space for the file.
    """
    with open_frames(source, clip, limits=limits) as stream:
        starts = [0]
        try:
            with writing(file) as write:
                for frame in stream.frames:
                    data = encoded(frame, form)
                    write(data)
                    starts.append(starts[-1] + len(data))
                write(bytes(-starts[-1] % 8))  # the offsets are read in place
                write(np.array(starts, "<u8").tobytes())
                write(_END.pack(form.encode(), *stream.shape[:3]))
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise ScratchError(error.errno, error.strerror, error.filename) from error
        return stream.shape


def kept_shape(file: Path) -> Shape:
    """Read the shape of the frames in a file that was found whole."""
    return _shape(np.memmap(file, np.uint8, "r"))


def _shape(data: np.ndarray) -> Shape:
    end = len(data) - DIGEST_BYTES
    _, *sides = _END.unpack(data[end - _END.size : end].tobytes())
    length, height, width = sides
    return length, height, width, 3
