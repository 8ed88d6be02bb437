"""Real and awkward clips: true frame counts, random access, and what ``odd/README.md`` says of every file there."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from ivdr_deploy.errors import IvdrError, NoVideoStreamError, VideoDecodeError, VideoOpenError
from ivdr_deploy.spec import ClipSpec, ViewPlan
from ivdr_deploy.video import VideoLimits, load_clips, open_video
from ivdr_deploy.video._packets import open_arguments
from ivdr_deploy.video._source import check_source

SPEC = ClipSpec(short_side=64, crop_size=56)
PLAN = ViewPlan(num_clips=2)

REFUSED: dict[str, type[IvdrError]] = {
    "audio_only.mp3": NoVideoStreamError,
    "audio_only.m4a": NoVideoStreamError,
    "audio_only.wav": NoVideoStreamError,
    "audio_only.swf": NoVideoStreamError,
    "empty.mp4": VideoOpenError,
    "text_named.mp4": VideoOpenError,
}
DAMAGED = {"truncated_60percent.mp4": 46, "corrupted_tail.mp4": 28}
"""Frames that decode before the damage."""

FRAMES = {
    "hevc_8bit.mp4": 100,
    "hevc_128x128_10frames.mp4": 10,
    "vp9.webm": 131,
    "gif_horse_riding.gif": 33,
    "gif_mosaic_98frames.gif": 98,
    "gif_4frames_64x48.gif": 4,
    "gif_1frame_transparent.gif": 1,
    "gif_frame_exceeds_screen_4x4.gif": 1,
    "rotated_90.mov": 3,
    "rotated_180.mov": 3,
    "rotated_270.mov": 3,
    "rotated_0_reference.mov": 3,
    "rotated_nasa_17frames.mp4": 17,
    "mpeg_ps_mpeg1_mp2.mpg": 100,
    "starts_late.mp4": 12,
    "first_keyframe_discarded.mp4": 25,
    "packets_out_of_order_4frames.mov": 4,
    "one_frame.avi": 1,
    "one_frame_64x64.mp4": 1,
    "three_frames.avi": 3,
    "truncated.avi": 32,
    "variable_frame_rate.mp4": 153,
    "fractional_fps_23.754.mp4": 32,
    "metadata_not_utf8.avi": 83,
    "no_pts_h264_1080p.avi": 103,
}
SIZES = {
    "rotated_90.mov": (320, 568, 270),
    "rotated_180.mov": (568, 320, 180),
    "rotated_270.mov": (320, 568, 90),
    "rotated_0_reference.mov": (568, 320, 0),
    "h264_444_odd_321x241.mp4": (321, 241, 0),
    "mpeg2_odd_121x81.mp4": (121, 81, 0),
    "rotated_phone_style.mp4": (256, 427, 90),  # 340x256 stored, pixels of 64:51
}


def real_clips(folder: Path) -> Iterator[tuple[Path, int]]:
    for table in sorted(folder.glob("*/clips.csv")):
        with table.open(newline="") as stream:
            for row in csv.DictReader(stream):
                yield table.parent / row["path"], int(row["frames"])


def pixels(frame: av.VideoFrame) -> bytes:
    """Small and exact: two frames that differ anywhere in 8 x 8 luma blocks differ here."""
    return (
        frame.reformat(width=frame.width // 8 or 1, height=frame.height // 8 or 1, format="gray")
        .to_ndarray()
        .tobytes()
    )


def test_frame_counts_of_all_real_clips_are_exact(shared_data: Path) -> None:
    wrong = {}
    for path, expected in real_clips(shared_data):
        with open_video(path) as reader:
            if reader.info.num_frames != expected:
                wrong[path.name] = (reader.info.num_frames, expected)
            assert len(reader.pts_seconds) == reader.info.num_frames
            assert (np.diff(reader.pts_seconds) > 0).all()
    assert not wrong


def test_random_access_equals_sequential_decoding_on_real_clips(shared_data: Path) -> None:
    rng = np.random.default_rng(0)
    odd = [shared_data / "odd" / name for name in FRAMES if name != "no_pts_h264_1080p.avi"]
    clips = [path for path, _ in real_clips(shared_data)][::12]
    for path in [*odd, *clips]:
        with av.open(**open_arguments(check_source(path, VideoLimits()), max_pixels=1 << 24)) as container:
            sequential = [pixels(frame) for frame in container.decode(video=0)]
        with open_video(path) as reader:
            assert reader.info.num_frames == len(sequential), path
            for count in (1, 5):
                indices = sorted(set(rng.integers(0, len(sequential), count).tolist()))
                read = {index: pixels(frame) for index, frame in reader.frames(indices)}
                assert read == {index: sequential[index] for index in indices}, (path, indices)


def test_every_odd_file_is_known_here(shared_data: Path) -> None:
    names = {path.name for path in (shared_data / "odd").iterdir() if path.suffix != ".md"}
    assert set(FRAMES) | set(REFUSED) | set(DAMAGED) | set(SIZES) <= names


@pytest.mark.parametrize("as_bytes", [False, True])
def test_every_odd_file_gives_clips_or_the_error_its_readme_asks_for(
    shared_data: Path, as_bytes: bool
) -> None:
    for path in sorted((shared_data / "odd").iterdir()):
        name, source = path.name, path.read_bytes() if as_bytes else path
        if path.suffix == ".md" or name == "no_pts_h264_1080p.avi":
            continue
        if name in REFUSED:
            with pytest.raises(REFUSED[name]):
                load_clips(source, SPEC, PLAN)
        elif name in DAMAGED:
            with pytest.raises(VideoDecodeError, match=r"cannot be decoded"):
                load_clips(source, SPEC, PLAN)
        else:
            clips = load_clips(source, SPEC, PLAN)
            assert clips.video.shape == (2, *SPEC.clip_shape), name
            assert clips.info.num_frames == FRAMES.get(name, clips.info.num_frames), name
            size = (clips.info.width, clips.info.height, clips.info.rotation)
            assert size == SIZES.get(name, size), name


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_read_up_to_the_damage(shared_data: Path, name: str) -> None:
    intact = DAMAGED[name]
    with open_video(shared_data / "odd" / name) as reader:
        assert reader.info.num_frames > intact
        assert len(list(reader.frames(range(intact)))) == intact
        with pytest.raises(
            VideoDecodeError, match=f"frame {intact} of {reader.info.num_frames} .*decoded is {intact - 1}"
        ):
            list(reader.frames(range(intact + 1)))


def test_turned_videos_show_what_players_show(shared_data: Path) -> None:
    """This one is the other, turned by its tag alone: the same packets."""
    with open_video(shared_data / "odd" / "rotated_phone_style.mp4") as turned:
        first = turned.read([0], size=(427, 256))[0].astype(int)
    with open_video(shared_data / "demo" / "k400_arm_wrestling.mp4") as original:
        expected = np.rot90(original.read([0], size=(256, 427))[0]).astype(int)
    assert np.abs(first - expected).max() == 0


def test_a_variable_rate_is_seen(shared_data: Path) -> None:
    with open_video(shared_data / "odd" / "variable_frame_rate.mp4") as reader:
        assert reader.info.variable_frame_rate
        assert len(np.unique(np.round(np.diff(reader.pts_seconds), 3))) == 3
    with open_video(shared_data / "odd" / "fractional_fps_23.754.mp4") as reader:
        assert not reader.info.variable_frame_rate


def test_opencv_finds_the_same_frames(shared_data: Path) -> None:
    for name in (
        "metadata_not_utf8.avi",
        "first_keyframe_discarded.mp4",
        "variable_frame_rate.mp4",
        "truncated.avi",
    ):
        path = shared_data / "odd" / name
        with open_video(path) as pyav, open_video(path, decoder="opencv") as opencv:
            count = pyav.info.num_frames
            assert opencv.info.num_frames == count
            assert opencv.pts_seconds == pytest.approx(pyav.pts_seconds, abs=2e-3)
            nearby = pyav.read(range(count - 5, count)).astype(int)
            for place, rgb in enumerate(opencv.read(range(count - 5, count))):
                assert np.argmin(np.abs(nearby - rgb).mean(axis=(1, 2, 3))) == place, name


def test_opencv_pixels_are_as_near_as_its_docstring_says(shared_data: Path) -> None:
    for path, _ in list(real_clips(shared_data))[::24]:
        pyav, opencv = (
            load_clips(path, SPEC, PLAN, decoder=name).video.astype(int) for name in ("pyav", "opencv")
        )
        assert np.abs(pyav - opencv).mean() < 2.0, path


@pytest.mark.parametrize("name", ["interlaced.mpg", "interlaced_h264.mp4"])
def test_opencv_refuses_interlaced_video(shared_data: Path, name: str) -> None:
    with open_video(shared_data / "odd" / "vp9.webm", decoder="opencv") as other:  # of the same size
        other.read([0])
    with pytest.raises(VideoDecodeError, match="interlaced"):
        open_video(shared_data / "odd" / name, decoder="opencv")
