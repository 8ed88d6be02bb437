"""The windows of a timeline are the sliding clips of ``load_clips``, bit for bit, and cost one pass over the video."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from made_videos import ALL_CONTAINERS, DECODERS, NUM_FRAMES, VARIABLE_MS, made_video, remux
from videos import numbered_video

from ivdr_deploy.errors import VideoDecodeError, VideoError, VideoTimeoutError
from ivdr_deploy.spec import ClipSpec, ViewPlan
from ivdr_deploy.video import VideoLimits, load_clips
from ivdr_deploy.video._pyav import PyAvReader
from ivdr_deploy.video.sampling import place_clips, timeline
from ivdr_deploy.video.windows import Windows, _Ring, read_windows

CLIP = ClipSpec(num_frames=4, frame_stride=2, short_side=40, crop_size=32)
CLIPS = {
    "plain": CLIP,
    "slower": replace(CLIP, target_fps=10.0),
    "faster": replace(CLIP, target_fps=40.0),
    "one": replace(CLIP, num_frames=1, frame_stride=1),
    "long": replace(CLIP, num_frames=8, frame_stride=9),
    "exact": replace(CLIP, short_side=0, exact_size=(33, 47)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


def read(
    video: Path | bytes, clip: ClipSpec = CLIP, *, hop: int = 3, most: int = 4, **more: Any
) -> list[Windows]:
    return list(read_windows(video, clip, hop=hop, most=most, **{"limits": ALL_CONTAINERS, **more}))


def assert_equal_to_load_clips(
    found: Sequence[Windows], video: Path, clip: ClipSpec, hop: int, **more: Any
) -> None:
    plan = ViewPlan(placement="sliding", num_clips=1024, hop=hop)
    expected = load_clips(video, clip, plan, limits=ALL_CONTAINERS, **more)
    pixels = np.concatenate([windows.video for windows in found])
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, expected.video)
    assert {windows.total for windows in found} == {len(expected.video)}
    assert found[0].info == expected.info
    assert np.array_equal(
        np.concatenate([windows.seconds for windows in found])[:, 0], expected.seconds[:, 0]
    )


def test_decoding_and_preprocessing_make_up_the_time_between_lots(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock goes on by a second with every look at it: two for each frame that is shown, two for each lot."""
    video = numbered_video(folder / "timed.mp4", num_frames=40)
    looks = itertools.count()
    monkeypatch.setattr(
        "ivdr_deploy.video.windows.time", SimpleNamespace(perf_counter=lambda: float(next(looks)))
    )
    found = read(video)
    plan = ViewPlan(placement="sliding", num_clips=1024, hop=3)
    frames, lots = len(np.unique(place_clips(40, CLIP, plan))), len(found)
    assert lots > 2
    assert sum(windows.preprocess_ms for windows in found) == 1000.0 * frames
    assert sum(windows.decode_ms for windows in found) == 1000.0 * (frames + lots)


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("kind", ["short_gop.mp4", "variable.mkv", "mpeg4_bframes.avi"])
@pytest.mark.parametrize("hop", [1, 5])
def test_they_are_the_clips_of_load_clips_under_every_contract(
    folder: Path, kind: str, name: str, hop: int
) -> None:
    clip, video = CLIPS[name], made_video(folder, kind)
    hop = min(hop, clip.num_frames * clip.frame_stride)
    assert_equal_to_load_clips(read(video, clip, hop=hop), video, clip, hop)


@pytest.mark.parametrize(
    "kind",
    ["open_gop.mp4", "variable.mp4", "hevc_open_gop.mp4", "vp9.webm", "h264.ts", "mpeg2.mpg", "numbers.gif"],
)
@pytest.mark.parametrize("decoder", DECODERS)
def test_they_are_the_clips_of_load_clips_in_every_container(folder: Path, kind: str, decoder: str) -> None:
    video = made_video(folder, kind)
    assert_equal_to_load_clips(read(video, decoder=decoder), video, CLIP, 3, decoder=decoder)


def test_they_stand_upright(folder: Path) -> None:
    turned = remux(made_video(folder, "short_gop.mp4"), folder / "turned.mp4", rotation=90)
    found = read(turned)
    assert found[0].info.rotation == 90
    assert_equal_to_load_clips(found, turned, CLIP, 3)
    assert_equal_to_load_clips(read(turned.read_bytes()), turned, CLIP, 3)


@pytest.mark.exhaustive
def test_real_and_awkward_files(shared_data: Path) -> None:
    """Those that ``load_clips`` refuses are refused the same."""
    read_right = 0
    for path in sorted((shared_data / "odd").iterdir()):
        try:
            load_clips(
                path, CLIP, ViewPlan(placement="sliding", num_clips=1024, hop=8), limits=ALL_CONTAINERS
            )
        except VideoError as error:
            with pytest.raises(type(error)):
                read(path, hop=8)
            continue
        assert_equal_to_load_clips(read(path, hop=8), path, CLIP, 8)
        read_right += 1
    assert read_right >= 40


