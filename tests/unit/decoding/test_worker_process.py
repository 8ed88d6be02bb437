"""Decode worker processes: what they may take, how they end, and what that costs whom."""

import errno
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
from decode_jobs import LIMITS, PROCESS, decode_workers, load, number_of
from hostile_sources import EatsMemory, Hangs, memory_left, page_faults
from served import wait_for

from ivdr_deploy.decoding import DecodeOptions, DecodePool, _process
from ivdr_deploy.errors import (
    ResourceError,
    VideoCrashError,
    VideoLimitError,
)
from ivdr_deploy.video import PathSource, Source, VideoLimits


def test_memory_counts_beyond_what_a_worker_starts_with(video: Path) -> None:
    with DecodePool(DecodeOptions(memory_bytes=64 << 20)) as decoding:
        assert len(load(decoding, PathSource(video)).result(30).video) == 2
        with pytest.raises(VideoLimitError, match="more memory than the 64 MiB allowed"):
            load(decoding, EatsMemory()).result(30)


def takes(source: Source, mebibytes: int, *, limits: VideoLimits) -> int:
    return len(bytes(mebibytes << 20)) >> 20


@pytest.mark.skipif(sys.platform != "linux", reason="memory is not limited elsewhere")
def test_a_worker_has_as_much_memory_as_was_allowed_and_no_more(video: Path) -> None:
    with DecodePool(DecodeOptions(memory_bytes=256 << 20)) as decoding:
        assert decoding.submit(takes, PathSource(video), 192, limits=LIMITS).result(30) == 192
        with pytest.raises(VideoLimitError, match="more memory than the 256 MiB allowed"):
            decoding.submit(takes, PathSource(video), 288, limits=LIMITS).result(30)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back as glibc is told to")
def test_a_worker_keeps_the_memory_of_ordinary_frames_for_the_next_video(video: Path) -> None:
    with DecodePool(PROCESS) as decoding:
        first, *_, last = (
            decoding.submit(page_faults, PathSource(video), limits=LIMITS).result(30) for _ in range(4)
        )
    assert first > 500  # 4 MB in pages of 4 KiB
    assert last < first / 10


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_a_worker_gives_back_what_one_video_took_and_others_do_not(video: Path) -> None:
    with DecodePool(PROCESS) as decoding:
        before, most, after = (
            decoding.submit(memory_left, PathSource(video), limits=LIMITS, pictures=pictures).result(30)
            for pictures in (1, 100, 1)
        )
    assert most - before > 50 << 20, "nothing is given back in the middle of a job"
    assert after - before < 16 << 20  # of 72 MB


