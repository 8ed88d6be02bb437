"""The readers on numbered videos: whatever the codec and container, index k gives the frame that shows k."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from made_videos import (
    ALL_CONTAINERS,
    DECODERS,
    NUM_FRAMES,
    VARIABLE_MS,
    VIDEOS,
    decoded_from_the_start,
    frame_bytes,
    remux,
)
from videos import frame_number, numbered_frame, numbered_video, write_video

from ivdr_deploy.spec import DecoderName
from ivdr_deploy.video.decode import open_video

# What every reader gives.


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", VIDEOS)
def test_every_index_gives_its_frame(videos: Callable[[str], Path], name: str, decoder: DecoderName) -> None:
    with open_video(videos(name), limits=ALL_CONTAINERS, decoder=decoder) as reader:
        assert reader.info.num_frames == NUM_FRAMES
        assert [frame_number(rgb) for rgb in reader.read(range(NUM_FRAMES))] == list(range(NUM_FRAMES))
        assert [frame_number(rgb) for rgb in reader.read([40, 3, 3, 17])] == [40, 3, 3, 17]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", [name for name in VIDEOS if not name.startswith("variable")])
def test_times_of_a_constant_rate(videos: Callable[[str], Path], name: str, decoder: DecoderName) -> None:
    rate = VIDEOS[name].get("fps", 25)
    with open_video(videos(name), limits=ALL_CONTAINERS, decoder=decoder) as reader:
        assert reader.pts_seconds == pytest.approx(np.arange(NUM_FRAMES) / rate, abs=1e-3)
        assert reader.info.fps == pytest.approx(rate, rel=1e-3)
        assert reader.info.duration_seconds == pytest.approx(NUM_FRAMES / rate, rel=1e-3)
        assert not reader.info.variable_frame_rate


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", ["variable.mp4", "variable.mkv"])
def test_times_of_a_variable_rate(videos: Callable[[str], Path], name: str, decoder: DecoderName) -> None:
    with open_video(videos(name), decoder=decoder) as reader:
        assert reader.pts_seconds == pytest.approx(np.array(VARIABLE_MS) / 1000, abs=1e-3)
        assert reader.info.variable_frame_rate


@pytest.mark.parametrize("decoder", DECODERS)
def test_facts_of_a_video(tmp_path: Path, decoder: DecoderName) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=10, size=(64, 48))
    with open_video(path, decoder=decoder) as reader:
        info = reader.info
    assert (info.num_frames, info.width, info.height, info.rotation) == (10, 64, 48, 0)
    assert (info.codec, info.container, info.decoder) == ("h264", "mov", decoder)
    assert info.size_bytes == path.stat().st_size


@pytest.mark.parametrize("decoder", DECODERS)
def test_reading_resizes_and_keeps_the_order_asked_for(tmp_path: Path, decoder: DecoderName) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=10)
    with open_video(path, decoder=decoder) as reader:
        frames = reader.read([7, 0, 7], size=(48, 64))
        assert frames.dtype == np.uint8
        assert frames.shape == (3, 48, 64, 3)
        assert [frame_number(rgb) for rgb in frames] == [7, 0, 7]
        assert reader.read([]).shape == (0, 96, 128, 3)
        for wrong in ([10], [-1], [0, 99]):
            with pytest.raises(IndexError):
                reader.read(wrong)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_frames_come_out_upright(tmp_path: Path, rotation: int, decoder: DecoderName) -> None:
    turned = (np.rot90(numbered_frame(k, size=(96, 128)), -rotation // 90) for k in range(5))
    stored = write_video(tmp_path / "stored.mp4", turned)
    path = remux(stored, tmp_path / "turned.mp4", rotation=rotation)
    with open_video(path, decoder=decoder) as reader:
        assert (reader.info.width, reader.info.height, reader.info.rotation) == (96, 128, rotation)
        assert [frame_number(rgb) for rgb in reader.read(range(5))] == list(range(5))
        assert [frame_number(rgb) for rgb in reader.read(range(5), size=(64, 48))] == list(range(5))


@pytest.mark.parametrize("decoder", DECODERS)
def test_pixels_that_are_not_square_are_stretched(tmp_path: Path, decoder: DecoderName) -> None:
    path = tmp_path / "wide.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 96, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        frame = av.VideoFrame.from_ndarray(numbered_frame(0, size=(96, 96)), format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with open_video(path, decoder=decoder) as reader:
        assert (reader.info.width, reader.info.height) == (128, 96)
        assert reader.read([0]).shape == (1, 96, 128, 3)


@pytest.mark.parametrize("decoder", DECODERS)
def test_an_edit_list_that_drops_the_start_is_obeyed(tmp_path: Path, decoder: DecoderName) -> None:
    whole = numbered_video(tmp_path / "whole.mp4", num_frames=40, gop=15)
    cut = remux(whole, tmp_path / "cut.mp4", shift=20 * 512, options={"avoid_negative_ts": "disabled"})
    with open_video(cut, decoder=decoder) as reader:
        assert reader.info.num_frames == 20
        assert reader.pts_seconds == pytest.approx(np.arange(20) / 25)
        assert [frame_number(rgb) for rgb in reader.read([0, 5, 19])] == [20, 25, 39]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_closed_reader_refuses_to_read(tmp_path: Path, decoder: DecoderName) -> None:
    with open_video(numbered_video(tmp_path / "a.mp4", num_frames=3), decoder=decoder) as reader:
        pass
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.read([0])


# What PyAV gives on top: the very frames of a sequential decode, at the least cost.


@pytest.mark.parametrize("name", VIDEOS)
def test_random_access_equals_sequential_decoding_to_the_bit(
    videos: Callable[[str], Path], name: str
) -> None:
    path = videos(name)
    sequential = decoded_from_the_start(path)
    rng = np.random.default_rng(1)
    wanted = [sorted(rng.choice(NUM_FRAMES, size, replace=False).tolist()) for size in (1, 1, 2, 3, 8, 20)]
    for indices in [[0], [NUM_FRAMES - 1], *wanted]:
        for source in (path, path.read_bytes()):
            assert frame_bytes(source, indices) == [sequential[index] for index in indices], indices


def test_a_reader_can_be_read_again_and_backwards(videos: Callable[[str], Path]) -> None:
    sequential = decoded_from_the_start(videos("short_gop.mp4"))
    with open_video(videos("short_gop.mp4")) as reader:
        for indices in ([30, 31], [2], [2, 44], [0]):
            read = [frame.to_ndarray(format="rgb24").tobytes() for _, frame in reader.frames(indices)]
            assert read == [sequential[index] for index in indices]


def test_the_default_stream_is_chosen_among_several(tmp_path: Path) -> None:
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=25) for _ in range(2)]
        for place, stream in enumerate(streams):
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            stream.disposition = Disposition.default if place else Disposition.original
        for number in range(5):
            for place, stream in enumerate(streams):
                rgb = numbered_frame(number + 100 * place, size=(64, 48))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode(None))
    with open_video(path) as reader:
        assert [frame_number(rgb) for rgb in reader.read(range(5))] == [100, 101, 102, 103, 104]
