"""A network whose training diverged (NaN in its weights): every way in refuses it, or gives an error for each video."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import make_tiny_checkpoint, reseal
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file
from videos import numbered_video

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.golden import Golden, write_golden
from ivdr_deploy.cli import main
from ivdr_deploy.errors import GoldenMismatchError
from ivdr_deploy.scoring import read_scores
from ivdr_deploy.serving.core.service import InferenceService
from ivdr_deploy.serving.core.settings import ServiceSettings


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def spoil_checkpoint(path: Path) -> Path:
    """Put NaN into one weight of a checkpoint."""
    data = path.read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    tensors = load_file(path)
    name = next(
        name for name, value in tensors.items() if name.startswith("model.backbone") and value.ndim == 5
    )
    tensors[name] = tensors[name].copy()
    tensors[name].flat[0] = np.nan
    save_file(tensors, path, metadata=metadata)
    return path


def spoil_onnx(path: Path) -> Path:
    """Put NaN into one weight of an ONNX file."""
    model = onnx.load(path)
    weight = next(one for one in model.graph.initializer if len(one.dims) == 5)
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, path)
    return path


SPOIL: dict[str, Callable[[Path], object]] = {
    "torch-fp32": lambda bundle: spoil_checkpoint(bundle / "model.safetensors"),
    "onnx-fp32": lambda bundle: spoil_onnx(bundle / "model.onnx"),
}


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    (tmp_path / "videos").mkdir()
    for name in "ab":
        numbered_video(tmp_path / "videos" / f"{name}.mp4", num_frames=20, size=(64, 48))
    return tmp_path / "videos"


@pytest.fixture(params=SPOIL)
def diverged(request: pytest.FixtureRequest, tiny_bundle_copy: Path) -> tuple[Path, str]:
    """A bundle with one diverged variant, all digests in order, and that variant."""
    SPOIL[request.param](tiny_bundle_copy)
    return reseal(tiny_bundle_copy), request.param


def test_a_diverged_checkpoint_is_refused_at_opening(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = spoil_checkpoint(make_tiny_checkpoint(tmp_path / "diverged.safetensors"))
    for command in (
        ("predict", checkpoint, videos, "--json"),
        ("score", checkpoint, videos, "-o", tmp_path / "scores"),
    ):
        assert run(*command) == 5
        out, err = capsys.readouterr()
        assert out == ""
        assert "NaN or infinity in" in err
    assert not (tmp_path / "scores").exists()


def test_a_diverged_variant_is_refused_at_opening(
    diverged: tuple[Path, str], videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, variant = diverged
    for command in (
        ("predict", bundle, videos, "--variant", variant, "--json"),
        ("score", bundle, videos, "-o", tmp_path / "scores", "--variant", variant),
    ):
        assert run(*command) == 5
        out, err = capsys.readouterr()
        assert out == ""
        assert "golden clips" in err
    assert not (tmp_path / "scores").exists()
    with pytest.raises(GoldenMismatchError, match="golden clips"):
        InferenceService.open(bundle, ServiceSettings(variant=variant, device="cpu"))


def test_a_diverged_variant_does_not_pass_verification(diverged: tuple[Path, str], videos: Path) -> None:
    bundle, _ = diverged
    assert run("verify", bundle) != 0
    assert run("verify", bundle, "--videos", videos) != 0


def test_without_golden_clips_each_answer_is_an_error(
    diverged: tuple[Path, str], videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, variant = diverged
    opened = open_bundle(bundle)
    write_golden(bundle, Golden(clips=opened.golden().clips))
    reseal(bundle)
    assert run("predict", bundle, videos, "--variant", variant, "--json") != 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["error"]["code"] for line in lines] == ["inference_failed"] * 2
    assert run("score", bundle, videos, "-o", tmp_path / "scores", "--variant", variant) != 0
    table = read_scores(tmp_path / "scores")
    assert table["error_code"].to_pylist() == ["inference_failed"] * 2
    with InferenceService.open(
        bundle, ServiceSettings(variant=variant, device="cpu", decode_workers=1)
    ) as service:
        answer = service.submit({"video": (videos / "a.mp4").read_bytes()}).result(60)
    assert (answer.status, answer.body["code"]) == (500, "inference_failed")


def test_a_diverged_onnx_file_by_itself_gives_errors(
    tiny_bundle_copy: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = Path(shutil.copy(spoil_onnx(tiny_bundle_copy / "model.onnx"), tmp_path / "alone.onnx"))
    assert run("predict", alone, videos, "--json") != 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["error"]["code"] for line in lines] == ["inference_failed"] * 2
