"""How PyAV is asked to open a file: by one set of arguments for each of its versions."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import av
import pytest
from videos import numbered_video

from ivdr_deploy.video import VideoLimits
from ivdr_deploy.video._frame_table import build_table
from ivdr_deploy.video._packets import PacketSource, open_arguments
from ivdr_deploy.video._source import Budget, CheckedSource, check_source


def source(data: Path | bytes) -> CheckedSource:
    return CheckedSource(data=data, name="a", size_bytes=1, container="mov")


@pytest.mark.parametrize(
    ("version", "expected"), [("18.0.0", True), ("18.1.0", True), ("19.0.2", False), ("20.1.0rc1", False)]
)
def test_the_argument_that_pyav_19_dropped_is_given_to_older_ones_only(version: str, expected: bool) -> None:
    arguments = open_arguments(source(Path("/a.mp4")), max_pixels=1, pyav_version=version)
    assert ("metadata_errors" in arguments) is expected


def test_nothing_but_the_file_may_be_opened() -> None:
    arguments = open_arguments(source(Path("/a.mp4")), max_pixels=1)
    assert (arguments["file"], arguments["format"]) == ("/a.mp4", "mov")
    assert arguments["options"]["protocol_whitelist"] == "file"
    arguments = open_arguments(source(b"bytes"), max_pixels=1)
    assert isinstance(arguments["file"], io.BytesIO)
    assert arguments["options"]["protocol_whitelist"] == ""


def test_the_installed_pyav_takes_them(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=3)
    for data in (path, path.read_bytes()):
        with av.open(**open_arguments(source(data), max_pixels=1 << 20)) as container:
            assert len(list(container.decode(video=0))) == 3


def test_a_seek_that_ends_behind_the_place_that_is_wanted_does_not_count(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=40, gop=10, bframes=0)
    limits = VideoLimits()
    checked = check_source(path, limits)
    budget = Budget(checked.name, limits)
    packets = PacketSource(checked, budget)
    table = build_table(checked, packets, budget)
    assert table is not None
    last = table.entries[-1]
    for order in (last.order - 1, last.order, last.order + 1):
        found = [place for place, _ in packets.packets_from(last.seek_time, order, table.order_at)]
        assert found == list(range(order, 41))  # the last one is empty: it drains the decoder
    packets.close()


GROWTH = """
import gc, sys
from pathlib import Path
from ivdr_deploy._memory import give_back_freed_memory, resident_bytes
from ivdr_deploy.video import open_video

def read(times):
    for _ in range(times):
        with open_video(data) as reader:
            next(iter(reader.frames([1])))
    gc.collect()
    give_back_freed_memory()
    return resident_bytes()

data = Path(sys.argv[1]).read_bytes()
before = read(500)
print(read(2000) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")
@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx"), ("a.avi", "mpeg4"), ("a.ts", "libx264")]
)
def test_reading_leaves_nothing_behind(tmp_path: Path, name: str, codec: str) -> None:
    """A decode worker reads videos for as long as its server runs; 0.8 to 2 KB were lost with each."""
    path = numbered_video(tmp_path / name, num_frames=6, size=(64, 48), codec=codec)
    done = subprocess.run([sys.executable, "-c", GROWTH, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300 * 2000
