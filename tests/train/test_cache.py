"""The training cache holds exactly what scoring would see, and a video that does harm costs itself only."""

import errno
import io
import os
import shutil
import signal
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
from ivdr_deploy.decoding import DecodeOptions, DecodePool, ScratchError, pool
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
from train import cache, kept
from train.cache import CachedVideos, Keeping, cache_videos, fill_cache, say_skipped
from train.frames import Form, Frames, KeptFrames, StraightFrames, write_frames
from train.report import say_failed

CLIP = ClipSpec(num_frames=4, frame_stride=3, short_side=64, crop_size=58)
PLAN = ViewPlan(num_clips=3)
THREAD = DecodeOptions(isolation="thread")
RAW = Keeping(form="raw")
LEVELS = 2.5
"""How far a frame may be from what was decoded, on average: what docs/training.md says of JPEG."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, label in enumerate("aabb"):
        (tmp_path / "v" / label).mkdir(parents=True, exist_ok=True)
        numbered_video(tmp_path / "v" / label / f"{number}.mp4", num_frames=30 + number, size=(72, 96))
    return tmp_path / "v"


@pytest.fixture
def cached(folder: Path, tmp_path: Path) -> CachedVideos:
    return open_cache(folder, tmp_path)


def open_cache(
    folder: Path, tmp_path: Path, clip: ClipSpec = CLIP, keeping: Keeping = RAW, **options: object
) -> CachedVideos:
    videos = read_video_list(folder)
    given = {"decode": THREAD, **options}
    return cache_videos(videos, clip, tmp_path / "cache", keeping=keeping, **given)  # type: ignore[arg-type]


def files(cached: CachedVideos) -> tuple[Path, ...]:
    assert all(isinstance(video, KeptFrames) for video in cached.videos)
    return tuple(video.file for video in cached.videos)  # type: ignore[attr-defined]


def there(tmp_path: Path) -> list[Path]:
    """Everything in the cache that is no folder."""
    return sorted(path for path in (tmp_path / "cache").rglob("*") if not path.is_dir())


def every_frame(video: Frames) -> np.ndarray:
    return video.take(np.arange(video.shape[0]))


def as_decoded(path: Path, clip: ClipSpec = CLIP) -> np.ndarray:
    with open_frames(path, clip) as stream:
        return np.stack([frame.copy() for frame in stream.frames])


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
        videos = read_video_list(source)
        some = replace(videos, items=videos.items[::3])  # each takes its while
        given = {"clip": clip, "folder": tmp_path / "cache", "decode": DecodeOptions(workers=2)}
        cached, small = (cache_videos(some, keeping=keeping, **given) for keeping in (RAW, Keeping()))  # type: ignore[arg-type]
        assert not cached.skipped
        for row, item in enumerate(cached.items):
            expected = load_clips(item.path, clip, plan).video
            assert np.array_equal(cached.eval_clips(row, clip, plan), expected), item.uri
            far = np.abs(small.eval_clips(row, clip, plan).astype(int) - expected)
            assert far.mean(axis=(2, 3, 4)).max() < LEVELS, item.uri
        sizes = [sum(file.stat().st_size for file in files(one)) for one in (cached, small)]
        assert sizes[0] > 3 * sizes[1]  # of small frames; more of larger ones


def test_second_run_decodes_nothing(cached: CachedVideos, folder: Path, tmp_path: Path) -> None:
    written = {file: file.read_bytes() for file in there(tmp_path)}
    assert sorted(written) == sorted(files(cached))  # nothing else is left in the folder
    inodes = [file.stat().st_ino for file in files(cached)]
    again = open_cache(folder, tmp_path)
    assert files(again) == files(cached)
    assert [file.stat().st_ino for file in files(again)] == inodes
    assert {file: file.read_bytes() for file in there(tmp_path)} == written


def test_a_video_is_known_again_by_its_content(cached: CachedVideos, folder: Path, tmp_path: Path) -> None:
    inodes = [file.stat().st_ino for file in files(cached)]
    moved = folder.rename(tmp_path / "elsewhere")
    os.utime(moved / "a" / "0.mp4", (1, 1))
    again = open_cache(moved, tmp_path)
    assert [file.stat().st_ino for file in files(again)] == inodes
    path = moved / "a" / "0.mp4"
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[data.index(b"mdat") + 40] ^= 1  # of the same size and time
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files(open_cache(moved, tmp_path))[0] != files(cached)[0]


@pytest.mark.parametrize("form", ["raw", "jpeg"])
def test_damaged_files_are_noticed_and_made_again(folder: Path, tmp_path: Path, form: Form) -> None:
    cached = open_cache(folder, tmp_path, keeping=Keeping(form=form))
    whole = [file.read_bytes() for file in files(cached)]
    pixels = list(map(every_frame, cached.videos))
    flipped = bytearray(whole[0])
    flipped[len(flipped) // 2] ^= 1  # one level of one pixel, or a picture that is read without a word
    damaged = [
        bytes(flipped),
        b"",
        whole[1],
        whole[0][:-1],
        *(damaged_bytes(whole[0], seed) for seed in range(30)),
    ]
    for data in damaged:
        assert data != whole[0]
        files(cached)[0].write_bytes(data)
        again = open_cache(folder, tmp_path, keeping=Keeping(form=form))
        assert files(again) == files(cached)
        assert all(map(np.array_equal, map(every_frame, again.videos), pixels))
    assert [file.read_bytes() for file in files(cached)] == whole
    assert there(tmp_path) == sorted(files(cached))


def test_jpeg_frames_are_near_those_decoded_and_the_same_straight_from_the_video(
    folder: Path, tmp_path: Path
) -> None:
    small = open_cache(folder, tmp_path, keeping=Keeping())
    none = open_cache(folder, tmp_path, keeping=Keeping(max_bytes=0), decode=DecodeOptions(workers=2))
    with none:
        assert none.straight == len(none) == 4
        places = np.array([[7, 3, 3], [0, 29, 7]])
        for item, kept_frames, straight in zip(small.items, small.videos, none.videos, strict=True):
            expected = as_decoded(item.path)
            assert straight.shape == kept_frames.shape == expected.shape
            assert np.abs(every_frame(kept_frames).astype(int) - expected).mean() < LEVELS
            assert np.array_equal(straight.take(places), kept_frames.take(places))
            assert np.array_equal(every_frame(straight), every_frame(kept_frames))


# --- room


def test_what_does_not_fit_is_decoded_straight_and_what_is_kept_stays(
    cached: CachedVideos, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = max(file.stat().st_size for file in files(cached))
    shutil.rmtree(tmp_path / "cache")
    keeping = Keeping(form="raw", max_bytes=2.5 * size)
    for _ in range(2):  # the second run finds the two, and does not exchange them
        with open_cache(folder, tmp_path, keeping=keeping) as some:
            assert [type(video) for video in some.videos] == [KeptFrames] * 2 + [StraightFrames] * 2
            assert len(there(tmp_path)) == 2
            for item, video in zip(some.items, some.videos, strict=True):
                assert np.array_equal(every_frame(video), as_decoded(item.path))


def test_no_video_is_decoded_for_nothing_once_the_cache_is_full(
    cached: CachedVideos, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a list of thousands of which a part fits, the others are opened only."""
    for number in range(4, 16):
        shutil.copyfile(folder / "a" / "0.mp4", folder / "b" / f"{number}.mp4")
        with (folder / "b" / f"{number}.mp4").open("ab") as file:
            file.write(bytes(number))  # other content, the same frames
    size = max(file.stat().st_size for file in files(cached))
    shutil.rmtree(tmp_path / "cache")
    written: list[Path] = []

    def counted(source: Source, clip: ClipSpec, file: Path, *given: object, **options: object) -> object:
        written.append(file)
        return write_frames(source, clip, file, *given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("train.cache.write_frames", counted)
    with open_cache(folder, tmp_path, keeping=Keeping(form="raw", max_bytes=2.5 * size)) as some:
        assert (len(some), some.straight) == (16, 14)
    assert len(there(tmp_path)) == 2
    assert len(written) <= 3 + 3  # two that stay, one for which there is no room, and those that were ahead


def test_files_that_another_run_removes_meanwhile_are_made_again(
    cached: CachedVideos, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *_ = files(cached)
    utime, is_whole = os.utime, cache.is_whole

    def removed_first(path: Path, *given: object) -> None:
        if path == first:
            first.unlink()
        utime(path, *given)

    def removed_after(file: Path) -> bool:
        whole = is_whole(file)
        if file == second and whole and file.stat().st_ino == inode:
            file.unlink()
        return whole

    inode = second.stat().st_ino
    monkeypatch.setattr("train.cache.os.utime", removed_first)
    monkeypatch.setattr("train.cache.is_whole", removed_after)
    again = open_cache(folder, tmp_path)
    assert files(again) == files(cached)
    assert not again.skipped
    for item, video in zip(again.items, again.videos, strict=True):
        assert np.array_equal(every_frame(video), as_decoded(item.path))


def test_what_was_not_used_for_longest_makes_room(folder: Path, tmp_path: Path) -> None:
    def keep(*names: str, most: float) -> list[bool]:
        listed = folder / "list.csv"
        listed.write_text("path\n" + "".join(f"{name}.mp4\n" for name in names))
        with open_cache(listed, tmp_path, keeping=Keeping(form="raw", max_bytes=most)) as found:
            return [isinstance(video, KeptFrames) for video in found.videos]

    size = 40 * 64 * 85 * 3 + 1000
    assert keep("a/0", "a/1", most=2 * size) == [True, True]
    older, younger = there(tmp_path)
    os.utime(older, (1, 1))
    os.utime(younger, (2, 2))
    assert keep("b/2", "b/3", most=3 * size) == [True, True]
    assert younger.exists()
    assert not older.exists()
    for file in there(tmp_path):
        os.utime(file, (3, 3))
    keep("a/0", "a/1", most=4 * size)  # the one that was there has been used now
    assert younger.stat().st_mtime > 3
    assert len(there(tmp_path)) == 4
    assert keep("b/2", "a/0", most=1.5 * size) == [False, True]  # the bound is held, whoever made the files
    assert len(there(tmp_path)) == 1


def test_a_run_goes_on_without_the_files_that_made_room_for_another(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "one.csv").write_text("path\na/0.mp4\na/1.mp4\n")
    (folder / "two.csv").write_text("path\nb/2.mp4\nb/3.mp4\n")
    with open_cache(folder / "one.csv", tmp_path, keeping=Keeping()) as used:
        before = list(map(every_frame, used.videos))
        keeping = Keeping(max_bytes=1.2 * sum(file.stat().st_size for file in files(used)))
        with open_cache(folder / "two.csv", tmp_path, keeping=keeping) as other:
            assert other.straight == 0
        assert not set(there(tmp_path)) & set(files(used))
        for _ in range(2):
            assert all(map(np.array_equal, map(every_frame, used.videos), before))
    said = capsys.readouterr().err
    assert said.count("has gone from the cache") == 2
    assert str(folder / "a" / "0.mp4") in said


FILL = """
import os, signal, sys
from pathlib import Path
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.spec import ClipSpec
from train import cache, frames
after = int(sys.argv[3])
encoded, seen = frames.encoded, []

def dying(frame, form):
    seen.append(form)
    if len(seen) > after:
        os.kill(os.getpid(), signal.SIGKILL)
    return encoded(frame, form)

frames.encoded = dying
clip = ClipSpec(num_frames=4, frame_stride=3, short_side=64, crop_size=58)
decode = DecodeOptions(isolation="thread")
cache.cache_videos(read_video_list(sys.argv[1]), clip, Path(sys.argv[2]), decode=decode)
"""


def test_a_cache_whose_filling_was_killed_is_gone_on_with(folder: Path, tmp_path: Path) -> None:
    """In the second video: the first is used as it is, and nothing of the second is read."""
    line = [sys.executable, "-c", FILL, str(folder), str(tmp_path / "cache"), "45"]
    root = Path(__file__).parents[2]
    done = subprocess.run(line, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == -signal.SIGKILL
    (left,) = (tmp_path / "cache").glob("??/*.frames")
    inode = left.stat().st_ino
    assert len(list((tmp_path / "cache").glob("??/.*"))) == 1  # what the second was to become
    cached = open_cache(folder, tmp_path, keeping=Keeping())
    assert left in files(cached)
    assert left.stat().st_ino == inode
    assert there(tmp_path) == sorted(files(cached))
    for item, video in zip(cached.items, cached.videos, strict=True):
        assert np.abs(every_frame(video).astype(int) - as_decoded(item.path)).mean() < LEVELS


# --- harm


def test_a_file_that_changes_while_it_is_in_use_is_an_error_of_ours(cached: CachedVideos) -> None:
    for data in (b"garbage", b"", files(cached)[1].read_bytes()):
        files(cached)[0].write_bytes(data)
        with pytest.raises(DataError, match="run the same command again"):
            cached.videos[0].take(np.array([0]))


def test_what_shapes_the_frames_is_decoded_anew_and_the_rest_is_not(
    cached: CachedVideos, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(clip: ClipSpec, form: Form = "raw") -> tuple[Path, ...]:
        return files(open_cache(folder, tmp_path, clip, Keeping(form=form)))

    assert of(replace(CLIP, frame_stride=1, num_frames=8)) == files(cached)
    seen = set(files(cached))
    changes = ({"short_side": 60}, {"target_fps": 5.0}, {"short_side": 0, "exact_size": (64, 85)})
    for other in (*(set(of(replace(CLIP, **change))) for change in changes), set(of(CLIP, "jpeg"))):
        assert not other & seen
        seen |= other
    numbered_video(cached.items[0].path, num_frames=12, size=(72, 96))
    after = of(CLIP)
    assert after[0] not in seen
    assert after[1:] == files(cached)[1:]
    assert open_cache(folder, tmp_path).videos[0].shape[0] == 12
    monkeypatch.setattr(kept.metadata, "version", lambda name: f"another {name}")
    assert not set(of(CLIP)) & {*seen, *after}  # another decoder may give other pixels


def test_exact_size_gives_frames_of_that_size(folder: Path, tmp_path: Path) -> None:
    clip = replace(CLIP, short_side=0, exact_size=(60, 84))
    cached = open_cache(folder, tmp_path, clip)
    assert cached.videos[0].shape == (30, 60, 84, 3)
    assert every_frame(cached.videos[0]).shape == (30, 60, 84, 3)


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


def test_a_name_with_line_ends_makes_no_line_of_its_own(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a" / "x\nPASS: all is well\x1b[2J.mp4").write_bytes(b"no video")
    with open_cache(folder, tmp_path, max_bad_share=0.5) as cached:
        say_skipped(cached.skipped)
    say_failed([("y\nPASS: all is well", "broken\nin two")])
    said = capsys.readouterr().err
    assert [line.split()[0] for line in said.splitlines()] == ["skipped", "failed"]
    assert "\\u000aPASS: all is well\\u001b[2J.mp4: " in said


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
        return io.BytesIO(self.uri.encode())

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
    options = DecodeOptions(workers=2, memory_bytes=1 << 30)
    with DecodePool(options) as decoding:
        limits = VideoLimits(max_decode_seconds=1.5)
        given = fill_cache(sources, CLIP, tmp_path / "cache", decoding, keeping=RAW, limits=limits)
    errors = [type(one) for one in given if isinstance(one, VideoError)]
    assert errors == [VideoCrashError, VideoTimeoutError, VideoLimitError]
    found = [one for one in given if isinstance(one, KeptFrames)]
    assert [given.index(one) for one in found] == [0, 4, 5, 6]
    assert there(tmp_path) == sorted(one.file for one in found)  # nothing half written is left
    for source, one in zip(good, found, strict=True):
        assert np.array_equal(every_frame(one), as_decoded(source.path))


def test_a_video_that_breaks_off_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    path = next(folder.rglob("*.mp4"))
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat")
    size = int.from_bytes(data[start - 4 : start])
    data[start + size // 2 : start + 3 * size // 4] = bytes(3 * size // 4 - size // 2)
    path.write_bytes(data)
    with DecodePool(THREAD) as decoding:
        (given,) = fill_cache([PathSource(path)], CLIP, tmp_path / "cache", decoding)
    assert isinstance(given, VideoDecodeError)
    assert not there(tmp_path)


def test_frames_are_written_one_at_a_time(folder: Path, tmp_path: Path) -> None:
    """In a worker that may take less memory than they need together."""
    long = numbered_video(tmp_path / "long.mp4", num_frames=600, size=(320, 240))
    clip = ClipSpec(short_side=240, crop_size=224)  # 138 MB of frames
    options = DecodeOptions(memory_bytes=96 << 20)
    with DecodePool(options) as decoding:
        (frames,) = fill_cache([PathSource(long)], clip, tmp_path / "cache", decoding, keeping=RAW)
    assert isinstance(frames, KeptFrames), frames
    assert frames.shape == (600, 240, 320, 3)


def test_a_full_disk_is_no_fault_of_the_video(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(frame: object, form: object) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("train.frames.encoded", full)
    source = PathSource(next(folder.rglob("*.mp4")))
    with pytest.raises(ScratchError, match="No space left") as caught:
        write_frames(source, CLIP, tmp_path / "a.frames", "raw", limits=VideoLimits())
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        cache_videos(read_video_list(folder), CLIP, tmp_path / "cache", decode=THREAD, max_bad_share=1.0)


def test_decode_workers_need_no_torch() -> None:
    code = "import sys, train.cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
