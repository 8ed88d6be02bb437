"""The training cache holds exactly what scoring would see, and a video that does harm costs itself only."""

import errno
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from damage import damaged_bytes
from hostile_sources import EatsMemory, Hangs, KillsItsProcess
from videos import numbered_video

from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.decoding import DecodeOptions, ScratchError, pool
from ivdr_deploy.errors import (
    DataError,
    VideoCrashError,
    VideoDecodeError,
    VideoError,
    VideoLimitError,
    VideoTimeoutError,
)
from ivdr_deploy.spec import ClipSpec, ViewPlan
from ivdr_deploy.video import PathSource, Source, VideoLimits, load_clips, open_frames
from train import kept
from train.cache import CachedVideos, cache_videos, fill_cache, write_frames

CLIP = ClipSpec(num_frames=4, frame_stride=3, short_side=64, crop_size=58)
PLAN = ViewPlan(num_clips=3)
THREAD = DecodeOptions(isolation="thread")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, label in enumerate("aabb"):
        (tmp_path / "v" / label).mkdir(parents=True, exist_ok=True)
        numbered_video(tmp_path / "v" / label / f"{number}.mp4", num_frames=30 + number, size=(72, 96))
    return tmp_path / "v"


@pytest.fixture
def cached(folder: Path, tmp_path: Path) -> CachedVideos:
    return cache_videos(read_video_list(folder), CLIP, tmp_path / "cache", decode=THREAD)


@pytest.mark.parametrize(
    "plan",
    [PLAN, ViewPlan(num_clips=2, spatial_crops=3), ViewPlan(placement="sliding", num_clips=9)],
    ids=str,
)
def test_eval_clips_are_bit_equal_to_those_of_prediction(cached: CachedVideos, plan: ViewPlan) -> None:
    for row, item in enumerate(cached.items):
        assert np.array_equal(cached.eval_clips(row, CLIP, plan), load_clips(item.path, CLIP, plan).video)


def test_eval_clips_are_bit_equal_to_those_of_prediction_on_real_videos(
    shared_data: Path, tmp_path: Path
) -> None:
    clip, plan = ClipSpec(num_frames=8, short_side=64, crop_size=56), ViewPlan(num_clips=2)
    for source in (shared_data / "actions-mini" / "test.csv", shared_data / "demo" / "labels.csv"):
        cached = cache_videos(read_video_list(source), clip, tmp_path, decode=DecodeOptions(workers=2))
        assert not cached.skipped
        for row, item in enumerate(cached.items):
            expected = load_clips(item.path, clip, plan).video
            assert np.array_equal(cached.eval_clips(row, clip, plan), expected), item.uri


def test_second_run_decodes_nothing(cached: CachedVideos, folder: Path, tmp_path: Path) -> None:
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    assert sorted(written) == sorted(cached.files)  # nothing else is left in the folder
    again = cache_videos(read_video_list(folder), CLIP, tmp_path / "cache")
    assert again.files == cached.files
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == written


