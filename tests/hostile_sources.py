"""Sources that do harm to whoever reads them: they kill, hang or flood the process that decodes them.

They stand for files that do so. A worker process imports this module by its name, so it must stay importable.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ivdr_deploy.datasets.lists import VideoItem, VideoList
from ivdr_deploy.video.source import Source, SourceIdentity


@dataclass(frozen=True)
class _Hostile(Source):
    uri: str = "hostile"

    def local(self) -> Path | bytes:
        raise NotImplementedError

    def open(self) -> BinaryIO:
        raise NotImplementedError

    def identity(self) -> SourceIdentity:
        return SourceIdentity(1, None)


@dataclass(frozen=True)
class KillsItsProcess(_Hostile):
    """SIGKILL, as from the system when memory runs out."""

    def local(self) -> Path | bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


@dataclass(frozen=True)
class Hangs(_Hostile):
    """Never comes back."""

    def local(self) -> Path | bytes:
        threading.Event().wait()
        raise AssertionError


@dataclass(frozen=True)
class EatsMemory(_Hostile):
    """Takes 8 GiB, touched or not."""

    def local(self) -> Path | bytes:
        return bytes(8 << 30)


@dataclass(frozen=True)
class Surprises(_Hostile):
    """Fails as nobody foresaw."""

    def local(self) -> Path | bytes:
        raise ZeroDivisionError("integer division " + "x" * 500)


@dataclass(frozen=True)
class KillsTheScorer(_Hostile):
    """Ends the process that has the decode workers, as a video does on which the engine crashes.

    A signal that stops it is what an engine does that never comes back.
    """

    number: int = signal.SIGKILL
    counter: Path | None = None
    """File with a byte for every attempt."""

    spared: tuple[int, ...] = ()
    """Attempts, counted from 1, in which it does no harm."""

    good: Path | None = None
    """What it is then."""

    def local(self) -> Path | bytes:
        if self.counter is not None:
            with self.counter.open("ab") as stream:
                stream.write(b".")
            if self.counter.stat().st_size in self.spared:
                assert self.good is not None
                return self.good
        parent = multiprocessing.parent_process()
        assert parent is not None
        os.kill(parent.pid, self.number)
        threading.Event().wait()
        raise AssertionError


def page_faults(source: Source, *, limits: object) -> int:
    """Do what a decoder does with the pictures of a small video; return the pages of memory that this took anew."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pictures = [bytes(200_000) for _ in range(20)]
    del pictures
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


_kept: list[bytes] = []


def memory_left(source: Source, *, limits: object, pictures: int) -> int:
    """Do what a decoder does with pictures of 800x600; return the resident bytes of the process when they are freed.

    What is kept of them lies behind them.
    """
    held = [bytes(b"x" * 720_000) for _ in range(pictures)]
    _kept.append(bytes(b"x" * 200_000))
    del held
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@dataclass(frozen=True)
class SaysWhoDecodes(_Hostile):
    """A good video; a line in a file tells which process has the decode worker, and which video it was."""

    log: Path = Path()
    good: Path = Path()

    def local(self) -> Path | bytes:
        parent = multiprocessing.parent_process()
        assert parent is not None
        with self.log.open("a") as stream:
            stream.write(f"{parent.pid} {self.good.name}\n")
        return self.good


@dataclass(frozen=True, slots=True)
class HostileItem(VideoItem):
    """An entry whose file does harm to whoever decodes it."""

    hostile: Source = field(kw_only=True)

    @property
    def source(self) -> Source:
        return self.hostile


def with_hostile(videos: VideoList, place: int, hostile: Source) -> VideoList:
    """Return the list with another file at one place."""
    item = videos.items[place]
    items = [*videos.items]
    items[place] = HostileItem(item.path, item.label, item.uri, hostile=hostile)
    return VideoList(videos.source, tuple(items))
