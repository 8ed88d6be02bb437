"""The readers on numbered videos: whatever the codec and container, index k gives the frame that shows k."""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from videos import frame_number, numbered_frame, numbered_video, write_video

from ivdr_deploy.errors import (
    ConfigError,
    NoVideoStreamError,
    VideoDecodeError,
    VideoError,
    VideoLimitError,
    VideoOpenError,
    VideoTimeoutError,
)
from ivdr_deploy.spec import DecoderName
from ivdr_deploy.video import _pyav
from ivdr_deploy.video.containers import CONTAINER_NAMES
from ivdr_deploy.video.decode import open_video
from ivdr_deploy.video.reader import VideoLimits

DECODERS: tuple[DecoderName, ...] = ("pyav", "opencv")
NUM_FRAMES = 45
VARIABLE_MS = [40 * k + 35 * (k // 7) for k in range(NUM_FRAMES)]
ALL_CONTAINERS = VideoLimits(containers=CONTAINER_NAMES)

X264, X265 = "keyint=9:scenecut=0:bframes=3", "keyint=9:scenecut=0:bframes=3:log-level=none"
VIDEOS: dict[str, dict[str, object]] = {
    "short_gop.mp4": {"gop": 5},
    "long_gop.mp4": {"gop": 300, "bframes": 4},
    "intra_only.mp4": {"gop": 1, "bframes": 0},
    "open_gop.mp4": {"options": {"x264-params": f"open-gop=1:{X264}"}},
    "gradual_refresh.mp4": {"gop": 20, "bframes": 0, "options": {"intra-refresh": "1"}},
    "h264.mkv": {},
    "h264.mov": {},
    "variable.mp4": {"pts_ms": VARIABLE_MS},
    "variable.mkv": {"pts_ms": VARIABLE_MS},
    "hevc_open_gop.mp4": {"codec": "libx265", "options": {"x265-params": f"open-gop=1:{X265}"}},
    "vp8.webm": {"codec": "libvpx", "bframes": 0},
    "vp9.webm": {"codec": "libvpx-vp9", "bframes": 0},
    "mpeg4.avi": {"codec": "mpeg4", "bframes": 0},
    "mpeg4_bframes.avi": {"codec": "mpeg4"},
    "mpeg4_bframes.mp4": {"codec": "mpeg4"},
    "mjpeg.avi": {"codec": "mjpeg", "bframes": 0, "pix_fmt": "yuvj420p"},
    "h264.avi": {},
    "mpeg2.mpg": {"codec": "mpeg2video"},
    "h264.ts": {},
    "h264.flv": {},
    "wmv2.asf": {"codec": "wmv2", "bframes": 0},
    "vp8.ogv": {"codec": "libvpx", "bframes": 0},
    "elementary.h264": {},
    "elementary.hevc": {"codec": "libx265", "options": {"x265-params": X265}},
    "elementary.m2v": {"codec": "mpeg2video"},
    "numbers.gif": {"codec": "gif", "pix_fmt": "gray", "fps": 10},
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make the videos of ``VIDEOS`` when first asked for: numbers over moving noise, so that each frame matters."""
    folder = tmp_path_factory.mktemp("videos")

    def video(name: str) -> Path:
        path = folder / name
        return path if path.exists() else write_video(path, noisy_frames(NUM_FRAMES), **VIDEOS[name])  # type: ignore[arg-type]

    return video


def noisy_frames(count: int) -> Iterator[np.ndarray]:
    noise = np.random.default_rng(0).integers(-30, 30, (64, 200, 3))
    for number in range(count):
        frame = numbered_frame(number, size=(96, 64)) + noise[:, number : number + 96]
        yield frame.clip(0, 255).astype(np.uint8)


def decoded_from_the_start(path: Path) -> list[bytes]:
    """Every frame of a file as RGB bytes, by nothing but PyAV's own loop."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]


def frame_bytes(path: Path | bytes, indices: list[int]) -> list[bytes]:
    with open_video(path, limits=ALL_CONTAINERS) as reader:
        return [frame.to_ndarray(format="rgb24").tobytes() for _, frame in reader.frames(indices)]


def remux(
    source: Path,
    target: Path,
    *,
    skip: int = 0,
    shift: int = 0,
    options: dict[str, str] | None = None,
    rotation: int | None = None,
) -> Path:
    """Copy the packets of a video, without the first ``skip``, ``shift`` ticks earlier."""
    with av.open(str(source)) as reading, av.open(str(target), "w", options=options or {}) as writing:
        stream = writing.add_stream_from_template(reading.streams.video[0])
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for packet in itertools.islice(reading.demux(video=0), skip, None):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                writing.mux(packet)
    return target


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


# What is refused.


def test_a_missing_path_a_folder_and_a_strange_name_are_named(tmp_path: Path) -> None:
    with pytest.raises(VideoOpenError, match=r"nowhere\.mp4 does not exist"):
        open_video(tmp_path / "nowhere.mp4")
    with pytest.raises(VideoOpenError, match="is a folder"):
        open_video(tmp_path)
    with pytest.raises(VideoOpenError, match="does not exist"):
        open_video("nul\0.mp4")


@pytest.mark.parametrize("url", ["http://127.0.0.1/a.mp4", "concat:a.mp4|b.mp4", "file:a.mp4", "pipe:0"])
def test_a_string_is_a_path_and_never_a_url(url: str) -> None:
    with pytest.raises(VideoOpenError, match="does not exist"):
        open_video(url)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        ({"max_bytes": 100}, VideoLimitError, "bytes"),
        ({"max_pixels": 64 * 48 - 1}, VideoLimitError, "64x48 pixels"),
        ({"max_frames": 19}, VideoLimitError, "more than 19 frames"),
        ({"max_seconds": 0.7}, VideoLimitError, r"lasts 0\.8 s"),
        ({"max_decode_seconds": 1e-9}, VideoTimeoutError, "longer than the limit"),
        ({"containers": ("avi",)}, VideoOpenError, "mov file, which is not allowed"),
    ],
)
def test_each_limit_is_kept(
    tmp_path: Path, limits: dict[str, object], error: type[Exception], message: str, decoder: DecoderName
) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=20, size=(64, 48))
    with pytest.raises(error, match=message):
        open_video(path, limits=VideoLimits(**limits), decoder=decoder)  # type: ignore[arg-type]
    exact = VideoLimits(max_bytes=path.stat().st_size, max_pixels=64 * 48, max_frames=20, max_seconds=0.8)
    open_video(path, limits=exact, decoder=decoder).close()


