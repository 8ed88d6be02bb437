"""One video stream of a file, as packets: opening, seeking and decoding, with FFmpeg's errors named."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from typing import Any

import av
from av.stream import Discard, Disposition

from ivdr_deploy._text import reason_of
from ivdr_deploy.errors import NoVideoStreamError, VideoDecodeError, VideoLimitError, VideoOpenError
from ivdr_deploy.video._source import DAMAGED_HINT, Budget, CheckedSource

av.logging.set_level(
    None
)  # FFmpeg's log callback takes a lock, and its lines say nothing that the errors do not


_BAD_DATA = (av.FFmpegError, ValueError, IndexError)
"""What PyAV raises for bad data; IndexError when a stream turns up on the way (damaged transport streams)."""


_MAX_STREAMS = 100
"""Of one file. FFmpeg's own limit is 1000, and it may decode a picture of each while it opens the file."""


def open_arguments(
    source: CheckedSource, *, max_pixels: int, pyav_version: str = av.__version__
) -> dict[str, Any]:
    """Return the arguments of ``av.open`` for a source, for the PyAV that is installed.

    The container is named, so that FFmpeg never guesses one, and nothing but the file itself may be opened. Opening
    may decode pictures to learn what they are: ``max_pixels`` holds for these, too. PyAV 18
    raises on metadata that are not UTF-8 unless told otherwise; PyAV 19 never does, and knows no such argument.
    """
    data = source.data
    arguments: dict[str, Any] = {
        "file": io.BytesIO(data) if isinstance(data, bytes) else str(data),
        "format": source.container,
        "options": {
            "protocol_whitelist": "" if isinstance(data, bytes) else "file",
            "max_streams": str(_MAX_STREAMS),
            "max_pixels": str(max_pixels),
        },
    }
    if int(pyav_version.partition(".")[0]) < 19:
        arguments["metadata_errors"] = "ignore"
    return arguments


