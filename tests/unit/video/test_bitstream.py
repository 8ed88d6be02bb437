from __future__ import annotations

import pytest

from ivdr_deploy.video._bitstream import is_entry_point, is_hidden, is_one_frame, temporal_layer

AVCC = b"\x01\x64\x00\x1f\xff\xe1"  # NAL units after 4-byte lengths
HVCC = b"\x01" + bytes(20) + b"\x03"
FILLER = bytes(20)


def vop(kind: str, size: int = 40) -> bytes:
    return b"\x00\x00\x01\xb6" + bytes(["IPBS".index(kind) << 6 | 0x1F]) + b"\x55" * (size - 5)


@pytest.mark.parametrize(
    ("codec", "packet", "extradata", "expected"),
    [
        ("h264", b"\x00\x00\x00\x02\x06\x05\x00\x00\x00\x03\x65\x88\x80", AVCC, True),
        ("h264", b"\x00\x00\x00\x02\x06\x05\x00\x00\x00\x03\x41\x88\x80", AVCC, False),  # a recovery point
        ("h264", b"\x00\x00\x00\x01\x67\x64\x00\x00\x01\x65\x88", b"", True),
        ("h264", b"\x00\x00\x00\x01\x67\x64\x00\x00\x01\x41\x88", b"", False),
        ("hevc", b"\x00\x00\x00\x03\x28\x01\xaf", HVCC, True),  # IDR
        ("hevc", b"\x00\x00\x00\x03\x2a\x01\xaf", HVCC, True),  # CRA
        ("hevc", b"\x00\x00\x00\x03\x02\x01\xaf", HVCC, False),
        ("vp8", b"\x10\x02\x00", b"", True),
        ("vp8", b"\x11\x02\x00", b"", False),
        ("mpeg4", vop("I"), b"", True),
        ("mpeg4", vop("P"), b"", False),
        ("mjpeg", b"\xff\xd8", b"", True),
        ("unheard_of", b"\x00\x00\x01\x65", b"", False),
        ("h264", b"", AVCC, False),
    ],
)
def test_decoding_may_begin_only_where_it_is_exact(
    codec: str, packet: bytes, extradata: bytes, expected: bool
) -> None:
    assert is_entry_point(codec, packet, extradata) is expected


@pytest.mark.parametrize(
    ("codec", "packet", "expected"),
    [
        ("mpeg4", vop("I"), True),
        ("mpeg4", vop("P"), True),
        ("mpeg4", vop("B"), False),
        ("mpeg4", vop("P") + vop("B"), False),  # two frames in one packet
        ("mpeg4", vop("P", size=6), False),  # the placeholder for the second
        ("mpeg4", FILLER, False),
        ("mjpeg", b"\xff\xd8", True),
        ("h264", b"\x00\x00\x01\x65", False),
    ],
)
def test_a_packet_counts_as_a_frame_only_when_it_surely_is_one(
    codec: str, packet: bytes, expected: bool
) -> None:
    assert is_one_frame(codec, packet) is expected


def test_vp8_frames_kept_for_reference_only_are_hidden() -> None:
    assert is_hidden("vp8", b"\x01\x02\x00")
    assert not is_hidden("vp8", b"\x11\x02\x00")
    assert not is_hidden("vp9", b"\x01\x02\x00")


@pytest.mark.parametrize(
    ("codec", "packet", "extradata", "expected"),
    [
        ("h264", b"\x00\x00\x00\x02\x01\x9a\x00\x00\x00\x02\x01\x9a", AVCC, (0, True)),  # two slices
        ("h264", b"\x00\x00\x00\x02\x01\x9a\x00\x00\x00\x02\x21\x9a", AVCC, (0, False)),  # one is referred to
        ("h264", b"\x00\x00\x00\x02\x68\xce\x00\x00\x00\x02\x01\x9a", AVCC, (0, False)),  # brings parameters
        ("h264", b"\x00\x00\x00\x02\x06\x05", AVCC, (0, False)),
        ("hevc", b"\x00\x00\x00\x03\x00\x01\xaf", HVCC, (0, True)),
        ("hevc", b"\x00\x00\x00\x03\x00\x02\xaf", HVCC, (1, True)),
        ("hevc", b"\x00\x00\x00\x03\x02\x02\xaf", HVCC, (1, False)),
        ("vp9", b"\x82", b"", (0, False)),
    ],
)
def test_a_frame_may_be_left_out_only_when_none_refers_to_it(
    codec: str, packet: bytes, extradata: bytes, expected: tuple[int, bool]
) -> None:
    assert temporal_layer(codec, packet, extradata) == expected
