"""The OpenCV reader where it differs from PyAV's; ``test_decode.py`` has what both promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from videos import frame_number, numbered_frame, numbered_video, write_video

from ivdr_deploy.errors import ConfigError, MissingDependencyError, VideoDecodeError, VideoOpenError
from ivdr_deploy.video._opencv import _resize_rows
from ivdr_deploy.video.decode import open_video
from ivdr_deploy.video.preprocess import resize_frame

WITHOUT_PYAV = """
import sys

sys.modules["av"] = None
import numpy as np

from ivdr_deploy.spec import ClipSpec, ViewPlan
from ivdr_deploy.video import VideoLimits, load_clips, open_video

path, out = sys.argv[1:]
with open_video(path, decoder="opencv") as reader:
    frames = reader.read(range(reader.info.num_frames), size=(48, 64))
spec = ClipSpec(num_frames=4, frame_stride=2, short_side=48, crop_size=48)
clips = load_clips(path, spec, ViewPlan(), decoder="opencv").video
refused = []
for limits in ({"max_pixels": 100}, {"max_frames": 5}, {"max_seconds": 0.1}, {"max_decode_seconds": 1e-9}):
    try:
        open_video(path, decoder="opencv", limits=VideoLimits(**limits))
    except Exception as error:
        refused.append(type(error).__name__)
np.savez(out, frames=frames, clips=clips, refused=refused)
"""


def test_it_reads_and_keeps_the_limits_where_pyav_cannot_be_imported(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=30)
    out = tmp_path / "out.npz"
    subprocess.run([sys.executable, "-c", WITHOUT_PYAV, str(path), str(out)], check=True)
    with np.load(out) as found:
        assert [frame_number(rgb) for rgb in found["frames"]] == list(range(30))
        assert found["clips"].shape[1:] == (4, 48, 48, 3)
        assert found["refused"].tolist() == ["VideoLimitError"] * 3 + ["VideoTimeoutError"]


def test_an_absent_opencv_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=3)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingDependencyError, match="opencv"):
        open_video(path, decoder="opencv")


def test_bytes_are_refused(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=3)
    with pytest.raises(ConfigError, match="by path"):
        open_video(path.read_bytes(), decoder="opencv")


def test_interlaced_video_is_refused_whatever_lies_in_memory(tmp_path: Path) -> None:
    size = (320, 240)
    progressive = numbered_video(tmp_path / "p.mp4", num_frames=5, size=size)
    frames = [numbered_frame(k, size=size) for k in range(5)]
    options = {"x264-params": "tff=1", "flags": "+ildct"}
    flagged = write_video(tmp_path / "i.mp4", frames, bframes=0, options=options)
    for _ in range(4):  # from the second round on, OpenCV's unwritten picture shows what was freed before
        with open_video(progressive, decoder="opencv") as reader:
            assert [frame_number(rgb) for rgb in reader.read(range(5))] == list(range(5))
        with pytest.raises(VideoDecodeError, match="interlaced"):
            open_video(flagged, decoder="opencv")
    with open_video(flagged) as reader:
        assert [frame_number(rgb) for rgb in reader.read(range(5))] == list(range(5))


def test_a_video_that_stands_still_at_first_is_read(tmp_path: Path) -> None:
    frames = [numbered_frame(max(0, k - 10), size=(96, 64)) for k in range(20)]
    path = write_video(tmp_path / "a.avi", frames, codec="ffv1", bframes=0)
    with open_video(path, decoder="opencv") as reader:
        assert [frame_number(rgb) for rgb in reader.read(range(20))] == [max(0, k - 10) for k in range(20)]


def test_one_frame_is_read_unless_it_is_black(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [numbered_frame(9, size=(96, 64))], bframes=0)
    with open_video(path, decoder="opencv") as reader:
        assert frame_number(reader.read([0])[0]) == 9
    black = write_video(tmp_path / "b.mp4", [np.zeros((64, 96, 3), np.uint8)], bframes=0)
    with pytest.raises(VideoDecodeError, match="interlaced"):
        open_video(black, decoder="opencv")


def test_a_name_that_is_not_utf8_is_refused_and_does_not_crash(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.mp4", num_frames=3)
    target = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))
    path.rename(target)
    with pytest.raises(VideoOpenError, match="not UTF-8") as caught:
        open_video(target, decoder="opencv")
    str(caught.value).encode()


def test_a_file_without_pictures_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux([*stream.encode(sound), *stream.encode(None)])
    with pytest.raises(VideoOpenError, match="no pictures"):
        open_video(path, decoder="opencv")


@pytest.mark.parametrize("size", [(48, 64), (33, 44), (90, 120), (128, 171), (180, 61)])
def test_the_resize_is_near_that_of_the_contract(size: tuple[int, int]) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (18, 24, 3), np.uint8)
    picture = np.ascontiguousarray(coarse.repeat(5, axis=0).repeat(5, axis=1))
    expected = resize_frame(av.VideoFrame.from_ndarray(picture, format="rgb24"), size).astype(int)
    rows = _resize_rows(picture.astype(np.float32), size[0])
    found = _resize_rows(rows.transpose(1, 0, 2), size[1]).transpose(1, 0, 2)
    assert np.abs(found - expected).mean() < 2.0
    assert np.abs(found - expected).max() < 20
