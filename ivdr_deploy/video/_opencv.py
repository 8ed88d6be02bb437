"""The OpenCV reader: by path, forward from the start, because OpenCV's own seek can miss the frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import av
import cv2
import numpy as np

from ivdr_deploy.errors import ConfigError, VideoDecodeError, VideoOpenError
from ivdr_deploy.video._packets import PacketSource
from ivdr_deploy.video._source import DAMAGED_HINT, Budget, CheckedSource
from ivdr_deploy.video.reader import VideoInfo, VideoLimits, VideoReader


class OpenCvReader(VideoReader):
    """Reads a path. Two passes: one counts the frames, one converts those asked for.

    OpenCV does not tell damage from the end of a file, so a damaged video is as long as what can be decoded.
    It converts frames to BGR at full size first: they differ by a level or two from those of PyAV.
    """

    def __init__(self, source: CheckedSource, limits: VideoLimits) -> None:
        if isinstance(source.data, bytes):
            raise ConfigError(
                "OpenCV reads files by path, found bytes",
                hint="use the decoder 'pyav', or write the bytes to a file",
            )
        self._path, self._name = str(source.data), source.name
        self._budget = Budget(source.name, limits)
        _check_first_frame(source, self._budget)
        self._capture: cv2.VideoCapture | None = None
        try:
            capture = self._restart()
            width, height = (
                int(capture.get(key)) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
            )
            self.pts_seconds = self._count(capture)
            self.info = self._budget.check_info(self._describe(source, capture, width, height))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the decoder; calling it twice is allowed."""
        if self._capture is not None:
            self._capture.release()
            self._capture = None

    def frames(self, indices: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """See ``VideoReader.frames``."""
        if self._capture is None:
            raise ValueError(f"{self._name} is closed")
        capture = self._restart()
        count = 0
        for index in indices:
            bgr: np.ndarray | None = None
            with self._budget.charged():
                while count <= index and capture.grab():
                    count += 1
                if count == index + 1:
                    bgr = capture.retrieve()[1]
            if bgr is None:
                raise VideoDecodeError(
                    f"{self._name}: frame {index} of {self.info.num_frames} cannot be decoded",
                    hint=DAMAGED_HINT,
                )
            yield index, av.VideoFrame.from_ndarray(bgr, format="bgr24")

    def _restart(self) -> cv2.VideoCapture:
        self.close()
        with self._budget.charged():
            capture = cv2.VideoCapture(self._path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        if not capture.isOpened():
            raise VideoOpenError(f"{self._name} cannot be opened by OpenCV", hint=DAMAGED_HINT)
        capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 0)  # turned by resize_frame, like every decoder's frames
        self._capture = capture
        return capture

    def _count(self, capture: cv2.VideoCapture) -> np.ndarray:
        """Decode everything; return the times of all frames in seconds."""
        times: list[float] = []
        while True:
            with self._budget.charged():
                if not capture.grab():
                    break
            times.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000.0)
            self._budget.check_count(len(times))
        if not times:
            raise VideoDecodeError(f"{self._name}: OpenCV cannot decode one frame", hint=DAMAGED_HINT)
        if all(earlier < later for earlier, later in pairwise(times)):
            return np.array(times) - times[0]
        rate = capture.get(cv2.CAP_PROP_FPS)
        if not rate > 0:
            raise VideoDecodeError(
                f"{self._name} has neither frame times nor a frame rate", hint=DAMAGED_HINT
            )
        return np.arange(len(times), dtype=np.float64) / rate

    def _describe(
        self, source: CheckedSource, capture: cv2.VideoCapture, width: int, height: int
    ) -> VideoInfo:
        clockwise = capture.get(cv2.CAP_PROP_ORIENTATION_META)
        rotation = round(-clockwise / 90) * 90 % 360
        sar_num, sar_den = capture.get(cv2.CAP_PROP_SAR_NUM), capture.get(cv2.CAP_PROP_SAR_DEN)
        fourcc = capture.get(cv2.CAP_PROP_FOURCC)
        if sar_num > 0 and sar_den > 0:
            width = max(1, round(width * sar_num / sar_den))
        return VideoInfo.of(
            self.pts_seconds,
            nominal_fps=capture.get(cv2.CAP_PROP_FPS),
            size=(width, height) if rotation in (0, 180) else (height, width),
            codec=(int(fourcc) & 0xFFFFFFFF).to_bytes(4, "little").decode("latin-1").strip("\0 "),
            container=source.container,
            rotation=rotation,
            size_bytes=source.size_bytes,
            decoder="opencv",
        )


def _check_first_frame(source: CheckedSource, budget: Budget) -> None:
    """Look at a video through PyAV: its size, and whether OpenCV 5.0 would give black pictures with no error."""
    packets = PacketSource(source, budget)
    try:
        budget.check_size(packets.stream.codec_context.width, packets.stream.codec_context.height)
        first = next((frame for packet in packets.packets() for frame in packets.decode(packet)), None)
    except VideoDecodeError as error:
        raise VideoDecodeError(f"{source.name}: {error.message}", hint=error.hint) from error
    finally:
        packets.close()
    if first is not None and first.interlaced_frame:
        raise VideoDecodeError(
            f"{source.name} is interlaced, which OpenCV cannot convert", hint="use the decoder 'pyav'"
        )
