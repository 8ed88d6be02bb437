"""Small files that cost much to decode end at a limit, and soon, asked about in either way."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from damage import damaged_bytes
from hostile_mp4 import movie, png, track
from videos import numbered_video

from ivdr_deploy.decoding.pool import GRACE_SECONDS
from ivdr_deploy.serving.core.service import InferenceService
from ivdr_deploy.serving.core.settings import ENDPOINT_LIMITS, ServiceSettings

LIMIT_SECONDS = 1.0
MORE_SECONDS = 2.0
"""Of a processor: on a machine that is busy a decoder, which gives way to others, may get little of one."""

MOST_SECONDS = LIMIT_SECONDS + GRACE_SECONDS + 10.0
"""On the clock. What hangs without computing is killed before."""

SETTINGS = ServiceSettings(
    decode_workers=1,
    timeline_seconds=LIMIT_SECONDS,
    limits=replace(ENDPOINT_LIMITS, max_frames=3000, max_decode_seconds=LIMIT_SECONDS),
)


def one_picture(side: int, *, frames: int) -> bytes:
    """Frames that are all the same large picture, and share its bytes."""
    picture = png(side, side)
    size = len(picture)
    return movie(track(samples=frames, size=size, per_chunk=1, chunks=frames), media=picture)


def far_apart(folder: Path) -> bytes:
    return numbered_video(folder / "far.mkv", num_frames=3, pts_ms=[0, 40, 10**9], bframes=0).read_bytes()


def many(folder: Path) -> bytes:
    return numbered_video(folder / "many.mp4", num_frames=3001, size=(16, 16), gop=300).read_bytes()


def many_to_be_counted(folder: Path) -> bytes:
    path = folder / "many.avi"
    return numbered_video(path, num_frames=3001, size=(16, 16), gop=300, codec="mpeg4").read_bytes()


BOMBS: dict[str, tuple[Callable[[Path], bytes], set[int]]] = {
    "huge frames": (lambda _: one_picture(5000, frames=10), {413}),
    "large frames without end": (lambda _: one_picture(3000, frames=2900), {504}),
    "a huge duration": (far_apart, {413}),
    "more frames than are allowed": (many, {413}),
    "more frames, which must be decoded to be counted": (many_to_be_counted, {413, 504}),
    "more frames than are there": (lambda _: movie(track(samples=2900, size=1)), {422}),
    "thousands of streams": (lambda _: movie(*[track()] * 3000), {400, 413}),
}


def processor_seconds() -> float:
    """What the decoders have used, those that are gone included."""
    return sum(sum(child.cpu_times()[:4]) for child in psutil.Process().children(recursive=True))


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_ends_at_a_limit_within_two_seconds(
    service: InferenceService, tmp_path: Path, name: str
) -> None:
    make, expected = BOMBS[name]
    bomb = make(tmp_path)
    assert len(bomb) < 3_000_000
    limited = InferenceService(service.model, SETTINGS)
    good = numbered_video(tmp_path / "good.mp4", num_frames=12, size=(64, 48)).read_bytes()
    assert limited.submit({"body": good}).result(60).status == 200  # the worker is up
    for options in ({}, {"timeline": True}):
        start, used = time.monotonic(), processor_seconds()
        answer = limited.submit({"video": bomb, "options": options}).result(60)
        seconds, used = time.monotonic() - start, processor_seconds() - used
        assert answer.status in expected, answer.body
        assert answer.body["code"] != "crashed"
        assert used < LIMIT_SECONDS + MORE_SECONDS + (LIMIT_SECONDS if options else 0.0)
        assert seconds < MOST_SECONDS
    assert limited.submit({"body": good}).result(60).status == 200
    limited._predictor.close()


@pytest.mark.parametrize("count", [40, pytest.param(150, marks=pytest.mark.exhaustive)])
def test_damaged_videos_are_looked_through_or_refused_by_name(
    service: InferenceService, tmp_path: Path, count: int
) -> None:
    """The whole of each is decoded, not a few clips, so that damage is met wherever it is."""
    kinds = {"a.mp4": "libx264", "b.avi": "mpeg4", "c.webm": "libvpx", "d.mkv": "libx264"}
    originals = [
        numbered_video(tmp_path / name, num_frames=25, size=(64, 48), codec=codec).read_bytes()
        for name, codec in kinds.items()
    ]
    said: Counter[tuple[int, str]] = Counter()
    for seed in range(count):
        original = originals[seed % len(originals)]
        mutant = damaged_bytes(original, seed, within=min(2048, len(original)))
        answer = service.submit({"body": mutant, "timeline": True}).result(60)
        said[answer.status, answer.body.get("code", "ok")] += 1
    known = {
        (200, "ok"),
        (400, "unreadable"),
        (400, "bad_request"),
        (413, "too_large"),
        (415, "no_video_stream"),
    }
    assert set(said) <= {*known, (422, "decode_failed")}, said
    assert said[200, "ok"] > count / 20
    assert count - said[200, "ok"] > count / 20
