"""Which frames are decoded to give those that were asked for: no more than needed, and no wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import pytest
from made_videos import (
    decoded_from_the_start,
    frame_bytes,
    noisy_frames,
    remux,
)
from videos import frame_number, numbered_video, write_video

from ivdr_deploy.video import _pyav
from ivdr_deploy.video.decode import open_video


def count_decoded(path: Path, indices: list[int], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many frames the decoder puts out for a read, opening not counted."""
    decoded = 0
    decode = _pyav.PacketSource.decode

    def counting(self: _pyav.PacketSource, packet: object) -> list[av.VideoFrame]:
        nonlocal decoded
        frames = decode(self, packet)
        decoded += len(frames)
        return frames

    with open_video(path) as reader:
        monkeypatch.setattr(_pyav.PacketSource, "decode", counting)
        assert [index for index, _ in reader.frames(indices)] == indices
    return decoded


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_reading_starts_at_the_last_key_frame_and_stops_at_the_last_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = numbered_video(tmp_path / f"a.{suffix}", num_frames=200, gop=10, bframes=0)
    assert count_decoded(path, [100], monkeypatch) <= 3
    assert count_decoded(path, [104, 195], monkeypatch) <= 15
    assert count_decoded(path, [3, 4, 5], monkeypatch) <= 8


def test_frames_that_nothing_refers_to_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(
        tmp_path / "a.mp4",
        noisy_frames(90),
        gop=90,
        bframes=2,
        options={"x264-params": "b-adapt=0:b-pyramid=none:scenecut=0"},
    )
    assert count_decoded(path, [0, 87], monkeypatch) <= 34  # 90 frames, every third one a reference


def test_frames_that_had_to_be_decoded_to_be_counted_are_not_decoded_again(
    videos: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert count_decoded(videos("mpeg4_bframes.avi"), [0, 20, 44], monkeypatch) == 0


def test_a_counted_video_too_large_to_keep_is_decoded_again(
    videos: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pyav, "_KEPT_BYTES", 20_000)
    sequential = decoded_from_the_start(videos("mpeg4_bframes.avi"))
    assert frame_bytes(videos("mpeg4_bframes.avi"), [1, 20, 44]) == [sequential[k] for k in (1, 20, 44)]
    assert count_decoded(videos("mpeg4_bframes.avi"), [1, 20], monkeypatch) > 0


def test_key_frames_that_are_only_recovery_points_are_not_trusted(videos: Callable[[str], Path]) -> None:
    """Seeking to such a point does not even give its own frame: the picture is whole only some frames later."""
    path = videos("gradual_refresh.mp4")
    sequential = decoded_from_the_start(path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        flagged = [packet.pts for packet in container.demux(stream) if packet.is_keyframe]
        assert len(flagged) > 1
        container.seek(flagged[1], stream=stream)
        assert next(container.decode(stream)).pts > flagged[1]
        index = round(flagged[1] * 25 * float(stream.time_base))
    assert frame_bytes(path, [index]) == [sequential[index]]


def test_frames_of_one_time_are_all_there(tmp_path: Path) -> None:
    """A time then does not name a frame."""
    source = write_video(tmp_path / "a.mkv", noisy_frames(20), gop=5, bframes=0)
    twice = tmp_path / "twice.mkv"
    with av.open(str(source)) as reading, av.open(str(twice), "w") as writing:
        stream = writing.add_stream_from_template(reading.streams.video[0])
        packets = [packet for packet in reading.demux(video=0) if packet.dts is not None]
        for place in (5, 12):
            packets[place].pts = packets[place].dts = packets[place - 1].pts
        for packet in packets:
            packet.stream = stream
            writing.mux(packet)
    sequential = decoded_from_the_start(twice)
    assert len(sequential) == 20
    assert frame_bytes(twice, list(range(20))) == sequential
    for index in (4, 5, 6, 11, 12, 13):
        assert frame_bytes(twice, [index]) == [sequential[index]]


def test_frames_whose_references_were_cut_off_are_not_counted(
    tmp_path: Path, videos: Callable[[str], Path]
) -> None:
    whole = videos("hevc_open_gop.mp4")
    with av.open(str(whole)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.dts is not None]
    keys = [place for place, packet in enumerate(packets) if place and packet.is_keyframe]
    key = next(place for place in keys if packets[place + 1].pts < packets[place].pts)
    cut = remux(whole, tmp_path / "cut.mkv", skip=key, shift=min(packet.pts for packet in packets[key:]))
    first = round(packets[key].pts * 25 * float(packets[0].time_base))
    with open_video(cut) as reader:
        assert [frame_number(rgb) for rgb in reader.read(range(reader.info.num_frames))] == list(
            range(first, 45)
        )


@pytest.mark.parametrize(
    ("suffix", "options"),
    [("mp4", {"movflags": "frag_keyframe+empty_moov+default_base_moof"}), ("mkv", {"live": "1"})],
)
def test_files_without_an_index_are_read_all_the_same(
    tmp_path: Path, suffix: str, options: dict[str, str]
) -> None:
    whole = numbered_video(tmp_path / "whole.mp4", num_frames=60, gop=10)
    path = remux(whole, tmp_path / f"live.{suffix}", options=options)
    with open_video(path) as reader:
        assert [frame_number(rgb) for rgb in reader.read([59, 0, 31])] == [59, 0, 31]
