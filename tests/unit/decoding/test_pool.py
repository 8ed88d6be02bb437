import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from decode_jobs import CLIP, LIMITS, PLAN, PROCESS, THREAD, decode_workers, load, number_of
from hostile_sources import EatsMemory, Hangs, KillsItsProcess, Surprises
from served import wait_for
from videos import numbered_video

from ivdr_deploy.decoding import DecodeOptions, DecodePool, ScratchError, pool
from ivdr_deploy.decoding._worker import Parcel, Scratch
from ivdr_deploy.errors import (
    ConfigError,
    MissingDependencyError,
    ResourceError,
    VideoCrashError,
    VideoError,
    VideoLimitError,
    VideoOpenError,
    VideoTimeoutError,
)
from ivdr_deploy.video import BytesSource, PathSource, Source, VideoLimits, load_clips


@pytest.mark.parametrize("options", [PROCESS, THREAD], ids=["process", "thread"])
def test_gives_what_decoding_here_gives(video: Path, options: DecodeOptions) -> None:
    expected = load_clips(video, CLIP, PLAN)
    with DecodePool(options) as decoding:
        for source in (PathSource(video), BytesSource(video.read_bytes())):
            clips = load(decoding, source).result(30)
            assert np.array_equal(clips.video, expected.video)
            assert clips.info == expected.info
            assert clips.video.flags.writeable


@pytest.mark.parametrize("options", [PROCESS, THREAD], ids=["process", "thread"])
def test_a_bad_video_is_the_same_error_as_here(tmp_path: Path, options: DecodeOptions) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    with pytest.raises(VideoOpenError) as here:
        load_clips(broken, CLIP, PLAN)
    with DecodePool(options) as decoding:
        error = load(decoding, PathSource(broken)).exception(30)
    assert (type(error), str(error)) == (VideoOpenError, str(here.value))


@pytest.mark.parametrize(
    ("source", "expected"),
    [(KillsItsProcess(), VideoCrashError), (Hangs(), VideoTimeoutError), (EatsMemory(), VideoLimitError)],
    ids=["killed", "hangs", "memory"],
)
def test_three_in_a_row_cost_their_own_videos_and_no_more_than_their_time(
    video: Path, monkeypatch: pytest.MonkeyPatch, source: Source, expected: type[VideoError]
) -> None:
    monkeypatch.setattr(pool, "GRACE_SECONDS", 0.2)
    limits = VideoLimits(max_decode_seconds=0.8)
    with DecodePool(DecodeOptions(memory_bytes=1 << 30)) as decoding:
        load(decoding, PathSource(video)).result(30)  # the workers are up
        start = time.monotonic()
        sources = [PathSource(video), source, source, source, *[PathSource(video)] * 3]
        futures = [load(decoding, item, limits=limits) for item in sources]
        wait(futures, timeout=60)
        seconds = time.monotonic() - start
        errors = [future.exception(0) for future in futures]
    assert [type(error) for error in errors] == [type(None), *[expected] * 3, *[type(None)] * 3]
    # The deadline of each, and the time to notice and to begin again on a busy machine; `LIMITS` would take 60 s.
    assert seconds < 3 * 1.0 + 20.0


@pytest.mark.parametrize("options", [PROCESS, THREAD], ids=["process", "thread"])
def test_what_nobody_foresaw_is_an_error_of_its_video(
    video: Path, options: DecodeOptions, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), DecodePool(options) as decoding:
        error = load(decoding, Surprises(uri="a\nhostile")).exception(30)
        assert load(decoding, PathSource(video)).exception(30) is None
    assert isinstance(error, VideoCrashError)
    assert "unexpected ZeroDivisionError" in error.message
    assert len(error.message) < 300
    assert "decoding a\\u000ahostile failed unexpectedly" in caplog.text
    assert "in local" in caplog.text, "where it happened, also in another process"


def needs_a_package(source: Source, *, limits: VideoLimits) -> None:
    raise MissingDependencyError("the package 'x' cannot be imported")


@pytest.mark.parametrize("options", [PROCESS, THREAD], ids=["process", "thread"])
def test_what_would_hit_every_video_stays_what_it_is(video: Path, options: DecodeOptions) -> None:
    with DecodePool(options) as decoding, pytest.raises(MissingDependencyError):
        decoding.submit(needs_a_package, PathSource(video), limits=LIMITS).result(30)


