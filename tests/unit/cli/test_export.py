import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from bundles import TINY_CLIP, TINY_LABELS, make_tiny_checkpoint
from rights import make_too_deep
from videos import numbered_video, three_videos

from ivdr_deploy.artifacts.bundle import Draft, open_bundle
from ivdr_deploy.errors import ParityError
from ivdr_deploy.export import bundle_export, steps
from ivdr_deploy.export.steps import Request, Step, StepOptions


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_videos(tmp_path_factory.mktemp("videos"))


@pytest.mark.trt
def test_export_writes_a_bundle_with_a_plan_and_says_what_is_next(
    ivdr, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "my-model"
    code, stdout, stderr = ivdr("export", checkpoint, "-o", out, "--model-version", "2.1", "--trt")
    assert (code, stdout) == (0, "")
    assert "my-model 2.1 with logits, feature, inter, intra" in stderr
    assert f"next: ivdr verify {out}" in stderr
    bundle = open_bundle(out)
    assert (bundle.manifest.name, bundle.manifest.version) == ("my-model", "2.1")
    (plan,) = (variant for variant in bundle.manifest.variants if variant.runtime == "tensorrt")
    assert plan.target.device == "cuda"
    assert bundle.variant_file(plan).stat().st_size > 0
    if not torch.cuda.is_available():
        assert not plan.verified
        assert f"PASS: onnx-fp32; built, but not run here: {plan.id}" in stderr
        card = (out / "MODEL_CARD.md").read_text()
        assert f"`{plan.id}` is never taken unless asked for: not verified, since it was not run" in card
        code, _, stderr = ivdr("verify", out)
        assert code == 1
        assert f"not run: {plan.id}: " in stderr
        assert "no NVIDIA driver was found" in stderr
        code, _, stderr = ivdr("verify", out, "--variant", "onnx-fp32")
        assert (code, "PASS" in stderr) == (0, True)
    code, stdout, _ = ivdr("show", bundle.variant_file(plan), "--json")
    assert code == 0
    assert json.loads(stdout)["onnx_sha256"] == bundle.manifest.entry("model.onnx").sha256


@pytest.mark.trt
def test_a_plan_is_added_to_a_bundle_in_place(ivdr, tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    before = {variant.id: variant for variant in open_bundle(folder).manifest.variants}
    code, stdout, stderr = ivdr("export", folder, "--trt", "--compute-capability", "8.6", "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["variants"] == [*before, "trt-fp32-sm86"]
    after = {variant.id: variant for variant in open_bundle(folder).manifest.variants}
    assert {name: after[name] for name in before} == before
    code, _, stderr = ivdr("export", folder, "--trt", "--compute-capability", "8.6")
    assert code == 0, stderr
    if not torch.cuda.is_available():
        assert "PASS" not in stderr
        assert "built, but not run here: trt-fp32-sm86; as they were: torch-fp32, onnx-fp32; " in stderr
    code, _, stderr = ivdr("export", folder, "--trt", "-o", tmp_path / "other")
    assert (code, "in place" in stderr) == (2, True)


def test_precisions_are_added_to_a_bundle_in_place(
    ivdr, tiny_bundle: Path, videos: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "my bundle"))
    given = ("export", folder, "--precision", "fp16", "--precision", "int8")
    code, _, stderr = ivdr(*given)
    assert code == 2
    assert "--calibrate LIST" in stderr
    code, stdout, stderr = ivdr(*given, "--calibrate", videos / "with_broken.csv", "--json")
    assert code == 0, stderr
    said = json.loads(stdout)
    ids = said["variants"]
    assert ids[:3] == ["torch-fp32", "onnx-fp32", "onnx-fp16"]
    assert ids[3] in ("onnx-int8-cpu", "onnx-int8-cpu-vnni")
    assert (said["made"], said["unverified"], said["left_out"]) == (ids[2:], [], {})
    code, _, stderr = ivdr("export", folder, "--precision", "fp16")
    assert code == 0, stderr
    # What was not run now is not passed now.
    assert f"PASS: onnx-fp16; as they were: torch-fp32, onnx-fp32, {ids[3]}; " in stderr
    assert not any(line.split()[:1] == ["onnx-fp32"] for line in stderr.splitlines())
    code, stdout, _ = ivdr("predict", folder, videos / "0.mp4", "--variant", ids[3], "--json")
    assert code == 0
    code, _, stderr = ivdr("export", folder, "--engine", "openvino")
    assert code == 2
    assert "no 'openvino' engine in 'fp32' can be exported" in stderr
    assert "onnx fp32, onnx fp16" in stderr
    code, _, stderr = ivdr("export", folder)
    assert code == 2
    assert f"ivdr export '{folder}' --engine" in stderr


@pytest.mark.trt
@pytest.mark.exhaustive
def test_all_says_what_it_leaves_out(ivdr, tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    code, stdout, stderr = ivdr("export", folder, "--all", "--compute-capability", "8.6", "--json")
    assert code == 0, stderr
    assert "left out: onnx int8: int8 and fp8 need real videos" in stderr
    left_out = json.loads(stdout)["left_out"]
    assert left_out["onnx int8"] == "int8 and fp8 need real videos to calibrate with"
    assert all(f"left out: {request}: {reason}" in stderr for request, reason in left_out.items())
    ids = [variant.id for variant in open_bundle(folder).manifest.variants]
    assert ids[-2:] == ["trt-fp32-sm86", "trt-fp16-sm86"] or "trt-fp16-sm86" in ids


def test_all_adds_what_can_be_made_and_says_what_failed(
    ivdr, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 cannot be made, and no plan of it is tried; a step after them can, and is."""

    def fail(draft: Draft, options: StepOptions) -> None:
        draft.add_file("half.bin", kind="model").write_bytes(b"x")
        raise ParityError("logits differ by 3 everywhere")

    def never(draft: Draft, options: StepOptions) -> None:
        pytest.fail("it is made from what is not there")

    table: dict[Request, Step] = {
        ("onnx", "fp16"): Step(fail, lambda options: None),
        ("trt", "fp16"): Step(never, lambda options: None, (("onnx", "fp16"),)),
        ("onnx", "int8"): steps.STEPS["onnx", "int8"],
        ("onnx", "fp32"): steps.STEPS["onnx", "fp32"],
    }
    monkeypatch.setattr(steps, "STEPS", table)
    monkeypatch.setattr(bundle_export, "STEPS", table)
    folder = tmp_path / "bundle"
    code, stdout, stderr = ivdr("export", checkpoint, "-o", folder, "--all", "--json")
    assert code == 1
    assert json.loads(stdout)["made"] == ["torch-fp32", "onnx-fp32"]
    assert stderr.splitlines() == [
        "left out: onnx int8: int8 and fp8 need real videos to calibrate with",
        "failed: onnx fp16: logits differ by 3 everywhere",
        "failed: trt fp16: it is made from onnx fp16, which could not be made",
    ]
    said = json.loads(ivdr("export", folder, "--all", "--json")[1])
    assert (said["made"], said["failed"]) == (["onnx-fp32"], ["onnx fp16", "trt fp16"])
    assert said["left_out"]["onnx fp16"] == "logits differ by 3 everywhere"
    assert said["left_out"]["onnx int8"] == "int8 and fp8 need real videos to calibrate with"
    assert [variant.id for variant in open_bundle(folder).manifest.variants] == ["torch-fp32", "onnx-fp32"]
    assert not (folder / "half.bin").exists()
    assert "\nFAIL: onnx fp16, trt fp16; PASS: onnx-fp32; " in ivdr("export", folder, "--all")[2]

    before = (folder / "manifest.json").read_bytes()
    named = ("--precision", "fp32", "--precision", "fp16")
    code, _, stderr = ivdr("export", folder, *named)
    assert (code, "logits differ" in stderr) == (7, True)
    assert (folder / "manifest.json").read_bytes() == before, (
        "what is named is added as a whole or not at all"
    )


def test_export_names_the_extras_where_tensorrt_is_missing(
    ivdr, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, stderr = ivdr("export", checkpoint, "-o", tmp_path / "out", "--trt")
    assert code == 6
    assert "ivdr-deploy[trt-rtx]" in stderr
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_what_it_must_not_replace(ivdr, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    code, _, stderr = ivdr("export", checkpoint, "-o", tmp_path)
    assert code == 10
    assert "is not a bundle" in stderr
    assert stderr.count("\n") == 1
    code, _, stderr = ivdr("export", checkpoint, "-o", tmp_path / "b", "--compute-capability", "8.6")
    assert code == 2
    assert "add --trt" in stderr


@pytest.mark.parametrize(
    ("words", "option"),
    [(("-o", "b 1"), "--name"), (("-o", "b", "--model-version", "1 0"), "--model-version")],
)
def test_a_name_that_cannot_be_served_is_refused_with_the_option_that_gives_another(
    ivdr,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    option: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, stderr = ivdr("export", checkpoint, *words)
    assert code == 2
    assert f"give it with {option}\n" in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--precision", "fp16", "--name", "x"), "--name is for a new bundle"),
        (("--precision", "fp16", "--model-version", "1.0"), "--model-version is for a new bundle"),
        (("--precision", "fp16", "--include-stale"), "--include-stale is for a new bundle"),
        (("--trt", "--calibrate", "LIST"), "--calibrate is for int8 and fp8"),
        (("--precision", "fp16", "--root", "x"), "--root is for --calibrate"),
        (("--precision", "int8", "--allow-container", "asf"), "--allow-container is for --calibrate"),
        (("--precision", "fp16", "--compute-capability", "8.6"), "--compute-capability is for a TensorRT"),
        (("--all", "--engine", "onnx"), "--engine does not go with --all"),
        (("--all", "--precision", "fp16"), "--precision does not go with --all"),
        (("--all", "--trt"), "--trt does not go with --all"),
    ],
)
def test_an_option_that_would_do_nothing_here_is_refused(
    ivdr, tiny_bundle: Path, videos: Path, words: tuple[str, ...], said: str
) -> None:
    given = [videos / "with_broken.csv" if word == "LIST" else word for word in words]
    before = (tiny_bundle / "manifest.json").read_bytes()
    code, _, stderr = ivdr("export", tiny_bundle, *given)
    assert (code, stderr.count("\n")) == (2, 1)
    assert said in stderr
    assert (tiny_bundle / "manifest.json").read_bytes() == before


def test_a_folder_of_calibration_videos_that_cannot_be_read_is_exit_code_1(
    ivdr, tiny_bundle: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    for name in ("a", "b"):
        (tmp_path / "videos").mkdir(exist_ok=True)
        numbered_video(tmp_path / "videos" / f"{name}.mp4", num_frames=20, size=(64, 48))
    given = ("export", folder, "--precision", "int8", "--calibrate", tmp_path / "videos")
    assert ivdr(*given)[0] == 0
    make_too_deep(tmp_path / "videos")
    code, stdout, stderr = ivdr(*given, "--json")
    assert code == 1
    assert "left out: 1 folders that cannot be read" in stderr
    (made,) = json.loads(stdout)["made"]
    assert made.startswith("onnx-int8")


def test_int8_is_calibrated_on_the_training_part_of_an_official_split(
    ivdr, tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "wave_test_split1.txt").write_text("a.avi 2\nb.avi 2\nc.avi 0\n")
    given = ("export", tiny_bundle, "--precision", "int8")
    code, _, stderr = ivdr(*given, "--calibrate", tmp_path / "wave_test_split1.txt")
    assert (code, "left out: 2 of the test part" in stderr) == (3, True), stderr


def test_a_folder_of_any_name_holds_a_bundle_that_is_named(ivdr, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "my run" / "b 1"
    code, _, stderr = ivdr("export", checkpoint, "-o", out, "--name", "b1")
    assert code == 0, stderr
    (line,) = (line for line in stderr.splitlines() if line.startswith("next: "))
    assert shlex.split(line) == ["next:", "ivdr", "verify", str(out), "--videos", "test.csv"]


def test_export_of_a_damaged_checkpoint_is_one_line_and_code_5(ivdr, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    code, _, stderr = ivdr("export", tmp_path / "a.safetensors", "-o", tmp_path / "out")
    assert code == 5
    assert "a.safetensors" in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_show_tells_the_same_contract_for_every_artifact_of_a_model(
    ivdr, tiny_bundle: Path, checkpoint: Path
) -> None:
    kinds = {}
    for path in (tiny_bundle, tiny_bundle / "manifest.json", tiny_bundle / "model.onnx", checkpoint):
        code, stdout, _ = ivdr("show", path, "--json")
        assert code == 0
        values = json.loads(stdout)
        kinds[path.name] = values["kind"]
        assert values["contract_hash"] == TINY_CLIP.contract_hash
        assert tuple(values["labels"]) == TINY_LABELS
    assert kinds == {
        "tiny": "bundle",
        "manifest.json": "bundle",
        "model.onnx": "ONNX file",
        "tiny.safetensors": "checkpoint",
    }


def test_show_prints_a_table_and_the_next_command(ivdr, tiny_bundle: Path) -> None:
    code, stdout, stderr = ivdr("show", tiny_bundle)
    assert code == 0
    for fact in (
        TINY_CLIP.contract_hash,
        "2 clips, centre crop",
        "bow, jump, sit",
        "variant torch-fp32",
        "the reference",
        "variant onnx-fp32",
        "verified: golden clips within",
        "classifier valid",
    ):
        assert fact in stdout
    assert len(stdout.splitlines()) < 30
    assert "next: ivdr verify" in stderr


@pytest.mark.parametrize(
    "name", ["absent.onnx", "notes.txt", "bad.onnx", "bad.mar", "bad.parquet", "other.json"]
)
def test_show_of_something_else_is_one_line_and_code_5(ivdr, tmp_path: Path, name: str) -> None:
    if not name.startswith("absent"):
        (tmp_path / name).write_bytes(b"?")
    code, stdout, stderr = ivdr("show", tmp_path / name)
    assert (code, stdout) == (5, "")
    assert name in stderr
    assert stderr.count("\n") == 1


def test_show_of_a_table_that_is_not_ours_says_so(ivdr, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    code, _, stderr = ivdr("show", tmp_path / "a.parquet")
    assert code == 5
    assert "carries no metadata of ivdr" in stderr


def test_show_reads_a_score_table(ivdr, tiny_bundle: Path, videos: Path, tmp_path: Path) -> None:
    code, _, stderr = ivdr("score", tiny_bundle, videos / "test.csv", "-o", tmp_path / "scores")
    assert code == 0, stderr
    code, stdout, _ = ivdr("show", tmp_path / "scores", "--json")
    values = json.loads(stdout)
    assert (code, values["kind"], values["rows"], values["outcomes"]) == (0, "score table", 3, {"ok": 3})
    code, stdout, _ = ivdr("show", tmp_path / "scores")
    assert (code, "3 ok, 0 failed" in stdout, "complete" in stdout) == (0, True, True)
    shard = next((tmp_path / "scores").glob("part-*"))
    code, stdout, _ = ivdr("show", shard, "--json")
    values = json.loads(stdout)
    assert (code, values["kind"], values["rows"]) == (0, "shard of a score table", 3)
    assert values["manifest"]["contract_hash"] == TINY_CLIP.contract_hash


def test_show_reads_an_archive(ivdr, tiny_bundle: Path, tmp_path: Path) -> None:
    from ivdr_deploy.serving.torchserve.archive import build_archive
    from ivdr_deploy.serving.torchserve.settings import EndpointSettings

    archive = build_archive(tiny_bundle, model_store=tmp_path, settings=EndpointSettings())
    code, stdout, _ = ivdr("show", archive.path, "--json")
    values = json.loads(stdout)
    assert (code, values["kind"], values["name"]) == (0, "archive", "tiny")
    assert values["contract_hash"] == TINY_CLIP.contract_hash
