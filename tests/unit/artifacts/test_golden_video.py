"""Golden videos: a sound decoder is within the tolerance, every fault that was thought of is beyond it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from ivdr_deploy.artifacts import golden_video
from ivdr_deploy.artifacts.golden import GOLDEN_PLAN
from ivdr_deploy.artifacts.golden_video import (
    DECODE_TOLERANCE,
    GOLDEN_FPS,
    GOLDEN_FRAMES,
    compare_clips,
    golden_frame,
    make_golden_videos,
)
from ivdr_deploy.errors import ClipShapeError, ExportError
from ivdr_deploy.spec import ClipSpec, DecoderName
from ivdr_deploy.video import load_clips, open_video
from ivdr_deploy.video._pyav import PyAvReader

SPECS = [
    ClipSpec(),
    ClipSpec(num_frames=8, frame_stride=2, short_side=72, crop_size=64),
    ClipSpec(num_frames=32, frame_stride=2, short_side=256, crop_size=224),
]
NAMES = ("golden_h264.mp4", "golden_mpeg4.avi")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    assert make_golden_videos(folder) == NAMES
    return folder


def test_they_are_small_and_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    make_golden_videos(tmp_path)
    sizes = []
    for name in NAMES:
        data = (folder / name).read_bytes()
        assert data == (tmp_path / name).read_bytes()
        sizes.append(len(data))
    assert max(sizes) < 40_000
    assert sum(sizes) < 100_000


def test_they_hold_key_frames_and_frames_out_of_order(folder: Path) -> None:
    for name in NAMES:
        with av.open(str(folder / name)) as container:
            kinds = [int(frame.pict_type) for frame in container.decode(video=0)]
        intra, predicted, bidirectional = (kinds.count(kind) for kind in (1, 2, 3))
        assert intra >= 3
        assert predicted > 10
        assert bidirectional > 20


def test_every_frame_differs_from_every_other_and_from_its_mirror_images() -> None:
    frames = np.stack([golden_frame(number) for number in range(GOLDEN_FRAMES)])
    assert frames.min() > 0
    assert frames.max() < 255  # nothing is clipped, so that a wrong range shows
    grey = frames.mean(axis=-1)
    for frame in grey:
        distances = np.sort(np.abs(grey - frame).mean(axis=(1, 2)))
        assert distances[1] > 30
        for mirrored in (frame[::-1], frame[:, ::-1], frame[::-1, ::-1]):
            assert np.abs(mirrored - frame).mean() > 30


@pytest.mark.parametrize("decoder", ["pyav", "opencv"])
@pytest.mark.parametrize("name", NAMES)
def test_a_sound_decoder_shows_what_was_drawn(folder: Path, name: str, decoder: DecoderName) -> None:
    with open_video(folder / name, decoder=decoder) as reader:
        assert (reader.info.num_frames, reader.info.fps) == (GOLDEN_FRAMES, GOLDEN_FPS)
        for index, rgb in enumerate(reader.read(range(GOLDEN_FRAMES))):
            assert np.abs(rgb.astype(int) - golden_frame(index)).mean() < 3.0


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.short_side))
@pytest.mark.parametrize("name", NAMES)
def test_both_decoders_are_within_the_tolerance(folder: Path, name: str, spec: ClipSpec) -> None:
    expected = load_clips(folder / name, spec, GOLDEN_PLAN).video
    assert compare_clips(expected, load_clips((folder / name).read_bytes(), spec, GOLDEN_PLAN).video) == 0
    found = load_clips(folder / name, spec, GOLDEN_PLAN, decoder="opencv").video
    assert 0 < compare_clips(expected, found) < DECODE_TOLERANCE - 0.5


def swap_uv(clips: np.ndarray) -> np.ndarray:
    """BT.601 both ways, which is near enough for the other matrix too."""
    matrix = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
    yuv = clips @ matrix.T
    return (yuv[..., [0, 2, 1]] @ np.linalg.inv(matrix).T).clip(0, 255).astype(np.uint8)


def other_matrix(clips: np.ndarray) -> np.ndarray:
    bt601 = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
    bt709 = np.array([[0.2126, 0.7152, 0.0722], [-0.1146, -0.3854, 0.5], [0.5, -0.4542, -0.0458]])
    return (clips @ bt709.T @ np.linalg.inv(bt601).T).clip(0, 255).astype(np.uint8)


FAULTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "one frame late": (lambda clips: np.roll(clips, 1, axis=1), 20),
    "red and blue swapped": (lambda clips: clips[..., ::-1], 8),
    "U and V swapped": (swap_uv, 8),
    "left and right": (lambda clips: clips[:, :, :, ::-1], 10),
    "upside down": (lambda clips: clips[:, :, ::-1], 10),
    "turned round": (lambda clips: clips[:, :, ::-1, ::-1], 10),
    "one pixel to the right": (lambda clips: np.roll(clips, 1, axis=3), 1.1),
    "one pixel down": (lambda clips: np.roll(clips, 1, axis=2), 1.1),
    "limited range shown as full": (lambda c: np.rint(16 + c * (219 / 255)).astype(np.uint8), 3),
    "full range shown as limited": (lambda c: ((c - 16.0) * (255 / 219)).clip(0, 255).astype(np.uint8), 3),
    "another colour matrix": (other_matrix, 1.3),
    "grey": (lambda clips: clips.mean(axis=-1, keepdims=True).astype(np.uint8).repeat(3, axis=-1), 5),
}
"""What can go wrong, and how many times the tolerance it must cost."""


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.short_side))
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", NAMES)
def test_each_fault_is_beyond_the_tolerance(folder: Path, name: str, fault: str, spec: ClipSpec) -> None:
    expected = load_clips(folder / name, spec, GOLDEN_PLAN).video
    damage, factor = FAULTS[fault]
    assert compare_clips(expected, damage(expected)) > factor * DECODE_TOLERANCE


def test_one_wrong_frame_is_enough() -> None:
    expected = np.zeros((2, 16, 8, 8, 3), np.uint8)
    found = expected.copy()
    found[1, 7] = 10
    assert compare_clips(expected, found) == 10.0
    assert compare_clips(found, expected) == 10.0


@pytest.mark.parametrize(
    "found", [np.zeros((1, 4, 8, 8, 3), np.uint8), np.zeros((2, 4, 8, 8, 3)), np.zeros(3, np.uint8)]
)
def test_other_shapes_and_types_cannot_be_compared(found: np.ndarray) -> None:
    with pytest.raises(ClipShapeError, match="cannot compare"):
        compare_clips(np.zeros((2, 4, 8, 8, 3), np.uint8), found)


def test_a_late_decoder_is_refused_when_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = PyAvReader.frames

    def late(self: PyAvReader, indices: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        before = None
        for index, frame in frames(self, indices):
            yield index, before or frame
            before = frame

    monkeypatch.setattr(PyAvReader, "frames", late)
    with pytest.raises(ExportError, match=r"golden_h264\.mp4: a decoded frame differs .* by \d\d\.\d levels"):
        make_golden_videos(tmp_path)


def test_swapped_colours_are_refused_when_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_rgb = PyAvReader.to_rgb
    monkeypatch.setattr(PyAvReader, "to_rgb", lambda *arguments: to_rgb(*arguments)[..., ::-1])
    with pytest.raises(ExportError, match="differs from the one drawn"):
        make_golden_videos(tmp_path)


def test_a_folder_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        make_golden_videos(tmp_path / "nowhere")


def test_an_encoder_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = replace(golden_video._RECIPES[0], codec="libnone")
    monkeypatch.setattr(golden_video, "_RECIPES", (missing,))
    with pytest.raises(ExportError, match="cannot be encoded with libnone"):
        make_golden_videos(tmp_path)
