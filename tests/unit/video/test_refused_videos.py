"""What is no video, too large or damaged, and the error it gets."""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from made_videos import (
    DECODERS,
    noisy_frames,
    remux,
)
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
from ivdr_deploy.video._source import Budget
from ivdr_deploy.video.decode import open_video
from ivdr_deploy.video.reader import VideoLimits


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


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_limits_on_a_picture_hold_as_it_is_displayed(tmp_path: Path, decoder: DecoderName) -> None:
    path = tmp_path / "wide.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 256, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(20)
        for number in range(3):
            picture = av.VideoFrame.from_ndarray(numbered_frame(number, size=(256, 48)), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    with pytest.raises(VideoLimitError, match="5120x48 pixels; no side"):
        open_video(path, decoder=decoder)
    with pytest.raises(VideoLimitError, match="5120x48 pixels, more than the limit"):
        open_video(path, limits=VideoLimits(max_pixels=256 * 48), decoder=decoder)


def test_a_file_that_is_cut_short_while_it_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pyav, "_KEPT_BYTES", 0)  # it is decoded a second time
    path = numbered_video(tmp_path / "a.ts", num_frames=60, bframes=0)
    with open_video(path) as reader:
        assert frame_number(reader.read([59])[0]) == 59
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 188 // 2 * 188])
        with pytest.raises(
            VideoDecodeError, match=r"a\.ts: frame 59 of 60 cannot be decoded: the file is shorter"
        ):
            reader.read([59])


def test_a_file_that_is_damaged_while_it_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pyav, "_KEPT_BYTES", 0)
    path = numbered_video(tmp_path / "a.ts", num_frames=60, bframes=0)

    def refuse(source: object, packet: object) -> list[object]:
        raise VideoDecodeError("bad data")

    with open_video(path) as reader:
        monkeypatch.setattr("ivdr_deploy.video._packets.PacketSource.decode", refuse)
        with pytest.raises(VideoDecodeError, match=r"a\.ts: frame 3 of 60 cannot be decoded: bad data"):
            reader.read([3])


def test_two_packets_may_hold_a_frame_and_no_more() -> None:
    budget = Budget("a.mp4", VideoLimits(max_frames=5))
    budget.check_packets(10)
    with pytest.raises(VideoLimitError, match=r"a\.mp4 has more than 5 frames"):
        budget.check_packets(11)


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
        assert reader.pts_seconds == pytest.approx(np.arange(60) / 25)
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
