from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from decode_jobs import CLIP, LIMITS, PROCESS, THREAD
from hostile_sources import EatsMemory, Hangs, KillsItsProcess
from videos import numbered_video

from ivdr_deploy.decoding import DecodeOptions, DecodeStream, pool
from ivdr_deploy.decoding import stream as module
from ivdr_deploy.errors import VideoCrashError, VideoLimitError, VideoOpenError, VideoTimeoutError
from ivdr_deploy.video import BytesSource, PathSource, Source, VideoLimits
from ivdr_deploy.video.windows import Windows, read_windows


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered_video(tmp_path_factory.mktemp("videos") / "a.mp4", num_frames=60)


def windows_of(source: Source, options: DecodeOptions, *, most: int = 4) -> DecodeStream[Windows]:
    return DecodeStream(
        read_windows, source, spec=CLIP, hop=4, most=most, limits=LIMITS, decoder="pyav", options=options
    )


@pytest.mark.parametrize("options", [PROCESS, THREAD], ids=["process", "thread"])
def test_gives_what_reading_here_gives_and_leaves_nothing(video: Path, options: DecodeOptions) -> None:
    expected = list(read_windows(video, CLIP, hop=4, most=4, limits=LIMITS))
    for source in (PathSource(video), BytesSource(video.read_bytes())):
        with windows_of(source, options) as stream:
            found = list(stream)
            assert list(stream) == []
        assert len(found) == len(expected) == 4
        for got, wanted in zip(found, expected, strict=True):
            assert np.array_equal(got.video, wanted.video)
            assert np.array_equal(got.seconds, wanted.seconds)
            assert (got.info, got.total) == (wanted.info, wanted.total)
    assert not module._open


def test_one_worker_keeps_the_video_however_many_there_may_be(video: Path) -> None:
    with windows_of(PathSource(video), replace(PROCESS, workers=3)) as stream:
        assert len(list(stream)) == 4
        assert stream._pool.options.workers == 1


@pytest.mark.parametrize("options", [PROCESS, THREAD], ids=["process", "thread"])
def test_a_bad_video_is_the_error_of_its_first_piece(options: DecodeOptions) -> None:
    with windows_of(BytesSource(b"no video"), options) as stream, pytest.raises(VideoOpenError):
        next(stream)


def third_is(
    source: Source, *, limits: VideoLimits, bad: Source | None = None, lines: Path | None = None
) -> Iterator[int]:
    """Count; where the third piece should come, do what a bad file does."""
    for number in range(100):
        if number == 2 and bad is not None:
            bad.local()
        if lines is not None:
            with lines.open("a") as file:
                file.write(f"{os.getpid()}\n")
        yield number


@pytest.mark.parametrize(
    ("bad", "expected"),
    [(KillsItsProcess(), VideoCrashError), (Hangs(), VideoTimeoutError), (EatsMemory(), VideoLimitError)],
    ids=["killed", "hangs", "memory"],
)
def test_a_piece_that_does_harm_ends_its_stream_within_the_deadline(
    video: Path, monkeypatch: pytest.MonkeyPatch, bad: Source, expected: type[Exception]
) -> None:
    monkeypatch.setattr(pool, "GRACE_SECONDS", 0.2)
    # On a busy machine the pieces before take their time too.
    limits = VideoLimits(max_decode_seconds=2.8) if expected is VideoTimeoutError else LIMITS
    start = time.monotonic()
    with DecodeStream(third_is, PathSource(video), limits=limits, options=PROCESS, bad=bad) as stream:
        assert [next(stream), next(stream)] == [0, 1]
        with pytest.raises(expected):
            next(stream)
    assert time.monotonic() - start < 3 * 3.0 + 10.0  # `LIMITS` would take 20 s


def test_a_worker_that_is_killed_between_two_pieces_is_noticed(video: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    with DecodeStream(third_is, PathSource(video), limits=LIMITS, options=PROCESS, lines=lines) as stream:
        assert next(stream) == 0
        wait_for_lines(lines, 2)  # the one ahead
        process = psutil.Process(int(lines.read_text().split()[0]))
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        found: list[Any] = []
        with pytest.raises(VideoCrashError, match="was ended"):
            found.extend(stream)
    assert len(found) <= 1


@pytest.mark.parametrize("options", [PROCESS, THREAD], ids=["process", "thread"])
def test_it_is_one_piece_ahead_and_no_more_and_ends_when_closed(
    video: Path, tmp_path: Path, options: DecodeOptions
) -> None:
    lines = tmp_path / "lines"
    before = set(threading.enumerate())
    with DecodeStream(third_is, PathSource(video), limits=LIMITS, options=options, lines=lines) as stream:
        assert [next(stream), next(stream)] == [0, 1]
        wait_for_lines(lines, 3)
        worker = int(lines.read_text().split()[0])
        for _ in range(20):  # nothing else would come, however long one looks
            time.sleep(0.01)
            assert len(lines.read_text().split()) == 3
    assert len(lines.read_text().split()) == 3
    if options is PROCESS:
        assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE
    assert set(threading.enumerate()) <= before


def wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + 20
    while not path.exists() or len(path.read_text().split()) < count:
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
