from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from videos import numbered_video

from ivdr_deploy.errors import ClipShapeError, ConfigError, VideoError, VideoLimitError
from ivdr_deploy.spec import ClipSpec, ViewPlan
from ivdr_deploy.video.clips import load_clips
from ivdr_deploy.video.decode import open_video
from ivdr_deploy.video.frame_array import pack_frames
from ivdr_deploy.video.reader import VideoLimits, VideoReader

SPEC, PLAN = ClipSpec(num_frames=4, frame_stride=2, short_side=36, crop_size=32), ViewPlan(num_clips=3)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered_video(tmp_path_factory.mktemp("videos") / "a.mp4", num_frames=25, size=(64, 48))


def test_clips_are_those_of_the_encoded_file_but_for_rounding(video: Path, tmp_path: Path) -> None:
    with open_video(video) as reader:
        frames, times = reader.read(range(25)), reader.pts_seconds
    packed = pack_frames(frames, times + 7.0)
    (tmp_path / "a.npz").write_bytes(packed)
    encoded = load_clips(video, SPEC, PLAN)
    for source in (packed, tmp_path / "a.npz"):
        clips = load_clips(source, SPEC, PLAN)
        np.testing.assert_allclose(clips.seconds, encoded.seconds, atol=1e-9)
        assert np.abs(clips.video.astype(int) - encoded.video.astype(int)).mean() < 2.0
        assert (clips.info.num_frames, clips.info.fps) == (25, pytest.approx(encoded.info.fps))
        assert (clips.info.container, clips.info.codec) == ("npz", "rawvideo")


def test_frames_of_the_right_size_stay_as_they_are() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 8, 10, 3), np.uint8)
    spec = ClipSpec(num_frames=9, frame_stride=1, short_side=0, exact_size=(8, 10), crop_size=8)
    clips = load_clips(pack_frames(frames, np.arange(9) / 25), spec, ViewPlan(num_clips=1))
    np.testing.assert_array_equal(clips.video[0], frames[:, :, 1:9])


def test_uneven_times_decide_which_frames_are_seen() -> None:
    frames = np.repeat(np.arange(6, dtype=np.uint8) * 40, 8 * 8 * 3).reshape(6, 8, 8, 3)
    times = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 2.0])
    spec = ClipSpec(num_frames=4, frame_stride=1, target_fps=2.0, short_side=8, crop_size=8)
    clips = load_clips(pack_frames(frames, times), spec, ViewPlan(num_clips=1))
    assert [int(level) for level in clips.video[0, :, 0, 0, 0]] == [0, 160, 160, 160]


@pytest.mark.parametrize(
    ("frames", "times", "words"),
    [
        (np.zeros((3, 4, 4, 3), np.float32), np.arange(3.0), "dtype float32"),
        (np.zeros((3, 4, 4), np.uint8), np.arange(3.0), r"shape \(3, 4, 4\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), np.arange(0.0), "expected uint8"),
        (np.zeros((3, 4, 4, 3), np.uint8), np.arange(4.0), "one for each frame"),
        (np.zeros((3, 4, 4, 3), np.uint8), np.array([0.0, 1.0, 1.0]), "does not rise"),
        (np.zeros((3, 4, 4, 3), np.uint8), np.array([0.0, np.nan, 1.0]), "does not rise"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.array([-1e308, 1e308]), "frames inf s apart"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.array([0.0, 5e-324]), "s apart, expected from 1e-09"),
    ],
)
def test_something_else_is_refused_by_name(frames: np.ndarray, times: np.ndarray, words: str) -> None:
    with pytest.raises(ClipShapeError, match=words):
        pack_frames(frames, times)
    packed = io.BytesIO()
    np.savez(packed, frames=frames, timestamps=times)
    with pytest.raises(VideoError, match=words):
        open_video(packed.getvalue())


WHOLE_TYPES = (np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int16, np.int32, np.int64)


def open_times(times: np.ndarray) -> VideoReader:
    packed = zipped(frames=npy(np.zeros((len(times), 4, 4, 3), np.uint8)), timestamps=npy(times))
    return open_video(packed, limits=VideoLimits(max_seconds=1e9))


@pytest.mark.parametrize("kind", WHOLE_TYPES)
def test_whole_times_rise_by_their_values_and_not_by_what_their_type_holds(kind: type[np.integer]) -> None:
    least, most = np.iinfo(kind).min, np.iinfo(kind).max
    with pytest.raises(VideoError, match="does not rise"):
        open_times(np.array([10, 5, 12], kind))
    with pytest.raises(VideoError, match="does not rise"):
        open_times(np.array([most, most], kind))
    first, last = max(least, -(10**8)), min(most, 10**8)
    with open_times(np.array([first, last], kind)) as reader:  # further apart than the type holds
        assert reader.pts_seconds.tolist() == [0.0, float(last - first)]


@pytest.mark.parametrize(
    "times", [np.array([2**53, 2**53 + 1]), np.array([2**64 - 2, 2**64 - 1], np.uint64),
              np.array([1, 1 + np.finfo(np.longdouble).eps], np.longdouble),
              np.array([1, np.finfo(np.longdouble).max], np.longdouble)]
)  # fmt: skip
def test_times_that_float64_cannot_tell_apart_do_not_rise(times: np.ndarray) -> None:
    with pytest.raises(VideoError, match="does not rise from each frame to the next, as float64"):
        open_times(times)


def zipped(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), data, compression)  # its time is always the same
    return packed.getvalue()