class OddError(Exception):
    """Cannot be read by another process: its class wants more than it keeps."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def raises_oddly(source: Source, *, limits: VideoLimits) -> None:
    raise OddError("what it says\nand more", "two")


def gives_what_stays(source: Source, *, limits: VideoLimits) -> object:
    return threading.Lock()


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (raises_oddly, r"RuntimeError while decoding \(OddError: what it says\)"),
        (gives_what_stays, r"TypeError while decoding \(cannot pickle '_thread.lock' object\)"),
    ],
    ids=["error", "result"],
)
def test_what_does_not_travel_is_an_error_of_its_video_that_says_what_it_was(
    video: Path, job: Callable[..., object], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with DecodePool(PROCESS) as decoding:
        with pytest.raises(VideoCrashError, match=said):
            decoding.submit(job, PathSource(video), limits=LIMITS).result(30)
        (worker,) = decode_workers()
        assert len(load(decoding, PathSource(video)).result(30).video) == 2
        assert decode_workers() == [worker], "it need not be replaced"
    assert "in _run" in caplog.text, "where it happened"


def leaves(source: Source, *, limits: VideoLimits) -> NoReturn:
    sys.exit(3)


def test_a_process_that_ends_by_itself_is_told_with_its_exit_code(video: Path) -> None:
    with DecodePool(PROCESS) as decoding, pytest.raises(VideoCrashError, match="ended with exit code 3"):
        decoding.submit(leaves, PathSource(video), limits=LIMITS).result(30)


def test_what_interrupts_the_terminal_is_not_for_the_workers(video: Path) -> None:
    with DecodePool(PROCESS) as decoding:
        load(decoding, PathSource(video)).result(30)
        (worker,) = decode_workers()
        worker.send_signal(signal.SIGINT)
        assert len(load(decoding, PathSource(video)).result(30).video) == 2
        assert decode_workers() == [worker]


def test_an_idle_worker_that_was_killed_is_replaced(video: Path) -> None:
    with DecodePool(PROCESS) as decoding:
        load(decoding, PathSource(video)).result(30)
        for worker in decode_workers():
            worker.send_signal(signal.SIGKILL)
            worker.wait(10)
        assert len(load(decoding, PathSource(video)).result(30).video) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells whether a job was taken")
def test_a_job_that_lies_before_an_idle_worker_when_it_is_killed_is_done_all_the_same(video: Path) -> None:
    with DecodePool(PROCESS) as decoding:
        load(decoding, PathSource(video)).result(30)
        (idle,) = decode_workers()
        idle.suspend()
        wait_for(lambda: idle.status() == psutil.STATUS_STOPPED)
        lying = load(decoding, PathSource(video))
        with pytest.raises(TimeoutError):
            lying.result(0.3)
        idle.kill()
        assert len(lying.result(30).video) == 2


def test_a_job_that_one_worker_after_the_other_does_not_take_says_so(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DecodePool(PROCESS) as decoding:
        with monkeypatch.context() as ending:
            ending.setattr(_process, "serve", ends_at_once)
            with pytest.raises(
                ResourceError, match=r"a\.mp4 was taken by none of 3 .*ended with exit code 7"
            ):
                load(decoding, PathSource(video)).result(60)
        assert len(load(decoding, PathSource(video)).result(30).video) == 2


def test_where_there_are_no_more_descriptors_no_video_is_to_blame_and_nothing_stays_open(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DecodePool(PROCESS) as decoding:
        load(decoding, PathSource(video)).result(30)
        before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
        with monkeypatch.context() as refusing:
            decode_workers()[0].kill()
            refusing.setattr("multiprocessing.forkserver.connect_to_new_process", no_descriptors)
            with pytest.raises(ResourceError, match=r"in a row .*Too many open files"):
                load(decoding, PathSource(video)).result(30)
        if sys.platform == "linux":
            assert len(os.listdir("/proc/self/fd")) < before
        assert len(load(decoding, PathSource(video)).result(30).video) == 2


def test_a_pool_that_gets_no_pipe_leaves_no_folder(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ivdr_deploy.decoding._worker._SHARED_MEMORY", tmp_path / "absent")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with DecodePool(PROCESS) as decoding:
        with monkeypatch.context() as refusing:
            refusing.setattr("os.pipe", no_pipe)
            with pytest.raises(OSError, match="Too many open files"):
                load(decoding, PathSource(video))
        assert not list(tmp_path.iterdir())
        assert len(load(decoding, PathSource(video)).result(30).video) == 2


def no_pipe() -> NoReturn:
    no_descriptors(())


def no_descriptors(numbers: object) -> NoReturn:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_each_worker_that_is_killed_costs_one_job_at_most_and_nobody_waits_for_it(video: Path) -> None:
    """Whatever it was doing: taking a job, doing it, sending what it gives, or nothing."""
    drawn = random.Random(3)
    kills, waits, failures = 0, [0.0], 0
    done = threading.Event()
    with DecodePool(DecodeOptions(workers=2)) as decoding:

        def kill() -> None:
            nonlocal kills
            while not done.wait(drawn.uniform(0.01, 0.1)):
                if workers := decode_workers():
                    with suppress(psutil.NoSuchProcess):
                        drawn.choice(workers).kill()
                        kills += 1

        decoding.submit(number_of, PathSource(video), 0, limits=LIMITS).result(30)
        with ThreadPoolExecutor(1) as killing:
            killer = killing.submit(kill)
            try:
                while kills < 60 and not killer.done():
                    begun = time.monotonic()
                    jobs = [
                        decoding.submit(number_of, PathSource(video), number, limits=LIMITS)
                        for number in range(20)
                    ]
                    for number, job in enumerate(jobs):
                        try:
                            assert job.result(60) == number
                        except (VideoCrashError, ResourceError):
                            failures += 1
                    waits.append(time.monotonic() - begun)
            finally:
                done.set()
        killer.result()
    assert 0 < failures <= kills
    assert max(waits) < 10.0  # of 20 jobs that take no time, on a busy machine


def ends_at_once(*given: object) -> NoReturn:
    """What a worker process runs in place of ``serve``."""
    os._exit(7)


def test_closing_ends_the_workers_at_once_and_what_still_waits(video: Path) -> None:
    for _ in range(5):
        begun = time.monotonic()
        with DecodePool(DecodeOptions(workers=2)) as decoding:
            jobs = [load(decoding, source) for source in (Hangs(), Hangs(), PathSource(video), Hangs())]
            wait_for(lambda: len(decode_workers()) == 2)
            workers = decode_workers()
        assert time.monotonic() - begun < LIMITS.max_decode_seconds
        assert all(job.done() for job in jobs)
        assert {type(job.exception()) for job in jobs} == {CancelledError}
        assert not any(worker.is_running() for worker in workers)
