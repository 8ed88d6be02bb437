"""A variant that raises on the way has failed, by name and with its reason; videos and other variants are none the
worse for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bundles import reseal

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.errors import ArtifactError, CheckpointError, DeviceError, InferenceError
from ivdr_deploy.evaluation.records import keep_records
from ivdr_deploy.evaluation.verify import recheck_bundle, verify_bundle
from ivdr_deploy.evaluation.verify_report import VariantReport
from ivdr_deploy.runtimes.base import Runtime
from ivdr_deploy.runtimes.ort_runtime import OrtRuntime
from ivdr_deploy.runtimes.torch_runtime import TorchRuntime

Fails = Callable[[np.ndarray], bool]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let a runtime raise on some of its calls."""

    def plant(runtime: type[Runtime], fails: Fails, error: Exception) -> None:
        infer = runtime.infer

        def broken(self: Runtime, video: np.ndarray) -> dict[str, np.ndarray]:
            if fails(video):
                raise error
            return infer(self, video)

        monkeypatch.setattr(runtime, "infer", broken)

    return plant


def is_of_videos(video: np.ndarray) -> bool:
    """The videos are grey, the golden clips are noise."""
    return bool((video[..., 0].astype(int) - video[..., 1]).std() < 10)


def runs(found: VariantReport) -> str:
    (text,) = (check.text for check in found.checks if check.name == "runs" and not check.passed)
    return text


@pytest.mark.parametrize(
    ("error", "every"),
    [
        (RuntimeError("out of memory\nat layer 3"), True),
        (MemoryError(), False),
        (ArtifactError("TensorRT could not run the plan"), False),
    ],
    ids=["on every video", "on a call without a reason", "on a call with an error of ours"],
)
def test_a_variant_that_raises_on_videos_fails_and_spares_them(
    bundle: Path, videos: Path, tmp_path: Path, failing: Callable[..., None], error: Exception, every: bool
) -> None:
    listed = tmp_path / "each.txt"
    for index in range(14):  # two calls: ten videos of two clips, and four
        shutil.copyfile(videos / f"{index % 6}.mp4", tmp_path / f"{index}.mp4")
    listed.write_text("".join(f"{index}.mp4\n" for index in range(14)))
    calls: list[int] = []

    def fails(video: np.ndarray) -> bool:
        if not is_of_videos(video):
            return False
        calls.append(len(video))
        return every or len(calls) == 2

    failing(OrtRuntime, fails, error)
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    report = verify_bundle(folder, data=listed)
    reference, exported = report.variants
    assert calls[:2] == [20, 8]
    assert (report.videos, report.bad_videos) == (14, ())
    assert reference.passed
    assert {"runs", "finite", "outputs"} <= {check.name for check in exported.failures}
    assert type(error).__name__ in runs(exported)
    assert str(error).split("\n")[0] in runs(exported)
    assert "layer 3" not in runs(exported)
    assert exported.record.not_finite == (14 if every else 4)
    keep_records(folder, report.variants)
    held = open_bundle(folder)
    assert not held.variant("onnx-fp32").verified
    assert "runs" in held.variant("onnx-fp32").verification.failed
    assert recheck_bundle(folder).variants == report.variants
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["passed"] is False


def test_a_variant_that_raises_on_the_golden_clips_fails_and_the_others_are_judged(
    bundle: Path, videos: Path, failing: Callable[..., None]
) -> None:
    failing(OrtRuntime, lambda video: not is_of_videos(video), ValueError("no such kernel"))
    for data in (None, videos / "labelled.csv"):
        reference, exported = verify_bundle(bundle, data=data).variants
        assert reference.passed
        assert "on the golden clips (ValueError: no such kernel)" in runs(exported)
        assert exported.golden == ()
        assert not exported.passed


@pytest.mark.parametrize("data", [None, "labelled.csv"])
def test_a_variant_that_raises_in_some_batch_fails_and_the_others_are_judged(
    bundle: Path, videos: Path, failing: Callable[..., None], data: str | None
) -> None:
    failing(OrtRuntime, lambda video: len(video) == 3, RuntimeError("bad size"))
    report = verify_bundle(bundle, data=data and videos / data)
    reference, exported = report.variants
    assert reference.passed
    assert [check.name for check in exported.failures] == ["runs"]
    assert "in batches or in reverse (RuntimeError: bad size)" in runs(exported)
    assert exported.record.batch is None


