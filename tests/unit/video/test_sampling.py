from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from ivdr_deploy.spec import ClipSpec, ViewPlan
from ivdr_deploy.video.sampling import (
    clip_at,
    count_clips,
    is_constant_rate,
    place_clips,
    random_centre_clip,
    random_start_clip,
    timeline,
)


def spec(**changes: object) -> ClipSpec:
    return ClipSpec(**{"num_frames": 16, "frame_stride": 4, **changes})  # type: ignore[arg-type]


def uniform(num_clips: int = 10) -> ViewPlan:
    return ViewPlan(num_clips=num_clips)


def sliding(hop: int = 0, num_clips: int = 10) -> ViewPlan:
    return ViewPlan(placement="sliding", hop=hop, num_clips=num_clips)


def starts_by_definition(length: int, clip: ClipSpec, num_clips: int) -> list[int]:
    """The protocol as it is written down, in exact fractions."""
    half = Fraction(clip.num_frames * clip.frame_stride, 2)
    low = min(half, Fraction(length))
    high = max(low, length - half)
    centres = [low + (high - low) * Fraction(k, num_clips - 1) for k in range(num_clips)]
    return [max(0, int(centre - half)) for centre in centres]


@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("length", [10, 32, 33, 100, 300])
def test_ten_clips_follow_the_protocol_and_stay_inside_the_video(length: int, stride: int) -> None:
    clip = spec(frame_stride=stride)
    indices = place_clips(length, clip, uniform())
    assert len(indices) == count_clips(length, clip, uniform())
    assert indices.shape == (10, 16)
    assert indices.dtype == np.int64
    assert indices.min() >= 0
    assert indices.max() <= length - 1
    expected = [
        [min(start + stride * j, length - 1) for j in range(16)]
        for start in starts_by_definition(length, clip, 10)
    ]
    assert indices.tolist() == expected


def test_ten_clips_of_a_hundred_frames_by_hand() -> None:
    # W = 32, centres 16 .. 84, starts floor(68 k / 9)
    indices = place_clips(100, spec(frame_stride=2), uniform())
    assert indices[:, 0].tolist() == [0, 7, 15, 22, 30, 37, 45, 52, 60, 68]
    assert indices[-1].tolist() == list(range(68, 100, 2))


def test_ten_clips_of_a_video_shorter_than_a_clip_are_all_the_same() -> None:
    indices = place_clips(10, spec(), uniform())
    assert (indices == indices[0]).all()
    assert indices[0].tolist() == [0, 4, 8, *[9] * 13]


@pytest.mark.parametrize(("length", "first"), [(100, 18), (101, 18), (64, 0), (10, 0), (300, 118)])
def test_a_single_clip_sits_in_the_middle(length: int, first: int) -> None:
    assert place_clips(length, spec(), uniform(1))[0, 0] == first


def test_two_clips_touch_both_ends() -> None:
    assert place_clips(100, spec(frame_stride=1), uniform(2))[:, 0].tolist() == [0, 84]


@pytest.mark.parametrize("plan", [uniform(), sliding()], ids=str)
def test_one_frame_fills_every_place(plan: ViewPlan) -> None:
    indices = place_clips(1, spec(), plan)
    assert indices.tolist() == [[0] * 16] * count_clips(1, spec(), plan)


@pytest.mark.parametrize(
    ("length", "hop", "starts"),
    [
        (32, 0, [0]),  # the video is one clip long
        (33, 0, [0, 32]),  # one frame more needs one clip more, which repeats it
        (64, 0, [0, 32]),  # two clips end with the video
        (65, 0, [0, 32, 64]),
        (48, 8, [0, 8, 16]),  # the third one ends with the video
        (49, 8, [0, 8, 16, 24]),
        (33, 1, [0, 1]),
        (5, 0, [0]),  # shorter than a clip
        (5, 1, [0]),
        (100, 40, [0, 40, 80]),  # a hop longer than a clip leaves gaps
    ],
)
def test_sliding_clips_start_every_hop_until_one_reaches_the_end(
    length: int, hop: int, starts: list[int]
) -> None:
    clip = spec(frame_stride=2)  # a clip of 32 grid frames
    indices = place_clips(length, clip, sliding(hop))
    assert indices.dtype == np.int64
    assert indices.tolist() == [[min(start + 2 * j, length - 1) for j in range(16)] for start in starts]
    assert count_clips(length, clip, sliding(hop)) == len(starts)


def test_sliding_clips_show_every_frame_of_the_grid_when_the_stride_is_one() -> None:
    for length in range(1, 60):
        seen = place_clips(length, spec(num_frames=8, frame_stride=1), sliding())
        assert np.array_equal(np.unique(seen), np.arange(length))


def test_more_sliding_clips_than_the_plan_takes_are_counted_and_not_left_out() -> None:
    plan = sliding(hop=1, num_clips=2)
    assert (
        count_clips(100, spec(frame_stride=1), plan)
        == 85
        == len(place_clips(100, spec(frame_stride=1), plan))
    )


def test_places_off_either_end_repeat_the_end_frame() -> None:
    assert clip_at(-3, 5, spec(num_frames=4, frame_stride=3)).tolist() == [0, 0, 3, 4]


def test_a_pretraining_clip_starts_half_a_clip_before_a_centre_anywhere_in_the_video() -> None:
    clip, rng = spec(), np.random.default_rng(0)
    drawn = {tuple(random_centre_clip(100, clip, rng)) for _ in range(3000)}
    assert drawn == {tuple(clip_at(centre - 32, 100, clip)) for centre in range(100)}


