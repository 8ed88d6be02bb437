"""The cache holds exactly what scoring would see; batches are random but repeatable."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from videos import frame_number, numbered_video

from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.errors import DataError
from ivdr_deploy.spec import ClipSpec
from ivdr_deploy.video.clips import load_clips
from ivdr_deploy.video.sampling import random_centre_clip, random_start_clip
from train.data import (
    CachedVideos,
    cache_videos,
    dual_views,
    epoch_batches,
    golden_clips,
    single_views,
    steps_per_epoch,
)

# The crop is so large that the numbers drawn on the square frames stay readable wherever it lies.
CLIP = ClipSpec(num_frames=4, frame_stride=3, num_clips=3, short_side=64, crop_size=58)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, label in enumerate("aabb"):
        (tmp_path / "v" / label).mkdir(parents=True, exist_ok=True)
        numbered_video(tmp_path / "v" / label / f"{number}.mp4", num_frames=30 + number, size=(72, 72))
    return tmp_path / "v"


@pytest.fixture
def cached(folder: Path, tmp_path: Path) -> CachedVideos:
    return cache_videos(read_video_list(folder), CLIP, tmp_path / "cache", decode_threads=2)


def numbers(clip: np.ndarray) -> list[int]:
    return [frame_number(frame) for frame in clip]


def test_eval_clips_are_bit_equal_to_those_of_prediction(cached: CachedVideos) -> None:
    for row, item in enumerate(cached.items):
        assert np.array_equal(cached.eval_clips(row, CLIP), load_clips(item.path, CLIP).video)


def test_eval_clips_are_bit_equal_to_those_of_prediction_on_real_videos(
    shared_data: Path, tmp_path: Path
) -> None:
    clip = ClipSpec(num_frames=8, num_clips=2, short_side=64, crop_size=56)
    for source in (shared_data / "actions-mini" / "test.csv", shared_data / "demo" / "labels.csv"):
        cached = cache_videos(read_video_list(source), clip, tmp_path, decode_threads=2)
        assert not cached.skipped
        for row, item in enumerate(cached.items):
            assert np.array_equal(cached.eval_clips(row, clip), load_clips(item.path, clip).video), item.uri


def test_second_run_decodes_nothing(cached: CachedVideos, folder: Path, tmp_path: Path) -> None:
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    again = cache_videos(read_video_list(folder), CLIP, tmp_path / "cache")
    assert again.files == cached.files
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == written


def test_changed_file_or_other_size_is_decoded_anew_but_stride_is_not(
    cached: CachedVideos, folder: Path, tmp_path: Path
) -> None:
    def files(clip: ClipSpec) -> tuple[Path, ...]:
        return cache_videos(read_video_list(folder), clip, tmp_path / "cache").files

    assert files(replace(CLIP, frame_stride=1, num_frames=8)) == cached.files
    assert not set(files(replace(CLIP, short_side=60))) & set(cached.files)
    numbered_video(cached.items[0].path, num_frames=12, size=(72, 72))
    after = files(CLIP)
    assert after[0] != cached.files[0]
    assert after[1:] == cached.files[1:]
    assert len(np.load(after[0])) == 12


def test_bad_videos_are_skipped_by_name_within_the_allowed_share(folder: Path, tmp_path: Path) -> None:
    (folder / "a" / "bad.mp4").write_bytes(b"no video")
    videos = read_video_list(folder)
    cached = cache_videos(videos, CLIP, tmp_path / "cache", max_bad_share=0.2)
    assert len(cached) == 4
    assert [item.uri for item, _ in cached.skipped] == ["a/bad.mp4"]
    assert all(item.uri != "a/bad.mp4" for item in cached.items)
    with pytest.raises(DataError, match=r"1 of 5 videos cannot be used \(a/bad.mp4: "):
        cache_videos(videos, CLIP, tmp_path / "cache", max_bad_share=0.1)


def test_absent_videos_stop_training_before_anything_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("path\nnone.mp4\n")
    with pytest.raises(DataError, match="1 of 1 videos do not exist"):
        cache_videos(read_video_list(tmp_path / "l.csv"), CLIP, tmp_path / "cache")


def test_one_video_is_too_few(folder: Path, tmp_path: Path) -> None:
    (folder / "l.csv").write_text("path\na/0.mp4\n")
    with pytest.raises(DataError, match="at least 2"):
        cache_videos(read_video_list(folder / "l.csv"), CLIP, tmp_path / "cache")


def test_single_views_are_strided_runs_of_the_right_video(cached: CachedVideos) -> None:
    views = single_views(cached, [2, 0], CLIP, draw=random_start_clip, rng=np.random.default_rng(0))
    assert views.shape == (2, *CLIP.clip_shape)
    for view in views:
        shown = numbers(view)
        assert shown == list(range(shown[0], shown[0] + 12, 3))


def test_third_view_shows_the_frames_of_the_first_in_another_crop(cached: CachedVideos) -> None:
    rng = np.random.default_rng(0)
    views = dual_views(cached, [0, 1, 2, 3] * 4, CLIP, draw=random_centre_clip, rng=rng)
    assert views.shape == (3, 16, *CLIP.clip_shape)
    first, second, third = ([numbers(clip) for clip in view] for view in views)
    assert first == third
    assert first != second
    assert any(not np.array_equal(a, b) for a, b in zip(views[0], views[2], strict=True))


def test_reversal_turns_all_views_of_a_video(cached: CachedVideos) -> None:
    rng = np.random.default_rng(0)
    views = dual_views(cached, [0] * 24, CLIP, draw=random_start_clip, rng=rng, reverse_probability=0.5)
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


def test_golden_clips_are_middle_clips_of_different_classes_first(cached: CachedVideos) -> None:
    golden = golden_clips(cached, CLIP, count=2)
    middle = replace(CLIP, num_clips=1)
    expected = [load_clips(cached.items[row].path, middle).video[0] for row in (0, 2)]
    assert np.array_equal(golden, np.stack(expected))
    assert len(golden_clips(cached, CLIP, count=9)) == 4
