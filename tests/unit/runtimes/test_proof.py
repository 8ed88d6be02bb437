"""Opening a bundle replays its golden clips and decodes its golden videos; what fails there does not open."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import make_tiny_checkpoint, reseal
from videos import numbered_video

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.golden import write_golden
from ivdr_deploy.artifacts.golden_video import DECODE_TOLERANCE
from ivdr_deploy.errors import ArtifactError, GoldenMismatchError
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.runtimes.ort_runtime import OrtRuntime
from ivdr_deploy.spec import DecoderName
from ivdr_deploy.video._opencv import OpenCvReader
from ivdr_deploy.video._pyav import PyAvReader
from ivdr_deploy.video.reader import VideoReader

VARIANTS = ["torch-fp32", "onnx-fp32"]
VIDEOS = {"golden_h264.mp4", "golden_mpeg4.avi"}
READERS: dict[DecoderName, type[VideoReader]] = {"pyav": PyAvReader, "opencv": OpenCvReader}


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[OrtRuntime]:
    """The sessions of ONNX Runtime that were closed."""
    found: list[OrtRuntime] = []
    close = OrtRuntime.close

    def recorded(self: OrtRuntime) -> None:
        found.append(self)
        close(self)

    monkeypatch.setattr(OrtRuntime, "close", recorded)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_clips_that_give_something_else_are_refused(tiny_bundle_copy: Path, variant: str) -> None:
    golden = open_bundle(tiny_bundle_copy).golden()
    golden.expected["inter"][0, 0] += 3e-4
    write_golden(tiny_bundle_copy, golden)
    with pytest.raises(
        GoldenMismatchError, match=r"inter differs by 3\.00e-04 \(tolerance 1\.00e-04\)"
    ) as caught:
        open_model(reseal(tiny_bundle_copy), variant=variant)
    assert "logits" not in caught.value.message


def test_the_weights_of_another_network_are_found_by_the_golden_clips(tiny_bundle_copy: Path) -> None:
    make_tiny_checkpoint(tiny_bundle_copy / "model.safetensors", seed=1)
    with pytest.raises(GoldenMismatchError, match="feature differs"):
        open_model(reseal(tiny_bundle_copy), variant="torch-fp32")


def test_a_runtime_that_is_refused_is_closed(tiny_bundle_copy: Path, closed: list[OrtRuntime]) -> None:
    golden = open_bundle(tiny_bundle_copy).golden()
    write_golden(tiny_bundle_copy, replace(golden, video=255 - golden.video))
    with pytest.raises(GoldenMismatchError):
        open_model(reseal(tiny_bundle_copy))
    assert len(closed) == 1


@pytest.mark.parametrize(
    "failure", [RuntimeError("CUDA error: out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"]
)
def test_a_runtime_that_fails_on_the_golden_clips_is_closed(
    tiny_bundle: Path, closed: list[OrtRuntime], monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(self: OrtRuntime, video: np.ndarray) -> dict[str, np.ndarray]:
        raise failure

    monkeypatch.setattr(OrtRuntime, "infer", fail)
    expected = ArtifactError if isinstance(failure, Exception) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        open_model(tiny_bundle)
    assert len(closed) == 1
    if isinstance(failure, Exception):
        assert "out of memory" in str(caught.value)
        assert str(tiny_bundle) in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_runtime_that_gives_no_number_is_refused(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    infer = OrtRuntime.infer

    def spoiled(self: OrtRuntime, video: np.ndarray) -> dict[str, np.ndarray]:
        outputs = {name: array.copy() for name, array in infer(self, video).items()}
        outputs["logits"][-1, -1] = value
        return outputs

    monkeypatch.setattr(OrtRuntime, "infer", spoiled)
    with pytest.raises(GoldenMismatchError, match="logits differs by inf"):
        open_model(tiny_bundle)


def test_a_sound_decoder_is_within_the_tolerance(tiny_bundle: Path) -> None:
    assert set(open_model(tiny_bundle).decode_mean_diff) == VIDEOS
    assert set(open_model(tiny_bundle).decode_mean_diff.values()) == {0.0}
    differences = open_model(tiny_bundle, decoder="opencv").decode_mean_diff
    assert set(differences) == VIDEOS
    assert all(0 < value < DECODE_TOLERANCE for value in differences.values())


def one_frame_late(reader: type[VideoReader], monkeypatch: pytest.MonkeyPatch) -> None:
    frames = reader.frames

    def late(self: VideoReader, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        shown = {index: max(0, index - 1) for index in indices}
        found = dict(frames(self, sorted(set(shown.values()))))
        return iter([(index, found[shown[index]]) for index in indices])

    monkeypatch.setattr(reader, "frames", late)


def other_colours(reader: type[VideoReader], monkeypatch: pytest.MonkeyPatch) -> None:
    to_rgb = reader.to_rgb

    def swapped(self: VideoReader, frame: Any, size: tuple[int, int]) -> np.ndarray:
        return to_rgb(self, frame, size)[..., ::-1]

    monkeypatch.setattr(reader, "to_rgb", swapped)


def nothing_at_all(reader: type[VideoReader], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "to_rgb", lambda self, frame, size: np.zeros((*size, 3), np.uint8))


@pytest.mark.parametrize("decoder", READERS)
@pytest.mark.parametrize("fault", [one_frame_late, other_colours, nothing_at_all])
def test_a_decoder_that_gives_other_pictures_is_refused(
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    closed: list[OrtRuntime],
    decoder: DecoderName,
    fault: Callable[[type[VideoReader], pytest.MonkeyPatch], None],
) -> None:
    fault(READERS[decoder], monkeypatch)
    with pytest.raises(GoldenMismatchError, match=f"the decoder {decoder} does not give") as caught:
        open_model(tiny_bundle, decoder=decoder)
    assert all(name in caught.value.message for name in VIDEOS)
    assert "ivdr doctor" in caught.value.hint
    assert closed == []  # found before anything was opened
    other: DecoderName = "pyav" if decoder == "opencv" else "opencv"
    open_model(tiny_bundle, decoder=other).runtime.close()


@pytest.mark.parametrize(("levels", "taken"), [(2, True), (3, False)])
def test_a_decoder_is_refused_for_little_more_than_sound_ones_differ_by(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, levels: int, taken: bool
) -> None:
    """Sound decoders differ by 1.6 levels at most; one pixel aside is 3.0, another colour matrix 3.7."""
    to_rgb = READERS["pyav"].to_rgb

    def brighter(self: VideoReader, frame: Any, size: tuple[int, int]) -> np.ndarray:
        return np.clip(to_rgb(self, frame, size).astype(int) + levels, 0, 255).astype(np.uint8)

    monkeypatch.setattr(READERS["pyav"], "to_rgb", brighter)
    if taken:
        assert all(1.9 < value <= 2.0 for value in open_model(tiny_bundle).decode_mean_diff.values())
        return
    with pytest.raises(
        GoldenMismatchError, match=r"golden_h264\.mp4 by 3\.0, golden_mpeg4\.avi by 3\.0 \(tolerance 2\.5\)"
    ):
        open_model(tiny_bundle)


@pytest.mark.parametrize("content", [b"", b"not a video", None], ids=["empty", "text", "another"])
def test_golden_videos_that_do_not_belong_are_no_bad_video(
    tiny_bundle_copy: Path, content: bytes | None
) -> None:
    """What is wrong with a bundle is an error of the bundle, whatever it is."""
    video = tiny_bundle_copy / "golden_h264.mp4"
    if content is None:
        numbered_video(video, size=(128, 96))
    else:
        video.write_bytes(content)
    with pytest.raises(GoldenMismatchError, match=r"golden_h264\.mp4"):
        open_model(reseal(tiny_bundle_copy))
