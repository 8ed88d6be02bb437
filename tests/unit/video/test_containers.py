from __future__ import annotations

import pytest

from ivdr_deploy.errors import NoVideoStreamError, VideoOpenError
from ivdr_deploy.video.containers import sniff_container

TS_PACKET = b"\x47" + bytes(187)


@pytest.mark.parametrize(
    ("head", "container"),
    [
        (b"\x00\x00\x00\x20ftypisom", "mov"),
        (b"\x00\x00\x08\x00moov", "mov"),
        (b"\x00\x00\x00\x08wide", "mov"),
        (b"\x1a\x45\xdf\xa3\x01", "matroska"),
        (b"RIFF\x00\x01\x00\x00AVI LIST", "avi"),
        (b"GIF89a\x01\x00", "gif"),
        (b"\x00\x00\x01\xba\x44", "mpeg"),
        (TS_PACKET * 5, "mpegts"),
        (b"\x00\x00\x00\x00" + (TS_PACKET + bytes(4)) * 5, "mpegts"),
        (b"FLV\x01\x05", "flv"),
        (b"OggS\x00", "ogg"),
        (b"\x00\x00\x00\x01\x67\x64", "h264"),
        (b"\x00\x00\x01\x09\x10", "h264"),
        (b"\x00\x00\x00\x01\x40\x01\x0c", "hevc"),
        (b"\x00\x00\x01\xb3\x06", "mpegvideo"),
        (b"\x00\x00\x01\xb0\x01", "m4v"),
        (b"PK\x03\x04\x2d\x00", "npz"),
    ],
)
def test_a_container_is_known_by_its_first_bytes(head: bytes, container: str) -> None:
    assert sniff_container(head, name="a.mp4") == container


@pytest.mark.parametrize(
    "head", [b"ID3\x04", b"\xff\xfb\x90", b"RIFF\x00\x00\x00\x00WAVEfmt ", b"fLaC", b"FWS\x06"]
)
def test_sound_files_have_no_video_stream(head: bytes) -> None:
    with pytest.raises(NoVideoStreamError, match=r"a\.mp4"):
        sniff_container(head, name="a.mp4")


@pytest.mark.parametrize(
    "head",
    [
        b"\xff\xd8\xff\xe0\x00\x10JFIF",
        b"\x89PNG\r\n\x1a\n",
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd",
        b"ffconcat version 1.0\nfile x",
        b"just text",
        b"\x47",
        b"\x00\x00\x01",
        b"\x00\x00\x00\x01\xff\xff",
        b"RIFF\x00\x00\x00\x00WEBPVP8 ",
    ],
)
def test_anything_else_is_refused_whatever_its_name(head: bytes) -> None:
    with pytest.raises(VideoOpenError, match=r"a\.mp4 is not a video file"):
        sniff_container(head, name="a.mp4")


def test_an_empty_file_is_called_empty() -> None:
    with pytest.raises(VideoOpenError, match="empty"):
        sniff_container(b"", name="a.mp4")