def test_a_result_that_is_cut_short_on_its_way_is_no_result(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ivdr_deploy.decoding._worker._SHARED_MEMORY", tmp_path / "absent")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    unpack = Parcel.unpack

    def cutting(parcel: Parcel, packed: tuple[bytes, list[int]]) -> object:
        os.truncate(parcel.path, parcel.path.stat().st_size - 1)
        return unpack(parcel, packed)

    with DecodePool(PROCESS) as decoding:
        with monkeypatch.context() as full:
            full.setattr(Parcel, "unpack", cutting)
            with pytest.raises(ScratchError, match="cut short"):
                load(decoding, PathSource(video)).result(30)
        assert len(load(decoding, PathSource(video)).result(30).video) == 2


def test_many_videos_come_in_order_with_their_errors_and_few_are_done_ahead(video: Path) -> None:
    taken: list[int] = []

    def calls() -> Iterator[tuple[Source, int]]:
        for number in range(12):
            taken.append(number)
            yield (BytesSource(b"no video") if number == 1 else PathSource(video)), number

    found: list[object] = []
    with DecodePool(THREAD) as decoding:
        for outcome in decoding.each(load_or_count, calls(), limits=LIMITS):
            found.append(outcome)
            assert len(taken) - len(found) <= 2
    assert isinstance(found.pop(1), VideoOpenError)
    assert found == [0, *range(2, 12)]


def load_or_count(source: Source, number: int, *, limits: VideoLimits) -> int:
    load_clips(source, CLIP, PLAN, limits=limits)
    return number


@pytest.mark.parametrize(("free", "shared"), [(1 << 30, True), ((1 << 30) - 1, False)])
def test_results_travel_through_shared_memory_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, shared: bool
) -> None:
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr("ivdr_deploy.decoding._worker._SHARED_MEMORY", tmp_path / "shm")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    scratch = Scratch()
    assert [path.parent == tmp_path / "shm" for path in tmp_path.rglob("ivdr-decode-*")] == [shared]
    scratch.remove()


def priority(source: Source, *, limits: VideoLimits) -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.parametrize("options", [PROCESS, THREAD], ids=["process", "thread"])
def test_workers_give_way_to_the_network(video: Path, options: DecodeOptions) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with DecodePool(options) as decoding:
        worker = decoding.submit(priority, PathSource(video), limits=LIMITS).result(30)
    assert worker > before
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_workers_are_parallel(video: Path) -> None:
    with DecodePool(DecodeOptions(workers=2)) as decoding:
        load(decoding, PathSource(video)).result(30)
        wait_for(
            lambda: len(decode_workers()) == 2
        )  # the second has begun too, though nothing was there for it
        futures = [load(decoding, PathSource(video)) for _ in range(8)]
        assert all(future.exception(30) is None for future in futures)


