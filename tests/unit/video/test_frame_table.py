"""What the packets of a file say about its frames, for packets that an encoder seldom writes."""

from __future__ import annotations

from types import SimpleNamespace

from ivdr_deploy.video import VideoLimits
from ivdr_deploy.video._frame_table import EntryPoint, FrameTable, build_table
from ivdr_deploy.video._source import Budget, CheckedSource

HVCC = b"\x01" + bytes(20) + b"\x03"
IDR, FREE, NEEDED = 19, 0, 1
"""Kinds of HEVC pictures: to begin with; that no other of their temporal layer refers to; that others do."""


class Packet(bytes):
    """One HEVC picture of some kind, in a temporal layer."""

    is_discard = is_corrupt = False

    def __new__(cls, kind: int, layer: int, pts: int) -> Packet:
        self = super().__new__(cls, b"\x00\x00\x00\x03" + bytes([kind << 1, layer + 1, 0x80]))
        self.pts = self.dts = self.pos = pts
        self.size, self.is_keyframe = len(self), kind == IDR
        return self


def table_of(*packets: Packet) -> FrameTable:
    stream = SimpleNamespace(codec_context=SimpleNamespace(extradata=HVCC), index_entries=[])
    source = SimpleNamespace(packets=lambda: iter(packets), codec="hevc", stream=stream)
    checked = CheckedSource(data=b"", name="a", size_bytes=1 << 20, container="mov")
    table = build_table(checked, source, Budget("a", VideoLimits()))  # type: ignore[arg-type]
    assert table is not None
    return table


def test_only_frames_of_the_highest_layer_are_left_out() -> None:
    table = table_of(Packet(IDR, 0, 0), Packet(FREE, 0, 4), Packet(FREE, 1, 2), Packet(NEEDED, 1, 3))
    assert table.pts.tolist() == [0, 2, 3, 4]
    assert table.unreferenced == {2}


def test_entry_points_rise_and_others_are_passed_over() -> None:
    table = table_of(*(Packet(IDR, 0, pts) for pts in (0, 20, 10, 30)))
    assert table.entries == (EntryPoint(0, 0, 0), EntryPoint(20, 20, 1), EntryPoint(30, 30, 3))
    assert [table.entry_for(pts) for pts in (10, 29)] == [table.entries[0], table.entries[1]]
    assert table.entry_for(-1) is None