def test_the_frame_limit_holds_while_frames_are_counted(videos: Callable[[str], Path]) -> None:
    with pytest.raises(VideoLimitError, match="more than 10 frames"):
        open_video(videos("mpeg4_bframes.avi"), limits=VideoLimits(max_frames=10))


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_sliver_is_refused(tmp_path: Path, decoder: DecoderName) -> None:
    path = write_video(tmp_path / "a.mkv", [np.zeros((16, 16 * 65, 3), np.uint8)], codec="ffv1", bframes=0)
    with pytest.raises(VideoLimitError, match="64 times"):
        open_video(path, decoder=decoder)


@pytest.mark.parametrize(
    "limits", [{"max_frames": 0}, {"max_decode_seconds": -1.0}, {"containers": ("mp5",)}]
)
def test_senseless_limits_are_refused(limits: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        VideoLimits(**limits)  # type: ignore[arg-type]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_sound_file_with_a_cover_picture_has_no_video(tmp_path: Path, decoder: DecoderName) -> None:
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        sound, cover = container.add_stream("aac", rate=16000), container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        picture = av.VideoFrame.from_ndarray(numbered_frame(0, size=(64, 48)), format="rgb24")
        container.mux([*sound.encode(silence), *sound.encode(None)])
        container.mux([*cover.encode(picture), *cover.encode(None)])
    with pytest.raises(NoVideoStreamError):
        open_video(path, decoder=decoder)


def test_a_picture_or_text_named_mp4_is_no_video(tmp_path: Path) -> None:
    picture = write_video(
        tmp_path / "a.mjpeg", [numbered_frame(0, size=(64, 48))], codec="mjpeg", bframes=0, pix_fmt="yuvj420p"
    )
    for content in (picture.read_bytes(), b"#EXTM3U\nfile:///etc/passwd\n", b"text"):
        with pytest.raises(VideoOpenError, match="not a video file"):
            open_video(content)


def test_a_cut_off_mp4_keeps_its_length_and_reads_as_far_as_it_goes(tmp_path: Path) -> None:
    whole = numbered_video(tmp_path / "whole.mp4", num_frames=60, gop=10, bframes=0)
    data = remux(whole, tmp_path / "front.mp4", options={"movflags": "faststart"}).read_bytes()
    with open_video(data[: len(data) * 3 // 4]) as reader:
        assert reader.info.num_frames == 60
        assert [frame_number(rgb) for rgb in reader.read([0, 15, 3])] == [0, 15, 3]
        with pytest.raises(VideoDecodeError, match=r"frame 59 of 60 .*holds \d\d of its 60 frames"):
            reader.read([59])


def test_a_damaged_packet_is_an_error_that_says_how_far_decoding_got(tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "a.mp4", noisy_frames(40), gop=20, bframes=0, options={"x264-params": "scenecut=0"}
    )
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = next(itertools.islice(container.demux(video=0), 10, None))
        data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    with open_video(bytes(data)) as reader:
        assert [frame_number(rgb) for rgb in reader.read([5, 35])] == [5, 35]  # not touched by the damage
        with pytest.raises(VideoDecodeError, match=r"frame 15 of 40 .*the last one decoded is 5"):
            reader.read([5, 15])


def test_damaged_bytes_give_frames_or_a_video_error_and_nothing_else(videos: Callable[[str], Path]) -> None:
    rng = np.random.default_rng(2)
    good, errors = 0, []
    for name in ("short_gop.mp4", "vp8.webm", "mpeg4_bframes.avi", "numbers.gif", "h264.ts"):
        original = videos(name).read_bytes()
        for _ in range(20):
            data = bytearray(original[: rng.integers(1, len(original) + 1)])
            for place in rng.integers(0, len(data), 8):
                data[place] = rng.integers(256)
            try:
                with open_video(bytes(data)) as reader:
                    reader.read(range(reader.info.num_frames), size=(16, 16))
                good += 1
            except VideoError as error:
                errors.append(error)
    assert good
    assert errors
    assert all(error.message for error in errors)


def test_an_unknown_decoder_is_refused(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=3)
    with pytest.raises(ConfigError, match="known decoders: pyav, opencv"):
        open_video(path, decoder="decord")  # type: ignore[arg-type]


def test_importing_the_package_loads_no_decoder() -> None:
    code = "import sys, ivdr_deploy.video; sys.exit(bool({'av', 'cv2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_readers_share_one_contract() -> None:
    from ivdr_deploy.video._opencv import OpenCvReader

    for reader in (_pyav.PyAvReader, OpenCvReader):
        assert not inspect.isabstract(reader)
        assert "read" not in vars(reader)  # the pixels come from one place
