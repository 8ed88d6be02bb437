from __future__ import annotations

import importlib
import itertools
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from videos import frame_number, numbered_video, write_video

from ivdr_deploy.errors import VideoDecodeError, VideoLimitError, VideoTimeoutError
from ivdr_deploy.spec import ClipSpec, DecoderName, ViewPlan
from ivdr_deploy.video import BytesSource, PathSource, VideoLimits, load_clips, open_frames, open_video
from ivdr_deploy.video.preprocess import crops
from ivdr_deploy.video.sampling import place_clips, timeline

SPEC = ClipSpec(num_frames=8, frame_stride=2, short_side=72, crop_size=64)
PLAN = ViewPlan(num_clips=4)
DECODERS: tuple[DecoderName, ...] = ("pyav", "opencv")
UNEVEN_MS = [40 * k + 200 * (k > 20) + 35 * (k // 7) for k in range(60)]


def all_frames(path: Path, spec: ClipSpec, decoder: DecoderName = "pyav") -> np.ndarray:
    with open_frames(path, spec, decoder=decoder) as stream:
        frames = np.stack(list(stream.frames))
        assert frames.shape == stream.shape
    return frames


def clips_by_definition(path: Path, spec: ClipSpec, plan: ViewPlan, decoder: DecoderName) -> np.ndarray:
    """The crops of all frames of the grid, at the places of the plan."""
    frames = all_frames(path, spec, decoder)
    chosen = frames[place_clips(len(frames), spec, plan)]
    views = np.stack(crops(chosen, spec.crop_size, count=plan.spatial_crops), axis=1)
    return views.reshape(-1, *spec.clip_shape)


@pytest.mark.parametrize("decoder", DECODERS)
def test_clips_hold_the_frames_the_protocol_asks_for(tmp_path: Path, decoder: DecoderName) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=60)
    clips = load_clips(path, SPEC, PLAN, decoder=decoder)
    assert clips.video.dtype == np.uint8
    assert clips.video.shape == (4, *SPEC.clip_shape)
    assert clips.video.flags.c_contiguous
    indices = place_clips(60, SPEC, PLAN)
    assert [[frame_number(rgb) for rgb in clip] for clip in clips.video] == indices.tolist()
    assert clips.seconds == pytest.approx(indices[:, [0, -1]] / 25)
    assert clips.view_plan == PLAN
    assert clips.info.num_frames == 60
    assert clips.decode_ms > 0
    assert clips.preprocess_ms > 0


def test_decoding_and_preprocessing_make_up_the_whole_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=60)
    looks = itertools.count()  # a clock that goes on by a second with every look at it
    clock = SimpleNamespace(perf_counter=lambda: float(next(looks)))
    monkeypatch.setattr("ivdr_deploy.video.clips.time", clock)
    clips = load_clips(path, SPEC, PLAN)
    whole = next(looks) - 1
    read = len(np.unique(place_clips(60, SPEC, PLAN)))
    assert clips.preprocess_ms == 1000.0 * (read + 1)  # each frame, and gathering them
    assert clips.decode_ms + clips.preprocess_ms == 1000.0 * whole


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("target_fps", [None, 10.0, 50.0])
@pytest.mark.parametrize("pts_ms", [None, UNEVEN_MS])
@pytest.mark.parametrize("num_frames", [60, 5, 1])
def test_clips_are_the_cropped_frames_of_the_grid_to_the_bit(
    tmp_path: Path, num_frames: int, pts_ms: list[int] | None, target_fps: float | None, decoder: DecoderName
) -> None:
    spec = replace(SPEC, crop_size=65, target_fps=target_fps)
    path = numbered_video(tmp_path / "a.mp4", num_frames=num_frames, pts_ms=pts_ms, size=(130, 98))
    clips = load_clips(path, spec, PLAN, decoder=decoder)
    assert np.array_equal(clips.video, clips_by_definition(path, spec, PLAN, decoder))
    with open_frames(path, spec, decoder=decoder) as stream, open_video(path, decoder=decoder) as reader:
        assert stream.shape[1:] == (72, 96, 3)
        assert stream.info == clips.info
        grid = timeline(reader.pts_seconds, reader.info.fps, spec)
        assert np.array_equal(np.stack(list(stream.frames)), reader.read(grid, size=(72, 96)))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("size", [(160, 96), (96, 160)], ids=["landscape", "portrait"])
