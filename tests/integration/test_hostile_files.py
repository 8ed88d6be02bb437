"""Small files made to do harm cost little, whoever reads them: predict, score and endpoint share the decode pool."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hostile_mp4 import compressed, fragmented, movie, track
from requirements import missing
from videos import numbered_video

from ivdr_deploy.decoding import DecodePool
from ivdr_deploy.errors import VideoError, VideoLimitError, VideoOpenError
from ivdr_deploy.spec import ClipSpec, ViewPlan
from ivdr_deploy.video import BytesSource, PathSource, Source, VideoLimits, load_clips

CLIP = ClipSpec(num_frames=8, short_side=36, crop_size=32)
MORE_BYTES = 300 << 20
MORE_SECONDS = 2.0

MADE = {
    "samples": movie(track(samples=20_000_000, size=1)),
    "samples below the limit": movie(track(samples=249_999, size=1)),
    "sound below the limit": movie(track(), track(handler=b"soun", samples=4_000_000, size=1, tick=2)),
    "edits": movie(track(samples=10_000, size=1, tick=1, edits=[(1, 9_999)] * 10_000)),
    "edits below the limit": movie(track(samples=200_000, size=1, tick=1, edits=[(200_000, 0)] * 20)),
    "tracks below the limit": movie(*[track(samples=200_000, size=1)] * 20),
    "fragment below the limit": fragmented(4_000_000),
    "header that unpacks": compressed(track(), padding=1 << 26),
}


def cost(source: Source, *, limits: VideoLimits) -> tuple[int, float, VideoError | None]:
    """Read a video in a worker; returns the largest memory of its process, its processor time, and the error."""
    begin, error = time.process_time(), None
    try:
        load_clips(source, CLIP, ViewPlan(num_clips=2), limits=limits)
    except VideoError as found:
        error = found
    seconds = time.process_time() - begin
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10, seconds, error


def cost_of(source: Source) -> tuple[int, float, VideoError | None]:
    with DecodePool() as pool:
        return pool.submit(cost, source, limits=VideoLimits()).result(60)


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, float]:
    path = numbered_video(tmp_path_factory.mktemp("ordinary") / "a.mp4", num_frames=40)
    memory, seconds, error = cost_of(PathSource(path))
    assert error is None
    return memory, seconds


@pytest.mark.parametrize("name", MADE)
def test_made_files_cost_little(name: str, ordinary: tuple[int, float]) -> None:
    memory, seconds, error = cost_of(BytesSource(MADE[name]))
    assert memory < ordinary[0] + MORE_BYTES
    assert seconds < ordinary[1] + MORE_SECONDS
    assert isinstance(error, VideoError) or "sound" in name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mp4_index_20M.mp4", VideoLimitError),
        ("png16k_rgba64_lied.avi", VideoLimitError),
        ("mp4_dref_url.mp4", VideoOpenError),
        ("m3u8.mp4", VideoOpenError),
    ],
)
def test_shared_files_cost_little(
    name: str, expected: type[VideoError], ordinary: tuple[int, float], shared_data: Path
) -> None:
    path = shared_data / "hostile" / name
    if not path.is_file():
        missing("data", f"{path} is absent")
    memory, seconds, error = cost_of(PathSource(path))
    assert memory < ordinary[0] + MORE_BYTES
    assert seconds < ordinary[1] + MORE_SECONDS
    assert isinstance(error, expected)
