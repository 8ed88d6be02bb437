"""The PyAV reader: FFmpeg driven so that a frame index always means the same frame, at the least decoding."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

import av
import numpy as np

from ivdr_deploy._text import reason_of
from ivdr_deploy.errors import VideoDecodeError
from ivdr_deploy.video._frame_table import EntryPoint, FrameTable, build_table
from ivdr_deploy.video._packets import PacketSource
from ivdr_deploy.video._source import DAMAGED_HINT, Budget, CheckedSource
from ivdr_deploy.video.preprocess import resize_frame
from ivdr_deploy.video.reader import VideoInfo, VideoLimits, VideoReader

_KEPT_BYTES = 64 << 20
"""Decoded frames kept from counting, so that a video that fits is not decoded twice: room for 23 s of 320 x
240 at 25 frames a second. Nearly all files whose frames must be decoded to be counted (Xvid AVI with
B-frames) fit."""

_FATAL_FORMATS = frozenset({"yaf32le", "yaf32be"})
"""An assertion fails in swscale 9.5; its other formats either convert or raise."""


class PyAvReader(VideoReader):
    """Reads a path or bytes.

    Frames are identified by presentation time where packets tell it exactly (``build_table``); such a video
    is indexed without decoding, and read from the last entry point before a wanted frame. Other videos are
    decoded once to be counted, and their frames are identified by count.
    """

    def __init__(self, source: CheckedSource, limits: VideoLimits) -> None:
        self._name = source.name
        self._kept: list[av.VideoFrame] | None = None
        self._budget = Budget(source.name, limits)
        self._packets = PacketSource(source, self._budget)
        try:
            context = self._packets.stream.codec_context
            self._budget.check_size(context.width, context.height)
            self._table = self._read_table(source)
            if self._table is None:
                first, self.pts_seconds = self._count()
            else:
                first = self._first_frame(self._table)
                self._table = self._table.starting_at(first.pts or 0)
                self.pts_seconds = self._table.seconds(float(self._packets.stream.time_base))
            self.info = self._budget.check_info(self._describe(source, first))
        except BaseException:
            self.close()
            raise

    def renew_time(self) -> None:
        """See ``VideoReader.renew_time``."""
        self._budget.renew()

    def close(self) -> None:
        """Free the decoder; calling it twice is allowed."""
        self._kept = None
        self._packets.close()

    def frames(self, indices: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """See ``VideoReader.frames``."""
        if not self._packets.is_open:
            raise ValueError(f"{self._name} is closed")
        if self._table is not None:
            return self._frames_by_time(indices, self._table)
        if self._kept is not None:
            kept = self._kept
            return ((index, kept[index]) for index in indices)
        return self._frames_by_count(indices)

    def to_rgb(self, frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
        """See ``VideoReader.to_rgb``."""
        name = frame.format.name
        reason = "FFmpeg ends the process on it" if name in _FATAL_FORMATS else ""
        if not reason:
            try:
                with self._budget.charged():
                    return resize_frame(frame, size, rotation=self.info.rotation)
            except (av.FFmpegError, ValueError) as error:
                reason = reason_of(error, most=100)
        raise VideoDecodeError(
            f"{self._name}: frames of the pixel format {name} cannot be converted: {reason}",
            hint="encode it again as yuv420p",
        )

    def _describe(self, source: CheckedSource, first: av.VideoFrame) -> VideoInfo:
        stream = self._packets.stream
        rotation = round(first.rotation / 90) * 90 % 360
        width, height = max(1, round(first.width * (stream.sample_aspect_ratio or 1))), first.height
        return VideoInfo.of(
            self.pts_seconds,
            nominal_fps=float(stream.average_rate or 0),
            size=(width, height) if rotation in (0, 180) else (height, width),
            codec=self._packets.codec,
            container=source.container,
            rotation=rotation,
            size_bytes=source.size_bytes,
            decoder="pyav",
        )

    def _read_table(self, source: CheckedSource) -> FrameTable | None:
        try:
            return build_table(source, self._packets, self._budget)
        except VideoDecodeError as error:
            raise VideoDecodeError(f"{self._name}: {error.message}", hint=error.hint) from error

    def _first_frame(self, table: FrameTable) -> av.VideoFrame:
        reason = "the decoder gives no frame"
        try:
            for _, frame in self._decode_from(table, None):
                return frame
        except VideoDecodeError as error:
            reason = error.message
        raise VideoDecodeError(f"{self._name}: not one frame can be decoded: {reason}", hint=DAMAGED_HINT)

    def _frames_by_time(
        self, indices: Sequence[int], table: FrameTable
    ) -> Iterator[tuple[int, av.VideoFrame]]:
        wanted = {int(table.pts[index]) for index in indices}
        decoding: Iterator[tuple[int, av.VideoFrame]] = iter(())
        place, last = -1, -1
        for index in indices:
            pts = int(table.pts[index])
            entry = table.entry_for(pts)
            if last < 0 or (entry is not None and entry.order > place):
                decoding = self._decode_from(table, entry, wanted)
            try:
                found = next(
                    (item for item in decoding if item[1].pts is not None and item[1].pts >= pts), None
                )
            except VideoDecodeError as error:
                raise self._undecodable(index, last, table, error.message) from error
            if found is None or found[1].pts != pts:
                raise self._undecodable(index, last, table, "the decoder gives no such frame")
            place, last = found[0], index
            yield index, found[1]

    def _decode_from(
        self, table: FrameTable, entry: EntryPoint | None, wanted: Collection[int] | None = None
    ) -> Iterator[tuple[int, av.VideoFrame]]:
        """Decode from an entry point or the start on; yield the place of the packet just read and a frame.

        Args:
            table: Tells where a seek went.
            entry: Where to begin.
            wanted: Presentation times. Of the other frames, those that no frame refers to are left out: with every
                fourth frame wanted this saves 15 to 55 % of decoding real H.264 and HEVC clips. None keeps all.
        """
        for place, packet in self._packets.packets_from(*table.seek_to(entry)):
            if wanted is not None and packet.pts in table.unreferenced and packet.pts not in wanted:
                continue
            for frame in self._packets.decode(packet):
                yield place, frame

    def _undecodable(self, index: int, last: int, table: FrameTable, reason: str) -> VideoDecodeError:
        count = len(table.pts)
        if table.num_missing:
            reason += f"; the file is cut off and holds {count - table.num_missing} of its {count} frames"
        decoded = f"the last one decoded is {last}" if last >= 0 else "it is the first one asked for"
        return VideoDecodeError(
            f"{self._name}: frame {index} of {count} cannot be decoded ({decoded}): {reason}",
            hint=DAMAGED_HINT,
        )

    def _decode_all(self) -> Iterator[av.VideoFrame]:
        self._packets.reopen()
        for packet in self._packets.packets():
            yield from self._packets.decode(packet)

    def _count(self) -> tuple[av.VideoFrame, np.ndarray]:
        """Decode everything and keep the frames while they fit; return the first and all times in seconds."""
        times: list[int | None] = []
        kept: list[av.VideoFrame] = []
        kept_bytes = 0
        try:
            for frame in self._decode_all():
                times.append(frame.pts)
                self._budget.check_count(len(times))
                kept_bytes += sum(plane.buffer_size for plane in frame.planes)
                if kept_bytes <= _KEPT_BYTES or len(times) == 1:
                    kept.append(frame)
        except VideoDecodeError as error:
            raise VideoDecodeError(
                f"{self._name}: decoding stopped after {len(times)} frames: {error.message}",
                hint=DAMAGED_HINT,
            ) from error
        if not times:
            raise VideoDecodeError(f"{self._name}: not one frame can be decoded", hint=DAMAGED_HINT)
        if kept_bytes <= _KEPT_BYTES:
            self._kept = kept
        return kept[0], self._seconds(times)

    def _seconds(self, times: list[int | None]) -> np.ndarray:
        """Take the frames' own times when they increase, else the nominal rate (AVI with B-frames)."""
        stream = self._packets.stream
        known = [time for time in times if time is not None]
        if len(known) == len(times) and all(earlier < later for earlier, later in pairwise(known)):
            return (np.array(known, np.float64) - known[0]) * float(stream.time_base)
        if not stream.average_rate:
            raise VideoDecodeError(
                f"{self._name} has neither frame times nor a frame rate", hint=DAMAGED_HINT
            )
        return np.arange(len(times), dtype=np.float64) / float(stream.average_rate)

    def _frames_by_count(self, indices: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        decoding = enumerate(self._decode_all())
        for index in indices:
            reason = "the file is shorter than it was when it was opened"
            try:
                found = next((item for item in decoding if item[0] == index), None)
            except VideoDecodeError as error:
                found, reason = None, error.message
            if found is None:
                raise VideoDecodeError(
                    f"{self._name}: frame {index} of {self.info.num_frames} cannot be decoded: {reason}",
                    hint=DAMAGED_HINT,
                )
            yield found