def test_nothing_is_left_behind(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ivdr_deploy.decoding._worker._SHARED_MEMORY", tmp_path / "absent")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    decoding = DecodePool(PROCESS)
    load(decoding, BytesSource(video.read_bytes())).result(30)
    load(decoding, KillsItsProcess()).exception(30)
    (folder,) = tmp_path.glob("ivdr-decode-*")
    assert [path.name for path in folder.iterdir()] == [
        "0"
    ]  # the one file, which the next result is written over
    decoding.close()
    decoding.close()
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import sys
from ivdr_deploy.decoding import DecodePool
from ivdr_deploy.spec import ClipSpec, ViewPlan
from ivdr_deploy.video import PathSource, VideoLimits, load_clips
clip = ClipSpec(num_frames=4, frame_stride=2, short_side=36, crop_size=32)
with DecodePool() as pool:
    clips = pool.submit(load_clips, PathSource(sys.argv[1]), clip, ViewPlan(num_clips=2), limits=VideoLimits()).result()
    print("clips", len(clips.video), flush=True)
    if "wait" in sys.argv:
        sys.stdin.read()
"""


def test_closing_waits_for_threads_and_drops_what_still_waits(video: Path) -> None:
    with DecodePool(THREAD) as decoding:
        jobs = [
            decoding.submit(number_of, PathSource(video), number, limits=LIMITS)
            for number in range(0, 500, 10)
        ]
        jobs[0].result(30)
    assert all(job.done() for job in jobs)
    assert {type(job.exception()) for job in jobs} == {type(None), CancelledError}


def test_a_script_without_a_guard_does_not_start_itself_over(video: Path, tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text(SCRIPT.replace("sys.argv[1]", "__import__('pathlib').Path(sys.argv[1])"))
    done = subprocess.run(
        [sys.executable, str(script), str(video)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "clips 2\n"), done.stderr


def hold_the_interpreter(source: Source, *, limits: VideoLimits) -> None:
    """Hang inside a library that does not let Python run beside it."""
    os.write(1, b"hanging\n")
    ctypes.PyDLL(None).pause()


HANGING = """
import test_pool
from ivdr_deploy.decoding import DecodePool
from ivdr_deploy.video import BytesSource, VideoLimits
DecodePool().submit(test_pool.hold_the_interpreter, BytesSource(b"x"), limits=VideoLimits()).result()
"""


@pytest.mark.parametrize("state", ["clips 2", "hanging"])
def test_workers_end_with_the_process_that_started_them(video: Path, tmp_path: Path, state: str) -> None:
    script = tmp_path / "plain.py"
    waiting = SCRIPT.replace("sys.argv[1]", "__import__('pathlib').Path(sys.argv[1])")
    script.write_text(HANGING if state == "hanging" else waiting)
    command = [sys.executable, str(script), str(video), "wait"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{state}\n"
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) >= 2
        os.kill(process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(started, timeout=20)
        assert not alive


def test_files_of_a_killed_process_are_removed_by_the_next_one_and_no_others(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ivdr_deploy.decoding._worker._SHARED_MEMORY", tmp_path / "absent")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / "ivdr-decode-left"
    left.mkdir()
    (left / "0.in").write_bytes(b"video")
    with DecodePool(PROCESS) as first, DecodePool(PROCESS) as second:
        load(first, PathSource(video)).result(30)
        assert not left.exists()
        (folder,) = tmp_path.glob("ivdr-decode-*")
        load(second, PathSource(video)).result(30)
        assert folder.exists()
        assert load(first, BytesSource(video.read_bytes())).exception(30) is None


@pytest.mark.parametrize("name", ["workers", "memory_bytes"])
def test_options_are_checked(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        DecodeOptions(**{name: 0})


@pytest.mark.parametrize("depth", [90, 200])
def test_a_deep_temporary_folder_is_no_obstacle(tmp_path: Path, depth: int) -> None:
    """The worker of a server has its temporary folder in the run folder, and a socket's path may have 107 bytes."""
    video = numbered_video(tmp_path / "a.mp4", num_frames=20, size=(64, 48))
    deep = tmp_path / "d"
    deep /= "x" * (depth - len(os.fsencode(deep)) - 1)
    deep.mkdir(parents=True)
    code = (
        "import multiprocessing\n"
        "from pathlib import Path\n"
        "from ivdr_deploy.decoding import DecodePool\n"
        "from ivdr_deploy.spec import ClipSpec, ViewPlan\n"
        "from ivdr_deploy.video import PathSource, VideoLimits, load_clips\n"
        "spec = ClipSpec(num_frames=4, frame_stride=2, short_side=36, crop_size=32)\n"
        "with DecodePool() as pool:\n"
        f"    source, plan = PathSource(Path({str(video)!r})), ViewPlan(num_clips=1)\n"
        "    job = pool.submit(load_clips, source, spec, plan, limits=VideoLimits())\n"
        "    print(job.result().video.shape)\n"
        "print(multiprocessing.process.current_process()._config['tempdir'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(deep)},
        capture_output=True,
        text=True,
        check=True,
    )
    shape, sockets = done.stdout.splitlines()
    assert shape == "(1, 4, 32, 32, 3)"
    assert not Path(sockets).exists()
    assert not list(deep.iterdir())


def test_a_pool_that_cannot_start_its_threads_says_so_and_works_later(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with DecodePool(PROCESS) as decoding:
        with monkeypatch.context() as short:
            short.setattr(threading.Thread, "start", refuse)
            with pytest.raises(ResourceError, match="decode workers"):
                load(decoding, PathSource(video))
        assert load(decoding, PathSource(video)).result(30).video.any()
