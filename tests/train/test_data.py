"""What a step sees: batches and clips are random but repeatable."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from videos import frame_number, numbered_video

from ivdr_deploy.datasets.lists import VideoItem, VideoList, read_video_list
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.spec import ClipSpec, ModelSpec, ViewPlan
from ivdr_deploy.video.clips import load_clips, open_frames
from ivdr_deploy.video.sampling import random_centre_clip, random_start_clip
from train.augment import Changes
from train.cache import CachedVideos, Keeping, cache_videos
from train.config import AugmentConfig, DataConfig, PretrainConfig
from train.data import (
    Batch,
    DrawClip,
    draw_dual_batch,
    draw_permutations,
    dual_views,
    epoch_batches,
    golden_clips,
    golden_rows,
    single_views,
    steps_per_epoch,
)
from train.method import DualConfig

# The crop is so large that the numbers drawn on the square frames stay readable wherever it lies.
CLIP = ClipSpec(num_frames=4, frame_stride=3, short_side=64, crop_size=58)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> CachedVideos:
    folder = tmp_path_factory.mktemp("data")
    for number, label in enumerate("aabb"):
        (folder / "v" / label).mkdir(parents=True, exist_ok=True)
        numbered_video(folder / "v" / label / f"{number}.mp4", num_frames=30 + number, size=(72, 72))
    videos = read_video_list(folder / "v")
    raw = Keeping(form="raw")
    return cache_videos(videos, CLIP, folder / "cache", keeping=raw, decode=DecodeOptions(isolation="thread"))


def batch_of(rows: list[int]) -> Batch:
    return Batch(rows=np.array(rows), places=np.arange(len(rows)), seed=5, step=2)


def numbers(clip: np.ndarray) -> list[int]:
    return [frame_number(frame) for frame in clip]


def test_single_views_are_strided_runs_of_the_right_video(cached: CachedVideos) -> None:
    views = single_views(cached, batch_of([2, 0]), CLIP, draw=random_start_clip)
    assert views.shape == (2, *CLIP.clip_shape)
    for view in views:
        shown = numbers(view)
        assert shown == list(range(shown[0], shown[0] + 12, 3))


def test_third_view_shows_the_frames_of_the_first_in_another_crop(cached: CachedVideos) -> None:
    views = dual_views(cached, batch_of([0, 1, 2, 3] * 4), CLIP, draw=random_centre_clip)
    assert views.shape == (3, 16, *CLIP.clip_shape)
    first, second, third = ([numbers(clip) for clip in view] for view in views)
    assert first == third
    assert first != second
    assert any(not np.array_equal(a, b) for a, b in zip(views[0], views[2], strict=True))


@pytest.mark.parametrize("draw", [random_centre_clip, random_start_clip])
def test_clips_drawn_from_kept_frames_are_those_of_the_video(
    cached: CachedVideos, tmp_path: Path, draw: DrawClip
) -> None:
    batch, size = batch_of([2, 0, 3, 1]), CLIP.crop_size
    straight = Keeping(form="raw", max_bytes=0)
    videos = VideoList(tmp_path, cached.items)
    with cache_videos(videos, CLIP, tmp_path, keeping=straight, decode=DecodeOptions(workers=2)) as none:
        assert none.straight == 4
        views = [dual_views(one, batch, CLIP, draw=draw) for one in (cached, none)]
    assert np.array_equal(*views)
    for place, row in enumerate(batch.rows):
        with open_frames(cached.items[row].path, CLIP) as stream:
            frames = np.stack([frame.copy() for frame in stream.frames])
        rng = batch.video(place)
        drawn = [draw(len(frames), CLIP, rng) for _ in range(2)]
        rng.random()
        for view, indices in zip(views[0], (*drawn, drawn[0]), strict=True):
            top, left = (int(rng.integers(extent - size + 1)) for extent in frames.shape[1:3])
            assert np.array_equal(view[place], frames[indices, top : top + size, left : left + size])


def test_reversal_turns_all_views_of_a_video(cached: CachedVideos) -> None:
    views = dual_views(cached, batch_of([0] * 24), CLIP, draw=random_start_clip, reverse_probability=0.5)
    backwards = [[numbers(clip)[0] > numbers(clip)[-1] for clip in view] for view in views]
    assert backwards[0] == backwards[1] == backwards[2]
    assert 4 <= sum(backwards[0]) <= 20


def test_batches_cover_an_epoch_without_repeats_and_leave_the_remainder() -> None:
    batches = list(epoch_batches(11, batch_size=4, rng=np.random.default_rng(0)))
    rows = np.concatenate(batches)
    assert [len(batch) for batch in batches] == [4, 4]
    assert len(set(rows.tolist())) == 8
    assert steps_per_epoch(11, batch_size=4) == 2


def test_short_list_is_one_batch() -> None:
    (batch,) = epoch_batches(3, batch_size=8, rng=np.random.default_rng(0))
    assert sorted(batch.tolist()) == [0, 1, 2]
    assert steps_per_epoch(3, batch_size=8) == 1


def test_short_list_is_one_batch_of_equal_parts() -> None:
    (batch,) = epoch_batches(7, batch_size=8, rng=np.random.default_rng(0), multiple=2)
    assert len(set(batch.tolist())) == 6


def test_segment_orders_are_permutations_and_every_one_comes_up() -> None:
    drawn = draw_permutations(200, 3, rng=np.random.default_rng(0))
    assert drawn.dtype == np.int64
    assert len({tuple(order) for order in drawn.tolist()}) == 6
    assert (np.sort(drawn, axis=1) == np.arange(3)).all()


@pytest.mark.parametrize("slots", [2, 3])
def test_the_true_order_can_be_left_out(slots: int) -> None:
    drawn = draw_permutations(100, slots, rng=np.random.default_rng(0), exclude_identity=True)
    assert (np.sort(drawn, axis=1) == np.arange(slots)).all()
    assert len({tuple(order) for order in drawn.tolist()}) == math.factorial(slots) - 1
    assert not (drawn == np.arange(slots)).all(axis=1).any()


CONFIG = PretrainConfig(
    out="unused",
    data=DataConfig(train="unused"),
    clip=CLIP,
    model=ModelSpec(backbone="tiny"),
    augment=AugmentConfig(plain_probability=1.0, jitter_probability=1.0, flip_probability=1.0),
    dual=DualConfig(form="moco", rank_warmup_steps=3),
)


def test_dual_batch_depends_on_seed_and_step_alone(cached: CachedVideos) -> None:
    batch = batch_of([0, 1, 2, 3])
    one, two = (draw_dual_batch(cached, batch, CONFIG, draw=random_start_clip) for _ in range(2))
    assert one.keys() == {"views", "changes", "permutation", "contrast", "videos"}
    for name in ("views", "permutation"):
        assert torch.equal(one[name], two[name])  # type: ignore[arg-type]
    changes = one["changes"]
    assert isinstance(changes, Changes)
    assert changes.flip is not None
    assert changes.flip.tolist() == [False] * 4 + [True] * 8  # plain clips are first views only
    assert tuple(changes.color.shape) == (12, 3, 3)
    assert (one["contrast"], one["permutation"].tolist()) == (0.0, [[1, 0]] * 4)  # type: ignore[union-attr]
    later = draw_dual_batch(cached, replace(batch, step=3), CONFIG, draw=random_start_clip)
    assert later["contrast"] == 1.0
    assert not torch.equal(one["views"], later["views"])  # type: ignore[arg-type]


def test_the_settings_say_what_is_drawn(cached: CachedVideos) -> None:
    """Of one video again and again: every clip backwards, the true order among those drawn, no first view plain."""
    augment = AugmentConfig(reverse_probability=1.0, flip_probability=1.0)
    dual = DualConfig(rank_exclude_identity=False)
    config = replace(CONFIG, augment=augment, dual=dual)
    drawn = draw_dual_batch(cached, batch_of([0] * 16), config, draw=random_start_clip)
    assert drawn.keys() == {"views", "changes", "permutation"}
    for clip in drawn["views"][0].numpy():  # type: ignore[union-attr,index]
        shown = numbers(clip)
        assert shown == sorted(shown, reverse=True)
        assert shown[0] > shown[-1]
    assert {tuple(order) for order in drawn["permutation"].tolist()} == {(0, 1), (1, 0)}  # type: ignore[union-attr]
    assert drawn["changes"].flip.all()  # type: ignore[union-attr]


@pytest.mark.parametrize(("parts", "ranks"), [(2, 1), (1, 2), (2, 2)])
def test_parts_and_processes_draw_what_one_draws_at_once(
    cached: CachedVideos, parts: int, ranks: int
) -> None:
    batch = batch_of([3, 1, 2, 0])
    whole = draw_dual_batch(cached, batch, CONFIG, draw=random_start_clip)
    shares = [
        draw_dual_batch(
            cached, batch.part(part, parts, rank=rank, ranks=ranks), CONFIG, draw=random_start_clip
        )
        for part in range(parts)
        for rank in range(ranks)
    ]
    for name, axis in (("views", 1), ("permutation", 0), ("videos", 0)):
        assert torch.equal(torch.cat([share[name] for share in shares], axis), whole[name])  # type: ignore[arg-type]
    colors = [share["changes"].color.unflatten(0, (3, -1)) for share in shares]  # type: ignore[union-attr]
    assert torch.equal(torch.cat(colors, 1).flatten(0, 1), whole["changes"].color)  # type: ignore[union-attr]
    assert whole["videos"].tolist() == [3, 1, 2, 0]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("count", "rows"), [(2, [0, 3]), (3, [0, 3, 5]), (4, [0, 3, 5, 1]), (9, [0, 3, 5, 1, 4, 2])]
)
def test_golden_videos_are_the_first_of_each_class_then_the_second(count: int, rows: list[int]) -> None:
    items = [VideoItem(Path(f"{row}.mp4"), label, f"{row}.mp4") for row, label in enumerate("aaabbc")]
    assert golden_rows(items, count=count) == rows


def test_golden_clips_are_middle_clips_of_different_classes_first(cached: CachedVideos) -> None:
    golden = golden_clips(cached, CLIP, count=2)
    middle = ViewPlan(num_clips=1)
    expected = [load_clips(cached.items[row].path, CLIP, middle).video[0] for row in (0, 2)]
    assert np.array_equal(golden, np.stack(expected))
    assert len(golden_clips(cached, CLIP, count=9)) == 4