class PacketSource:
    """The first video stream marked as default, or the first of all; a cover picture does not count."""

    stream: Any
    """PyAV's stream; replaced when the file must be opened again."""

    def __init__(self, source: CheckedSource, budget: Budget) -> None:
        self._source, self._budget = source, budget
        self._container: Any = None
        self.reopen()

    @property
    def codec(self) -> str:
        """FFmpeg's name of the format, whichever decoder reads it."""
        return str(self.stream.codec_context.codec.canonical_name)

    @property
    def is_open(self) -> bool:
        """Whether ``close`` has not been called."""
        return self._container is not None

    def close(self) -> None:
        """Close the file; calling it twice is allowed."""
        if self._container is not None:
            self._container.close()
            self._container = None

    def reopen(self) -> None:
        """Open the file, afresh when it is open already: the one seek that always works.

        Raises:
            VideoOpenError: if FFmpeg cannot open it, or has no decoder for it.
            NoVideoStreamError: if it holds no moving pictures.
            VideoLimitError: if it has too many streams, or needs more memory than there is.
        """
        self.close()
        try:
            with self._budget.charged():
                self._container = self._opened()
            self.stream = self._pick_stream()
        except _BAD_DATA as error:
            self.close()
            raise VideoOpenError(
                f"{self._source.name} cannot be opened: {_reason(error)}", hint=DAMAGED_HINT
            ) from error
        except BaseException:
            self.close()
            raise

    def packets(self) -> Iterator[Any]:
        """Yield the packets from the current place to the end, then the empty one that drains a decoder.

        Raises:
            VideoDecodeError: if the file cannot be read on; as in ``decode``, the caller names the file.
            VideoTimeoutError: when the time allowed is used up.
        """
        num_packets = 0
        # Closed, since a generator of PyAV that is dropped half way loses half a kilobyte for good.
        with closing(self._container.demux(self.stream)) as demuxing:
            while True:
                try:
                    with self._budget.charged():
                        packet = next(demuxing, None)
                except _BAD_DATA as error:
                    raise VideoDecodeError(f"reading stopped: {_reason(error)}", hint=DAMAGED_HINT) from error
                if packet is None:
                    return
                num_packets += 1
                self._budget.check_packets(num_packets)
                yield packet

    def packets_from(
        self, time: int | None, order: int, order_at: dict[int, int]
    ) -> Iterator[tuple[int, Any]]:
        """Yield (place in the file, packet) from a given place on.

        Args:
            time: What to ask the demuxer for, in the stream's time base; None for the start of the file.
            order: The place to begin at.
            order_at: Byte position of a packet -> its place. A seek counts only when the packet found is in
                here and does not lie behind ``order``; otherwise the file is read from its start.
        """
        packets = self._sought(time, order, order_at) if time is not None else None
        if packets is None:
            self.reopen()
            packets = enumerate(self.packets())
        return ((place, packet) for place, packet in packets if place >= order)

    def decode(self, packet: Any) -> list[av.VideoFrame]:
        """Decode one packet.

        Raises:
            VideoDecodeError: if the decoder refuses it.
            VideoLimitError: if its frame is larger than allowed, or more memory is needed than allowed.
            VideoTimeoutError: when the time allowed is used up.
        """
        with self._budget.charged():
            try:
                return list(packet.decode())
            except _BAD_DATA as error:
                self._check_refused_size(error)
                if isinstance(error, MemoryError):
                    raise
                raise VideoDecodeError(_reason(error), hint=DAMAGED_HINT) from error

    def _opened(self) -> Any:
        try:
            return av.open(**open_arguments(self._source, max_pixels=self._budget.limits.max_pixels))
        except MemoryError as error:  # FFmpeg says it of too many streams, too
            raise VideoLimitError(
                f"{self._source.name} has more than {_MAX_STREAMS} streams, the limit, or needs more memory than the "
                "decoder may take",
                hint="send the pictures alone, or raise the memory of a decode worker",
            ) from error

    def _check_refused_size(self, error: Exception) -> None:
        """See whether a decoder failed since its frames are too large: a stream may grow, or its header lie.

        HEVC then has the size that was refused, all others have none.

        Raises:
            VideoLimitError: if so.
        """
        context = self.stream.codec_context
        self._budget.check_size(context.width, context.height)
        if not context.width and (self._had_size or isinstance(error, av.ArgumentError)):
            raise VideoLimitError(
                f"{self._source.name} has frames of a size that its header does not tell, and more than the "
                f"limit of {self._budget.limits.max_pixels} pixels",
                hint="send a smaller picture, or raise the limit",
            )

    def _sought(self, time: int, order: int, order_at: dict[int, int]) -> Iterator[tuple[int, Any]] | None:
        try:
            self._container.seek(time, stream=self.stream, backward=True)
            packets = self.packets()
            first = next(packets)
        except (*_BAD_DATA, VideoDecodeError, StopIteration):
            return None
        place = order_at.get(first.pos) if first.pos is not None else None
        return None if place is None or place > order else enumerate(chain([first], packets), place)

    def _pick_stream(self) -> Any:
        streams = self._container.streams
        moving = [stream for stream in streams.video if not stream.disposition & Disposition.attached_pic]
        if not moving:
            raise NoVideoStreamError(
                f"{self._source.name} has no video stream", hint="send a file with moving pictures"
            )
        stream = next((stream for stream in moving if stream.disposition & Disposition.default), moving[0])
        context = stream.codec_context
        if context is None:
            raise VideoOpenError(
                f"{self._source.name} uses a video codec that is not built in", hint="encode it as H.264"
            )
        for other in streams:
            if other.index != stream.index:
                other.discard = Discard.all
        self._had_size = context.width > 0
        context.thread_type, context.thread_count = "NONE", 1
        context.options = {"max_pixels": str(self._budget.limits.max_pixels)}  # a stream may grow on the way
        return stream


def _reason(error: Exception) -> str:
    """FFmpeg's words without its error numbers."""
    return getattr(error, "strerror", None) or reason_of(error)