def npy(value: Any, **changed: Any) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(value), **changed)
    return stream.getvalue()


FRAMES, TIMES = npy(np.zeros((2, 4, 4, 3), np.uint8)), npy(np.arange(2.0))


def headed(text: bytes) -> bytes:
    """An array whose header is some text."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(96)


HUGE = FRAMES.replace(b"(2, 4, 4, 3)", b"(9**9, 4, 3)").replace(b"9**9", b"9999")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (zipped(a=b"x"), "a zip file with 'a.npy'"),
        (zipped(frames=FRAMES), "a zip file with 'frames.npy'"),
        (zipped(**{f"{n}\n\x1b[2J": b"" for n in range(7)}), r"'0\\n\\x1b\[2J.npy', .* and 2 more, expected"),
        (zipped(frames=headed(b"{'descr': ("), timestamps=TIMES), "cannot be read"),
        (zipped(frames=headed(b"if x:\n  y\n z"), timestamps=TIMES), "cannot be read"),
        (zipped(frames=headed(b"(" * 9000), timestamps=TIMES), "cannot be read"),
        (zipped(zipfile.ZIP_DEFLATED, frames=FRAMES, timestamps=TIMES), "compressed"),
        (zipped(frames=FRAMES[:-1], timestamps=TIMES), "needs others"),
        (zipped(frames=HUGE, timestamps=TIMES), "needs others"),
        (zipped(frames=npy(np.array([{}], object)), timestamps=TIMES), "holds object"),
        (zipped(frames=b"\x93NUMPY\x09\x00", timestamps=TIMES), "cannot be read"),
        (zipped(frames=b"", timestamps=TIMES), "cannot be read"),
        (zipped(frames=FRAMES, timestamps=TIMES)[:-30], "cannot be read"),
        (zipped(frames=FRAMES, timestamps=TIMES)[:60], "cannot be read"),
        (zipped(frames=FRAMES, timestamps=TIMES).replace(bytes(20), bytes(19) + b"\1", 1), "cannot be read"),
    ],
)
def test_damage_is_told_apart(data: bytes, words: str) -> None:
    with pytest.raises(VideoError, match=words):
        open_video(data)


def header(
    *, descr: str = "'|u1'", order: str = "False", shape: str = "(2, 4, 4, 3)", more: str = ""
) -> bytes:
    return headed(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}{more}}}".encode())


ODD = ["()", "('<f8',)", "('<f8', -1)", "('<f8', {})", "[]", "[()]", "[('a',)]", "[(1, 2)]", "{}", "{'a': ()}",
       "{'names': ['a'], 'formats': []}", "''", "'|u99'", "'(2,'", "'<M8[x]'", "'|V0'", "None", "...", "1j", "b''",
       "(True, 2)", "(True, 4, 4, 6)", "(2.0, 4, 4, 3)", "(-2, -4, 4, 3)", "((2,), 4, 4, 3)", "(None,)", "{[]: 1}",
       "{1, 2}"]  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        *(header(descr=odd) for odd in ODD),
        *(header(order=odd) for odd in ODD),
        *(header(shape=odd) for odd in ODD),
        *(header(more=f", {odd}: 1") for odd in ODD),
        *(headed(odd.encode()) for odd in ODD),
    ],
)
def test_a_header_of_python_that_is_none_of_an_array_is_damage(changed: bytes) -> None:
    for members in ({"frames": changed, "timestamps": TIMES}, {"frames": FRAMES, "timestamps": changed}):
        with pytest.raises(VideoError, match="cannot be read as npz"):
            open_video(zipped(**members))


def test_every_single_flipped_byte_is_an_error_of_the_video_or_harmless() -> None:
    data = pack_frames(np.zeros((2, 4, 4, 3), np.uint8), np.arange(2.0))
    for place in range(4, len(data)):
        changed = data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]
        try:
            with open_video(changed) as reader:
                reader.read([0, 1])
        except VideoError:
            continue


def test_limits_hold() -> None:
    data = pack_frames(np.zeros((8, 4, 6, 3), np.uint8), np.arange(8.0))
    for limits, words in (
        (VideoLimits(max_bytes=500), "bytes"),
        (VideoLimits(max_frames=7), "frames"),
        (VideoLimits(max_seconds=7.0), "lasts"),
        (VideoLimits(max_pixels=23), "pixels"),
    ):
        with pytest.raises(VideoLimitError, match=words):
            open_video(data, limits=limits)
    with pytest.raises(VideoError, match="not allowed here"):
        open_video(data, limits=VideoLimits(containers=("mov",)))


def test_opencv_does_not_read_them(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(pack_frames(np.zeros((2, 4, 4, 3), np.uint8), np.arange(2.0)))
    with pytest.raises((VideoError, ConfigError)):
        open_video(path, decoder="opencv")