@pytest.mark.parametrize(
    "plan",
    [
        ViewPlan(num_clips=3, spatial_crops=3),
        ViewPlan(placement="sliding", num_clips=3, spatial_crops=3),
        ViewPlan(placement="sliding", num_clips=100, hop=5),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "change", [{}, {"short_side": 0, "exact_size": (70, 90)}], ids=["short side", "exact"]
)
def test_every_plan_takes_its_views_from_the_same_frames(
    tmp_path: Path, change: dict, plan: ViewPlan, size: tuple[int, int], decoder: DecoderName
) -> None:
    spec = replace(SPEC, **change)
    path = numbered_video(tmp_path / "a.mp4", num_frames=40, size=size)
    clips = load_clips(path, spec, plan, decoder=decoder)
    assert np.array_equal(clips.video, clips_by_definition(path, spec, plan, decoder))
    assert len(clips.seconds) == len(clips.video)
    assert clips.video.flags.c_contiguous


@pytest.mark.parametrize("size", [(192, 96), (96, 192)], ids=["landscape", "portrait"])
def test_three_crops_show_both_ends_of_the_longer_side(tmp_path: Path, size: tuple[int, int]) -> None:
    """The start is dark and the end bright, and the crops of one clip follow each other."""
    ramp = np.linspace(0, 255, 192).astype(np.uint8)
    frame = np.repeat(np.tile(ramp, (96, 1))[..., None], 3, axis=-1)
    frame = frame if size[0] > size[1] else frame.transpose(1, 0, 2)
    path = write_video(tmp_path / "a.mp4", [frame] * 20)
    clips = load_clips(path, SPEC, ViewPlan(num_clips=2, spatial_crops=3))
    start, middle, end = (clips.video[k].mean() for k in range(3))
    assert start < 80 < 110 < middle < 145 < 180 < end
    once = load_clips(path, SPEC, ViewPlan(num_clips=2)).seconds
    assert clips.seconds.tolist() == [once[0].tolist()] * 3 + [once[1].tolist()] * 3
    assert once[0, 0] < once[1, 0]


def test_an_exact_size_does_not_keep_the_aspect(tmp_path: Path) -> None:
    """torchvision's preset: (128, 171) whatever comes in, then the centre of it."""
    spec = ClipSpec(num_frames=4, frame_stride=1, short_side=0, exact_size=(128, 171), crop_size=112)
    for size in ((96, 160), (160, 96), (96, 96)):
        path = numbered_video(tmp_path / f"{size[0]}.mp4", num_frames=5, size=size)
        with open_frames(path, spec) as stream, open_video(path) as reader:
            assert stream.shape == (5, 128, 171, 3)
            assert np.array_equal(np.stack(list(stream.frames)), reader.read(range(5), size=(128, 171)))


@pytest.mark.parametrize("decoder", DECODERS)
def test_sliding_clips_reach_the_end_or_the_video_is_too_large(tmp_path: Path, decoder: DecoderName) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=40)
    plan = ViewPlan(placement="sliding", num_clips=3)
    clips = load_clips(path, SPEC, plan, decoder=decoder)
    assert [frame_number(clip[0]) for clip in clips.video] == [0, 16, 32]
    assert frame_number(clips.video[-1][-1]) == 39
    with pytest.raises(
        VideoLimitError, match=r"a\.mp4 needs 3 sliding clips, the plan takes at most 2"
    ) as caught:
        load_clips(path, SPEC, replace(plan, num_clips=2), decoder=decoder)
    assert "hop" in caught.value.hint
    with pytest.raises(VideoLimitError, match="a request needs 25 sliding clips"):
        load_clips(BytesSource(path.read_bytes(), uri="a request"), SPEC, replace(plan, hop=1))


def test_a_short_video_is_one_sliding_clip(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=5)
    clips = load_clips(path, SPEC, ViewPlan(placement="sliding", num_clips=1))
    assert [frame_number(rgb) for rgb in clips.video[0]] == [0, 2, 4, 4, 4, 4, 4, 4]


def test_a_variable_rate_is_sampled_by_time(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=60, pts_ms=UNEVEN_MS)
    with open_frames(path, SPEC) as stream:
        info, frames = stream.info, list(stream.frames)
    assert info.variable_frame_rate
    seconds = np.array(UNEVEN_MS) / 1000
    for place, rgb in enumerate(frames):
        shown = frame_number(rgb)
        assert seconds[shown] <= place / info.fps + 2e-3
        assert shown == 59 or seconds[shown + 1] > place / info.fps - 2e-3


