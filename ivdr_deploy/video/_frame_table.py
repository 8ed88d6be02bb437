"""Which frames a video displays, when, and where decoding may begin: from one pass over its packets."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ivdr_deploy.video._bitstream import is_entry_point, is_hidden, is_one_frame, temporal_layer
from ivdr_deploy.video._packets import PacketSource
from ivdr_deploy.video._source import Budget, CheckedSource

_ONE_PACKET_ONE_FRAME = ("mov", "matroska", "gif")
"""Containers in which every packet, unless hidden or discarded, is one frame and carries its display time."""

_SEEKABLE = ("mov", "matroska", "avi")


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """A packet from which decoding gives the same frames as decoding from the start."""

    pts: int
    """Its frame, and every frame displayed later, come out right."""

    seek_time: int
    """What to ask the demuxer for, in the stream's time base."""

    order: int
    """Its place among the packets of the stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameTable:
    """The displayed frames of a video."""

    pts: np.ndarray
    """int64 (num_frames,), strictly increasing, in the stream's time base."""

    num_missing: int = 0
    """Frames at the end that the index promises and the file, cut off, does not hold."""

    entries: tuple[EntryPoint, ...] = ()
    """Where decoding may begin besides the start; strictly increasing in ``pts`` and ``order``."""

    unreferenced: frozenset[int] = frozenset()
    """Presentation times of frames that no other frame refers to: they need decoding only when asked for."""

    start_time: int | None = None
    """What to ask the demuxer for to get to the first packet; None when unknown."""

    order_at: dict[int, int] = field(default_factory=dict)
    """Byte position of a packet -> its place: tells where a seek really went."""

    def seconds(self, time_base: float) -> np.ndarray:
        """Return the presentation times in seconds, the first one 0."""
        return np.asarray((self.pts - self.pts[0]) * time_base, np.float64)

    def starting_at(self, pts: int) -> FrameTable:
        """Drop frames before the first one decoded: a cut may leave some that refer to what is gone."""
        return replace(self, pts=self.pts[np.searchsorted(self.pts, pts) :])

    def seek_to(self, entry: EntryPoint | None) -> tuple[int | None, int, dict[int, int]]:
        """Return the arguments of ``PacketSource.packets_from``."""
        if entry is None:
            return self.start_time, 0, self.order_at
        return entry.seek_time, entry.order, self.order_at

    def entry_for(self, pts: int) -> EntryPoint | None:
        """Return the last entry point that gives the frame at ``pts``; None stands for the start."""
        place = bisect_right(self.entries, pts, key=lambda entry: entry.pts)
        return self.entries[place - 1] if place else None


def build_table(source: CheckedSource, packets: PacketSource, budget: Budget) -> FrameTable | None:
    """Read all packets of a video; return None when they do not tell the displayed frames exactly."""
    container, codec = source.container, packets.codec
    extradata = packets.stream.codec_context.extradata or b""
    shown: list[int | None] = []
    entries: list[EntryPoint] = []
    order_at: dict[int, int] = {}
    free_in: dict[int, list[int]] = {}  # temporal layer -> frames that nothing in it refers to
    start_time: int | None = None
    num_packets = 0
    for order, packet in enumerate(packets.packets()):
        if packet.dts is None and not packet.size:
            break  # the drain packet
        num_packets += 1
        data = bytes(packet)
        if container not in _ONE_PACKET_ONE_FRAME and not (container == "avi" and is_one_frame(codec, data)):
            return None
        order_at[packet.pos] = order
        seek_time = packet.pts if container == "matroska" else packet.dts
        if order == 0:
            start_time = seek_time
        entry = EntryPoint(packet.pts, seek_time, order)
        if packet.is_keyframe and is_entry_point(codec, data, extradata) and _follows(entries, entry):
            entries.append(entry)
        layer, free = temporal_layer(codec, data, extradata)
        free_in.setdefault(layer, []).extend([packet.pts] * free)
        cut_off = container == "mov" and packet.is_corrupt
        if not (packet.is_discard or cut_off or is_hidden(codec, data)):
            shown.append(packet.pts)
            budget.check_count(len(shown))
    pts = sorted(time for time in shown if time is not None)
    if len(set(pts)) != len(shown):
        return None
    # No seek can be checked unless each packet has its own position; an edit list may play a part twice.
    if len(order_at) != num_packets or None in order_at or container not in _SEEKABLE:
        entries, start_time = [], None
    missing = 0
    if container == "mov":
        budget.check_packets(len(packets.stream.index_entries))
        with budget.charged():
            missing = _count_beyond(packets.stream, source.size_bytes)
        budget.check_count(len(pts) + missing)
    return FrameTable(
        pts=_extended(pts, missing),
        num_missing=missing,
        entries=tuple(entries),
        unreferenced=frozenset(free_in[max(free_in)]) if free_in else frozenset(),
        start_time=start_time,
        order_at=order_at,
    )


def _follows(entries: list[EntryPoint], entry: EntryPoint) -> bool:
    """Whether an entry point has its times, and is displayed after the last one."""
    if entry.pts is None or entry.seek_time is None:
        return False
    return not entries or entry.pts > entries[-1].pts


def _count_beyond(stream: Any, size_bytes: int) -> int:
    """Count the samples that the index places, in whole or in part, beyond the end of the file."""
    return sum(1 for entry in stream.index_entries if entry.pos + entry.size > size_bytes)


def _extended(pts: list[int], count: int) -> np.ndarray:
    """Go on at the average distance, where the index knows of frames whose times are lost with them."""
    step = max(1, round((pts[-1] - pts[0]) / (len(pts) - 1))) if len(pts) > 1 else 1
    last = pts[-1] if pts else 0
    return np.array([*pts, *(last + step * (k + 1) for k in range(count))], np.int64)