def test_damaged_files_are_noticed_and_made_again(cached: CachedVideos, folder: Path, tmp_path: Path) -> None:
    videos = read_video_list(folder)
    whole = [file.read_bytes() for file in cached.files]
    pixels = [frames.copy() for frames in map(cached.frames, range(4))]
    flipped = bytearray(whole[0])
    flipped[len(flipped) // 2] ^= 1  # one level of one pixel: NumPy reads it without a word
    damaged = [
        bytes(flipped),
        b"",
        whole[1],
        whole[0][:-1],
        *(damaged_bytes(whole[0], seed) for seed in range(60)),
    ]
    for data in damaged:
        assert data != whole[0]
        cached.files[0].write_bytes(data)
        again = cache_videos(videos, CLIP, tmp_path / "cache", decode=THREAD)
        assert again.files == cached.files
        assert all(map(np.array_equal, map(again.frames, range(4)), pixels))
    assert [file.read_bytes() for file in cached.files] == whole
    assert sorted((tmp_path / "cache").iterdir()) == sorted(cached.files)


def test_a_file_that_goes_while_it_is_in_use_is_an_error_of_ours(cached: CachedVideos) -> None:
    cached.files[0].write_bytes(b"garbage")
    cached.files[1].unlink()
    for row in (0, 1):
        with pytest.raises(DataError, match="run the same command again"):
            cached.frames(row)


def test_what_shapes_the_frames_is_decoded_anew_and_the_rest_is_not(
    cached: CachedVideos, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files(clip: ClipSpec) -> tuple[Path, ...]:
        return cache_videos(read_video_list(folder), clip, tmp_path / "cache", decode=THREAD).files

    assert files(replace(CLIP, frame_stride=1, num_frames=8)) == cached.files
    seen = set(cached.files)
    for change in ({"short_side": 60}, {"target_fps": 5.0}, {"short_side": 0, "exact_size": (64, 85)}):
        other = set(files(replace(CLIP, **change)))
        assert not other & seen
        seen |= other
    numbered_video(cached.items[0].path, num_frames=12, size=(72, 96))
    after = files(CLIP)
    assert after[0] not in seen
    assert after[1:] == cached.files[1:]
    assert len(np.load(after[0])) == 12
    monkeypatch.setattr(kept.metadata, "version", lambda name: f"another {name}")
    assert not set(files(CLIP)) & {*seen, *after}  # another decoder may give other pixels


def test_exact_size_gives_frames_of_that_size(folder: Path, tmp_path: Path) -> None:
    clip = replace(CLIP, short_side=0, exact_size=(60, 84))
    cached = cache_videos(read_video_list(folder), clip, tmp_path / "cache", decode=THREAD)
    assert cached.frames(0).shape == (30, 60, 84, 3)


@pytest.mark.parametrize("bad", ["damaged", "absent"])
def test_bad_videos_are_skipped_by_name_within_the_allowed_share(
    folder: Path, tmp_path: Path, bad: str
) -> None:
    listed = tmp_path / "list.csv"
    names = [f"v/{label}/{number}.mp4" for number, label in enumerate("aabb")] + ["v/a/bad.mp4"]
    listed.write_text("path\n" + "\n".join(names) + "\n")
    if bad == "damaged":
        (folder / "a" / "bad.mp4").write_bytes(b"no video")
    videos = read_video_list(listed)
    cached = cache_videos(videos, CLIP, tmp_path / "cache", decode=THREAD, max_bad_share=0.2)
    assert len(cached) == 4
    assert [item.uri for item, _ in cached.skipped] == ["v/a/bad.mp4"]
    assert all(item.uri != "v/a/bad.mp4" for item in cached.items)
    with pytest.raises(DataError, match=r"1 of 5 videos cannot be used \(v/a/bad.mp4: "):
        cache_videos(videos, CLIP, tmp_path / "cache", decode=THREAD, max_bad_share=0.1)


def test_one_video_is_too_few(folder: Path, tmp_path: Path) -> None:
    (folder / "l.csv").write_text("path\na/0.mp4\n")
    with pytest.raises(DataError, match="at least 2"):
        cache_videos(read_video_list(folder / "l.csv"), CLIP, tmp_path / "cache", decode=THREAD)


@dataclass(frozen=True)
class Spoilt(Source):
    """A good file whose reader does the harm of another source."""

    path: Path
    harm: Source
    uri: str

    def local(self) -> Path | bytes:
        self.harm.local()
        return self.path

    def open(self):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def identity(self):  # type: ignore[no-untyped-def]
        return PathSource(self.path).identity()


def test_a_video_that_kills_hangs_or_floods_its_worker_costs_itself_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "GRACE_SECONDS", 0.5)
    good = [PathSource(path) for path in sorted(folder.rglob("*.mp4"))]
    bad = [
        Spoilt(good[0].path, harm, type(harm).__name__) for harm in (KillsItsProcess(), Hangs(), EatsMemory())
    ]
    sources = [good[0], *bad, *good[1:]]
    given = fill_cache(
        sources,
        CLIP,
        tmp_path / "cache",
        decode=DecodeOptions(workers=2, memory_bytes=1 << 30),
        limits=VideoLimits(max_decode_seconds=1.5),
    )
    errors = [type(one) for one in given if isinstance(one, VideoError)]
    assert errors == [VideoCrashError, VideoTimeoutError, VideoLimitError]
    files = [one for one in given if isinstance(one, Path)]
    assert [given.index(file) for file in files] == [0, 4, 5, 6]
    assert sorted((tmp_path / "cache").iterdir()) == sorted(files)  # nothing half written is left
    for source, file in zip(good, files, strict=True):
        with open_frames(source, CLIP) as stream:
            assert np.array_equal(np.load(file), np.stack(list(stream.frames)))


def test_a_video_that_breaks_off_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    path = next(folder.rglob("*.mp4"))
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat")
    size = int.from_bytes(data[start - 4 : start])
    data[start + size // 2 : start + 3 * size // 4] = bytes(3 * size // 4 - size // 2)
    path.write_bytes(data)
    (given,) = fill_cache([PathSource(path)], CLIP, tmp_path / "cache", decode=THREAD)
    assert isinstance(given, VideoDecodeError)
    assert not list((tmp_path / "cache").iterdir())


def test_frames_are_written_one_at_a_time(folder: Path, tmp_path: Path) -> None:
    """In a worker that may take less memory than they need together."""
    long = numbered_video(tmp_path / "long.mp4", num_frames=600, size=(320, 240))
    clip = ClipSpec(short_side=240, crop_size=224)  # 138 MB of frames
    options = DecodeOptions(memory_bytes=96 << 20)
    (file,) = fill_cache([PathSource(long)], clip, tmp_path / "cache", decode=options)
    assert isinstance(file, Path), file
    assert np.load(file, mmap_mode="r").shape == (600, 240, 320, 3)


def test_a_full_disk_is_no_fault_of_the_video(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(stream: object, header: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    source = PathSource(next(folder.rglob("*.mp4")))
    with pytest.raises(ScratchError, match="No space left") as caught:
        write_frames(source, CLIP, tmp_path / "a.npy", limits=VideoLimits())
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        cache_videos(read_video_list(folder), CLIP, tmp_path / "cache", decode=THREAD, max_bad_share=1.0)


def test_decode_workers_need_no_torch() -> None:
    code = "import sys, train.cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