@pytest.mark.parametrize("num_frames", [1, 2, 7, 8, 9, 16, 17])
def test_short_videos_and_those_on_the_edge_of_a_window(folder: Path, num_frames: int) -> None:
    video = numbered_video(folder / f"{num_frames}.mp4", num_frames=num_frames)
    for hop in (1, 4, 8):
        found = read(video, hop=hop)
        assert_equal_to_load_clips(found, video, CLIP, hop)
        assert found[-1].seconds[-1, 1] == found[0].info.duration_seconds


@pytest.mark.parametrize("kind", ["short_gop.mp4", "variable.mkv"])
@pytest.mark.parametrize("hop", [1, 3, 8])
def test_each_part_is_nearest_to_its_window_and_all_make_up_the_video(
    folder: Path, kind: str, hop: int
) -> None:
    found = read(made_video(folder, kind), hop=hop)
    parts = np.concatenate([windows.parts for windows in found])
    seconds = np.concatenate([windows.seconds for windows in found])
    assert parts[0, 0] == 0
    assert parts[-1, 1] == found[0].info.duration_seconds
    assert np.array_equal(parts[1:, 0], parts[:-1, 1])
    assert (parts[:, 1] >= parts[:, 0]).all()  # equal where the grid shows one frame twice
    inner = parts[1:-1]
    assert (inner[:, 0] >= seconds[1:-1, 0]).all()
    assert (inner[:, 1] <= seconds[1:-1, 1]).all()
    if (
        kind == "short_gop.mp4" and hop == 3
    ):  # 25 frames a second, windows of 8: the middle 3 are frames 2 to 4
        assert np.allclose(parts[1], [5 / 25, 8 / 25])
        assert np.allclose(seconds[1], [3 / 25, 11 / 25])
    if hop == 8:  # windows that touch are their own parts
        assert np.array_equal(parts, seconds)


def test_times_of_a_variable_rate_are_those_of_the_frames(folder: Path) -> None:
    (windows,) = read(made_video(folder, "variable.mp4"), most=100)
    times = np.array(VARIABLE_MS) / 1000
    grid = timeline(times, windows.info.fps, CLIP)
    expected = times[grid[3 * np.arange(windows.total)]]
    assert np.allclose(windows.seconds[:, 0], expected, atol=1e-3)
    assert len(np.unique(np.diff(expected).round(3))) > 1


def test_every_frame_is_decoded_once_and_dropped_when_no_window_needs_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = numbered_video(folder / "many.mp4", num_frames=400)
    decoded: list[int] = []
    real = PyAvReader.frames

    def listening(reader: PyAvReader, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        for index, frame in real(reader, indices):
            decoded.append(index)
            yield index, frame

    held: list[int] = []
    drop = _Ring.drop_before

    def dropping(ring: _Ring, index: int) -> None:
        held.append(len(ring._held))
        assert all(frame.base is None for frame in ring._held.values())  # a view would hold the whole frame
        drop(ring, index)

    monkeypatch.setattr(PyAvReader, "frames", listening)
    monkeypatch.setattr(_Ring, "drop_before", dropping)
    windows = read(video, hop=1)
    assert windows[0].total == 393
    assert decoded == list(range(399))  # the last window shows every second frame, its last one is 398
    assert max(held) <= 8  # a window of 8 frames; not the 400 of the video


def test_what_is_found_before_the_damage_is_found(folder: Path) -> None:
    data = numbered_video(folder / "cut.mp4", num_frames=200, bframes=0).read_bytes()
    damaged = data[: len(data) // 2] + bytes(len(data) // 4) + data[len(data) * 3 // 4 :]
    found: list[Windows] = []
    with pytest.raises(VideoDecodeError):
        found.extend(read_windows(damaged, CLIP, hop=8, most=1, limits=ALL_CONTAINERS))
    assert 1 <= len(found) < 25


def test_the_time_allowed_is_that_of_a_lot_and_not_of_the_video(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = made_video(folder, "short_gop.mp4")
    ticks = iter(range(10**9))
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)))  # each call into the decoder takes a second
    monkeypatch.setattr("ivdr_deploy.video._source.time", clock)
    limits = VideoLimits(max_decode_seconds=2 * NUM_FRAMES)
    assert sum(len(windows.video) for windows in read(video, hop=1, most=2, limits=limits)) == 38
    assert next(ticks) / 2 > 1.5 * 2 * NUM_FRAMES
    with pytest.raises(VideoTimeoutError):
        read(video, limits=VideoLimits(max_decode_seconds=10))