@pytest.mark.parametrize("wrong", ["a row too few", "an output too few"])
def test_outputs_of_another_shape_are_a_failure_of_the_variant(
    bundle: Path, videos: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    infer = OrtRuntime.infer

    def short(self: OrtRuntime, video: np.ndarray) -> dict[str, np.ndarray]:
        outputs = infer(self, video)
        if wrong == "an output too few":
            del outputs["logits"]
            return outputs
        return {name: value[:-1] if is_of_videos(video) else value for name, value in outputs.items()}

    monkeypatch.setattr(OrtRuntime, "infer", short)
    report = verify_bundle(bundle, data=videos / "labelled.csv")
    reference, exported = report.variants
    assert (reference.passed, report.videos, report.bad_videos) == (True, 6, ())
    assert "it gives {'feature': (1" in runs(exported)
    assert "expected {'feature': (12" in runs(exported)


@pytest.mark.parametrize("data", [None, "labelled.csv"])
def test_a_file_that_cannot_be_opened_is_a_failure_of_its_variant(
    bundle: Path, videos: Path, tmp_path: Path, data: str | None
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    exported = folder / open_bundle(folder).variant("onnx-fp32").files[0]
    exported.write_bytes(b"no ONNX file")
    report = verify_bundle(reseal(folder), data=data and videos / data)
    reference, broken = report.variants
    assert reference.passed
    assert (report.passed, report.bad_videos, broken.not_run) == (False, (), "")
    assert broken.failures[0].name == "runs"
    assert runs(broken).startswith("it failed when it was opened (ArtifactError: ")
    assert exported.name in runs(broken)
    if data:
        keep_records(folder, report.variants)
        assert "runs" in open_bundle(folder).variant("onnx-fp32").verification.failed
        assert recheck_bundle(folder).variants == report.variants


@pytest.mark.parametrize(
    ("error", "is_absent"),
    [(RuntimeError("CUDA error: out of memory"), False), (DeviceError("no such device"), True)],
    ids=["fails", "cannot run here"],
)
def test_what_a_runtime_raises_at_opening_ends_no_other_verdict(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, is_absent: bool
) -> None:
    def raises(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(OrtRuntime, "__init__", raises)
    reference, exported = verify_bundle(bundle).variants
    assert reference.passed
    assert not exported.passed
    assert str(error) in (exported.not_run if is_absent else runs(exported))


def test_a_reference_that_cannot_be_opened_ends_the_run(bundle: Path, videos: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (folder / open_bundle(folder).variant("torch-fp32").files[0]).write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError):
        verify_bundle(reseal(folder), data=videos / "labelled.csv")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("out of memory")])
def test_a_video_on_which_the_reference_raises_is_not_compared(
    bundle: Path,
    videos: Path,
    failing: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    """All six are one call: it fails, and each is run alone."""
    alone: list[int] = []
    compared: list[int] = []
    infer = OrtRuntime.infer

    def counted(self: OrtRuntime, video: np.ndarray) -> dict[str, np.ndarray]:
        compared.append(len(video))
        return infer(self, video)

    def fails(video: np.ndarray) -> bool:
        if is_of_videos(video) and len(video) == 2:
            alone.append(len(video))
        return is_of_videos(video) and (len(video) > 3 or len(alone) == 3)

    monkeypatch.setattr(OrtRuntime, "infer", counted)
    failing(TorchRuntime, fails, error)
    report = verify_bundle(bundle, data=videos / "labelled.csv")
    (bad,) = report.bad_videos
    assert (bad.uri, bad.code, report.videos, report.unusable) == ("2.mp4", "inference_failed", 5, 1)
    assert f"the reference torch-fp32 fails ({type(error).__name__}" in bad.message
    assert bad.hint
    assert [variant.passed for variant in report.variants] == [True, True]
    for variant in report.variants:
        assert variant.record.videos.uris == ("0.mp4", "1.mp4", "3.mp4", "4.mp4", "5.mp4")
        assert variant.record.bad_videos == 1
        assert {call.size for call in variant.record.batch.calls} == {2}
    assert compared[1:6] == [2] * 5  # after the golden clips


def test_a_reference_that_raises_on_every_video_ends_the_run(
    bundle: Path, videos: Path, failing: Callable[..., None]
) -> None:
    """Nothing can be compared: no variant is to blame, and no video is either."""
    failing(TorchRuntime, is_of_videos, RuntimeError("out of memory"))
    with pytest.raises(InferenceError, match=r"each of its 6 videos; 0\.mp4: .*out of memory") as caught:
        verify_bundle(bundle, data=videos / "labelled.csv")
    assert caught.value.hint


def test_a_reference_that_raises_while_decoders_are_compared_spares_the_figures(
    bundle: Path, videos: Path, failing: Callable[..., None]
) -> None:
    """All six were one call before; now each is run alone, and what was measured by then is kept."""
    failing(
        TorchRuntime, lambda video: is_of_videos(video) and len(video) == 2, RuntimeError("out of memory")
    )
    report = verify_bundle(bundle, data=videos / "labelled.csv", decoder_skew=True)
    assert [variant.passed for variant in report.variants] == [True, True]
    assert {video.error for video in report.skew} == {"the reference fails (RuntimeError: out of memory)"}


def test_a_reference_that_raises_on_the_golden_clips_fails_as_any_other(
    bundle: Path, failing: Callable[..., None]
) -> None:
    failing(TorchRuntime, lambda _: True, RuntimeError("out of memory"))
    reference, exported = verify_bundle(bundle).variants
    assert "out of memory" in runs(reference)
    assert exported.passed


def test_the_command_says_what_failed(
    ivdr: Callable[..., tuple[int, str, str]], bundle: Path, tmp_path: Path, failing: Callable[..., None]
) -> None:
    failing(OrtRuntime, lambda _: True, RuntimeError("no such kernel"))
    code, _, err = ivdr("verify", bundle, "--variant", "onnx-fp32")
    assert code == 1
    assert "FAIL onnx-fp32: runs: it failed on the golden clips (RuntimeError: no such kernel)" in " ".join(
        err.split()
    )
    assert "holds no golden clips" not in err