def test_a_finetuning_clip_starts_where_its_window_fits() -> None:
    clip, rng = spec(frame_stride=2), np.random.default_rng(0)
    starts = {int(random_start_clip(40, clip, rng)[0]) for _ in range(500)}
    assert starts == set(range(8))  # 0 .. L - W - 1


def test_a_finetuning_clip_of_a_short_video_is_padded_left_or_right() -> None:
    clip, rng = spec(num_frames=4, frame_stride=2), np.random.default_rng(0)
    drawn = {tuple(random_start_clip(5, clip, rng).tolist()) for _ in range(50)}
    assert drawn == {(0, 2, 4, 4), (0, 0, 1, 3)}


def test_the_same_generator_state_draws_the_same_clip() -> None:
    first, second = (random_centre_clip(77, spec(), np.random.default_rng(5)) for _ in range(2))
    assert (first == second).all()


def test_an_evenly_spaced_video_is_its_own_grid() -> None:
    pts = np.arange(50) * 1001 / 30000
    assert timeline(pts, 30000 / 1001, spec()).tolist() == list(range(50))


@pytest.mark.parametrize("count", [199, 200, 201])
def test_times_rounded_to_the_millisecond_are_evenly_spaced(count: int) -> None:
    pts = np.round(np.arange(count) / 30, 3)  # the last one is rounded down, down and up
    assert is_constant_rate(pts)
    fps = (count - 1) / float(pts[-1])
    assert timeline(pts, fps, spec(target_fps=30.0)).tolist() == list(range(count))


@pytest.mark.parametrize(("late", "constant"), [(0.45, True), (0.55, False)])
def test_a_frame_half_a_frame_off_the_grid_makes_the_rate_variable(late: float, constant: bool) -> None:
    assert is_constant_rate(np.array([0.0, 1.0, 2.0 + late, 3.0, 4.0]) / 25) is constant


def test_of_many_frames_in_a_millisecond_the_one_on_display_is_taken() -> None:
    pts = np.arange(2000) / 2000
    assert timeline(pts, 2000.0, spec(target_fps=500.0)).tolist() == list(range(0, 2000, 4))


@pytest.mark.parametrize(
    ("fps", "target", "expected"),
    [
        (30.0, 15.0, [0, 2, 4, 6, 8]),
        (10.0, 20.0, [k // 2 for k in range(20)]),
        (10.0, 4.0, [0, 2, 5, 7]),
        (25.0, 10.0, [0, 2, 5, 7]),
    ],
)
def test_a_target_rate_takes_the_frame_on_display(fps: float, target: float, expected: list[int]) -> None:
    assert timeline(np.arange(10) / fps, fps, spec(target_fps=target)).tolist() == expected


def test_a_variable_rate_is_sampled_by_time() -> None:
    pts = np.array([0.0, 0.1, 0.2, 0.3, 0.8, 0.9])  # the fourth frame stays for half a second
    fps = 5 / 0.9
    assert not is_constant_rate(pts)
    grid = timeline(pts, fps, spec())
    assert len(grid) == 6
    for place, frame in enumerate(grid):
        time = place / fps
        assert pts[frame] <= time + 1e-3
        assert frame == len(pts) - 1 or pts[frame + 1] > time
    assert timeline(pts, fps, spec(target_fps=10.0)).tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 4, 5, 5]


@pytest.mark.parametrize("target", [None, 12.5])
def test_one_frame_is_a_grid_of_that_frame(target: float | None) -> None:
    assert set(timeline(np.zeros(1), 25.0, spec(target_fps=target)).tolist()) == {0}


def test_a_finetuning_clip_of_a_video_as_long_as_its_window_is_the_whole_video() -> None:
    clip, rng = spec(num_frames=4, frame_stride=2), np.random.default_rng(0)
    assert all(random_start_clip(8, clip, rng).tolist() == [0, 2, 4, 6] for _ in range(20))


def test_frames_that_are_a_little_early_or_late_are_all_taken_once() -> None:
    """By time, a late frame would not be on display yet: the one before it would be taken twice."""
    jitter = np.random.default_rng(3).uniform(-0.4, 0.4, 100)
    jitter[[0, -1]] = 0.0
    pts = (np.arange(100) + jitter) / 25
    assert timeline(pts, 25.0, spec()).tolist() == list(range(100))
    assert timeline(pts, 25.0, spec(target_fps=25.0)).tolist() != list(range(100))


def test_the_rate_of_three_frames_may_be_variable_and_that_of_two_is_not() -> None:
    assert not is_constant_rate(np.array([0.0, 0.02, 1.0]))
    assert is_constant_rate(np.array([0.0, 0.5, 1.0]))
    assert is_constant_rate(np.array([0.0, 0.02]))


@pytest.mark.parametrize(
    ("late", "fps", "taken"),
    [(0.9e-3, 10.0, 1), (1.1e-3, 10.0, 0), (0.24e-3, 1000.0, 1), (0.26e-3, 1000.0, 0)],
)
def test_a_time_counts_as_the_same_within_a_millisecond_and_a_quarter_of_a_frame(
    late: float, fps: float, taken: int
) -> None:
    pts = np.arange(3) / fps
    pts[1] += late
    assert timeline(pts, fps, spec(target_fps=fps)).tolist()[:3] == [0, taken, 2]
