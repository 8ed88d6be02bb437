"""What the tests of the decode pool and of its processes share: a contract, jobs, and a look at the workers."""

from __future__ import annotations

import time
from concurrent.futures import Future
from contextlib import suppress

import psutil

from ivdr_deploy.decoding import DecodeOptions, DecodePool
from ivdr_deploy.spec import ClipSpec, ViewPlan
from ivdr_deploy.video import Clips, Source, VideoLimits, load_clips

CLIP = ClipSpec(num_frames=4, frame_stride=2, short_side=36, crop_size=32)
PLAN = ViewPlan(num_clips=2)
LIMITS = VideoLimits(max_decode_seconds=20)
PROCESS, THREAD = DecodeOptions(isolation="process"), DecodeOptions(isolation="thread")

_of_others: set[psutil.Process] = set()


def load(decoding: DecodePool, source: Source, *, limits: VideoLimits = LIMITS) -> Future[Clips]:
    return decoding.submit(load_clips, source, CLIP, PLAN, limits=limits)


def number_of(source: Source, number: int, *, limits: VideoLimits) -> int:
    """A job; one in ten lasts a little."""
    if number % 10 == 0:
        time.sleep(0.02)
    return number


def forget_workers() -> None:
    """Note whose workers there are already: of pools that another test has left to the collector of garbage."""
    _of_others.clear()
    _of_others.update(decode_workers())


def decode_workers() -> list[psutil.Process]:
    """The worker processes that a test has started."""
    found: list[psutil.Process] = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it has ended just now
            if "forkserver" in " ".join(child.cmdline()):
                found += child.children()
    return [worker for worker in found if worker not in _of_others]