def test_bytes_path_and_source_give_the_same_clips(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.webm", codec="libvpx-vp9", bframes=0)
    expected = load_clips(path, SPEC, PLAN).video
    data = path.read_bytes()
    for source in (str(path), data, PathSource(path), BytesSource(data)):
        assert np.array_equal(load_clips(source, SPEC, PLAN).video, expected)


def test_decoders_agree_up_to_rounding(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=20)
    pyav, opencv = (load_clips(path, SPEC, PLAN, decoder=decoder).video.astype(int) for decoder in DECODERS)
    assert np.abs(pyav - opencv).mean() < 2.5


def test_a_short_side_upright_is_the_width(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "tall.mp4", size=(96, 160), num_frames=5)
    assert all_frames(path, SPEC).shape == (5, 120, 72, 3)


def test_limits_reach_the_reader(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=20)
    limits = VideoLimits(max_frames=5)
    with pytest.raises(VideoLimitError, match="more than 5 frames"):
        load_clips(path, SPEC, PLAN, limits=limits)
    with pytest.raises(VideoLimitError, match="more than 5 frames"), open_frames(path, SPEC, limits=limits):
        pass


@pytest.mark.parametrize("decoder", ["pyav", "opencv"])
def test_resizing_counts_towards_the_time_allowed(
    tmp_path: Path, decoder: DecoderName, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=20, size=(64, 48))
    seconds = [0.0]
    monkeypatch.setattr("ivdr_deploy.video._source.time", SimpleNamespace(monotonic=lambda: seconds[0]))
    place = "_pyav.resize_frame" if decoder == "pyav" else "_opencv._resize_rows"
    module, name = f"ivdr_deploy.video.{place}".rsplit(".", 1)
    resize = getattr(importlib.import_module(module), name)

    def slow(*args: object, **kwargs: object) -> np.ndarray:
        seconds[0] += 1.0
        return resize(*args, **kwargs)  # type: ignore[no-any-return]

    monkeypatch.setattr(f"{module}.{name}", slow)
    spec, plan = ClipSpec(num_frames=4, frame_stride=1, short_side=36, crop_size=32), ViewPlan(num_clips=2)
    load_clips(path, spec, plan, decoder=decoder)
    with pytest.raises(VideoTimeoutError):
        load_clips(path, spec, plan, decoder=decoder, limits=VideoLimits(max_decode_seconds=3.5))


def test_memory_follows_the_contract_and_not_the_video(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=400, gop=25)
    spec, plan = replace(SPEC, num_frames=4, frame_stride=1), ViewPlan(num_clips=2)
    load_clips(path, spec, plan)  # imports, caches
    tracemalloc.start()
    clips = load_clips(path, spec, plan)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * clips.video.nbytes < 400 * 72 * 96 * 3 / 8


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("target_fps", [None, 75.0])
def test_a_stream_holds_few_frames_however_long_the_video_is(
    tmp_path: Path, decoder: DecoderName, target_fps: float | None
) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=400, gop=25)
    spec = replace(SPEC, target_fps=target_fps)
    one_frame = 72 * 96 * 3
    with open_frames(path, spec, decoder=decoder) as stream:  # imports, caches
        next(stream.frames)
    tracemalloc.start()
    with open_frames(path, spec, decoder=decoder) as stream:
        count = sum(1 for _ in stream.frames)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == stream.shape[0] == (400 if target_fps is None else 1200)
    assert peak < 40 * one_frame < 400 * one_frame / 8  # the table of frame times is the rest


def test_clips_without_pixels_keep_everything_else(tmp_path: Path) -> None:
    clips = load_clips(numbered_video(tmp_path / "a.mp4", num_frames=20), SPEC, PLAN)
    bare = clips.without_pixels()
    assert bare.video.shape == (0, *SPEC.clip_shape)
    assert bare.video.base is None
    assert replace(bare, video=clips.video) == clips


def test_a_file_cut_off_where_clips_need_it_is_an_error(tmp_path: Path) -> None:
    data = numbered_video(tmp_path / "a.mp4", num_frames=60).read_bytes()
    broken = data.replace(data[1500:1700], b"\xff" * 200)
    with pytest.raises(VideoDecodeError, match=r"of 60 cannot be decoded"):
        load_clips(broken, SPEC, PLAN)
