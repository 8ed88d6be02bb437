from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from videos import frame_number, numbered_video

from ivdr_deploy.errors import VideoDecodeError, VideoLimitError
from ivdr_deploy.spec import ClipSpec, DecoderName
from ivdr_deploy.video import VideoLimits, load_clips, load_frames, open_video
from ivdr_deploy.video.preprocess import center_crop
from ivdr_deploy.video.sampling import timeline, uniform_clips

SPEC = ClipSpec(num_frames=8, frame_stride=2, num_clips=4, short_side=72, crop_size=64)
DECODERS: tuple[DecoderName, ...] = ("pyav", "opencv")
UNEVEN_MS = [40 * k + 200 * (k > 20) + 35 * (k // 7) for k in range(60)]


@pytest.mark.parametrize("decoder", DECODERS)
def test_clips_hold_the_frames_the_protocol_asks_for(tmp_path: Path, decoder: DecoderName) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=60)
    clips = load_clips(path, SPEC, decoder=decoder)
    assert clips.video.dtype == np.uint8
    assert clips.video.shape == (4, *SPEC.clip_shape)
    assert clips.video.flags.c_contiguous
    indices = uniform_clips(60, SPEC)
    assert [[frame_number(rgb) for rgb in clip] for clip in clips.video] == indices.tolist()
    assert clips.seconds == pytest.approx(indices[:, [0, -1]] / 25)
    assert clips.info.num_frames == 60
    assert clips.decode_ms > 0
    assert clips.preprocess_ms > 0


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("target_fps", [None, 10.0, 50.0])
@pytest.mark.parametrize("pts_ms", [None, UNEVEN_MS])
@pytest.mark.parametrize("num_frames", [60, 5, 1])
def test_clips_are_the_cropped_frames_of_the_grid_to_the_bit(
    tmp_path: Path, num_frames: int, pts_ms: list[int] | None, target_fps: float | None, decoder: DecoderName
) -> None:
    spec = ClipSpec(
        num_frames=8, frame_stride=2, num_clips=4, short_side=72, crop_size=65, target_fps=target_fps
    )
    path = numbered_video(tmp_path / "a.mp4", num_frames=num_frames, pts_ms=pts_ms, size=(130, 98))
    clips = load_clips(path, spec, decoder=decoder)
    frames, info = load_frames(path, spec, decoder=decoder)
    assert frames.shape[1:] == (72, 96, 3)
    assert info == clips.info
    assert np.array_equal(clips.video, center_crop(frames[uniform_clips(len(frames), spec)], 65))
    with open_video(path, decoder=decoder) as reader:
        grid = timeline(reader.pts_seconds, reader.info.fps, spec)
        assert np.array_equal(frames, reader.read(grid, size=(72, 96)))


def test_a_variable_rate_is_sampled_by_time(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=60, pts_ms=UNEVEN_MS)
    frames, info = load_frames(path, SPEC)
    assert info.variable_frame_rate
    seconds = np.array(UNEVEN_MS) / 1000
    for place, rgb in enumerate(frames):
        shown = frame_number(rgb)
        assert seconds[shown] <= place / info.fps + 2e-3
        assert shown == 59 or seconds[shown + 1] > place / info.fps - 2e-3


def test_bytes_and_path_give_the_same_clips(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.webm", codec="libvpx-vp9", bframes=0)
    assert np.array_equal(load_clips(path, SPEC).video, load_clips(path.read_bytes(), SPEC).video)
    assert np.array_equal(load_clips(path, SPEC).video, load_clips(str(path), SPEC).video)


def test_decoders_agree_up_to_rounding(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=20)
    pyav, opencv = (load_clips(path, SPEC, decoder=decoder).video.astype(int) for decoder in DECODERS)
    assert np.abs(pyav - opencv).mean() < 2.5


def test_a_short_side_upright_is_the_width(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "tall.mp4", size=(96, 160), num_frames=5)
    assert load_frames(path, SPEC)[0].shape == (5, 120, 72, 3)


def test_limits_reach_the_reader(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=20)
    with pytest.raises(VideoLimitError, match="more than 5 frames"):
        load_clips(path, SPEC, limits=VideoLimits(max_frames=5))
    with pytest.raises(VideoLimitError, match="more than 5 frames"):
        load_frames(path, SPEC, limits=VideoLimits(max_frames=5))


def test_memory_follows_the_contract_and_not_the_video(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=400, gop=25)
    spec = ClipSpec(num_frames=4, frame_stride=1, num_clips=2, short_side=72, crop_size=64)
    load_clips(path, spec)  # imports, caches
    tracemalloc.start()
    clips = load_clips(path, spec)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * clips.video.nbytes < 400 * 72 * 96 * 3 / 8


def test_a_file_cut_off_where_clips_need_it_is_an_error(tmp_path: Path) -> None:
    data = numbered_video(tmp_path / "a.mp4", num_frames=60).read_bytes()
    broken = data.replace(data[1500:1700], b"\xff" * 200)
    with pytest.raises(VideoDecodeError, match=r"of 60 cannot be decoded"):
        load_clips(broken, SPEC)
