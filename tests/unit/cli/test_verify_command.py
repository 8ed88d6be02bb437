"""`ivdr verify` as a person sees it: what passes, what is not judged, and what is refused before any work is done."""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import make_tiny_checkpoint, reseal
from videos import three_videos

from ivdr_deploy.artifacts.bundle import open_bundle


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_videos(tmp_path_factory.mktemp("videos"))


def test_verify_passes_on_a_good_bundle_and_keeps_its_records(
    ivdr, tiny_bundle_copy: Path, videos: Path
) -> None:
    code, stdout, stderr = ivdr("verify", tiny_bundle_copy, "--data", videos / "test.csv")
    assert (code, stdout) == (0, "")
    assert f"PASS: {tiny_bundle_copy} over 3 videos; the records are in the bundle" in stderr
    assert "next: ivdr archive" in stderr
    assert "3/3" in stderr
    assert "onnx-fp32: batch: 0 flips of 3 clips" in stderr
    code, stdout, _ = ivdr("show", tiny_bundle_copy)
    assert (code, "PASS over 3 videos of test.csv" in stdout, "R@1" in stdout) == (0, True, True)
    code, _, stderr = ivdr("verify", tiny_bundle_copy, "--recheck")
    assert (code, "PASS: " in stderr, "nothing was run" in stderr) == (0, True, True)
    strict = ("--recheck", "--variant", "onnx-fp32", "--threshold", "min_cosine=1.1")
    code, stdout, stderr = ivdr("verify", tiny_bundle_copy, *strict)
    assert code == 1
    assert "FAIL onnx-fp32: cosine: smallest cosine" in stderr
    code, stdout, _ = ivdr("verify", tiny_bundle_copy, *strict, "--json")
    (found,) = json.loads(stdout)["variants"]
    assert (code, found["passed"]) == (1, False)
    assert [check["name"] for check in found["checks"] if not check["passed"]] == ["cosine"]


def test_verify_names_what_it_did_not_judge(ivdr, tiny_bundle_copy: Path, videos: Path) -> None:
    code, _, stderr = ivdr("verify", tiny_bundle_copy, "--variant", "onnx-fp32", "--variant", "onnx-fp32")
    assert code == 0
    assert stderr.count("onnx-fp32: batch: ") == 1
    assert "over the golden clips; not named, so not judged: torch-fp32" in stderr
    code, stdout, _ = ivdr("verify", tiny_bundle_copy, "--variant", "onnx-fp32", "--json")
    assert json.loads(stdout)["not_named"] == ["torch-fp32"]


def test_recheck_has_not_passed_what_holds_no_record(ivdr, tiny_bundle_copy: Path, videos: Path) -> None:
    code, _, _ = ivdr(
        "verify", tiny_bundle_copy, "--videos", videos / "with_broken.csv", "--variant", "onnx-fp32"
    )
    assert code == 1  # for the broken video
    code, _, stderr = ivdr("verify", tiny_bundle_copy, "--recheck")
    assert code == 1
    assert "not run: torch-fp32: it holds no record of a verification" in stderr
    assert "FAIL: " in stderr
    code, _, stderr = ivdr("verify", tiny_bundle_copy, "--recheck", "--variant", "onnx-fp32")
    assert code == 1
    assert "over 1 videos; 1 videos could not be used; not named, so not judged: torch-fp32" in stderr


def test_recheck_says_which_variant_saw_which_videos(ivdr, tiny_bundle_copy: Path, videos: Path) -> None:
    assert ivdr("verify", tiny_bundle_copy, "--videos", videos / "test.csv")[0] == 0
    words = ("--videos", videos / "one.csv", "--variant", "onnx-fp32")
    assert ivdr("verify", tiny_bundle_copy, *words)[0] == 0
    code, _, stderr = ivdr("verify", tiny_bundle_copy, "--recheck")
    assert code == 0
    assert (
        "over 3 videos of test.csv (torch-fp32), 1 videos of one.csv (onnx-fp32); nothing was run" in stderr
    )


def test_verify_passes_nothing_where_nothing_can_be_judged_by(
    ivdr, tiny_bundle_copy: Path, videos: Path
) -> None:
    for name in ("golden.npz", "golden_h264.mp4", "golden_mpeg4.avi"):
        (tiny_bundle_copy / name).unlink()
    reseal(tiny_bundle_copy)
    code, _, stderr = ivdr("verify", tiny_bundle_copy)
    assert (code, stderr.count("\n")) == (5, 1)
    assert "holds no golden clips, so without videos there is nothing to judge by" in stderr
    code, _, stderr = ivdr("verify", tiny_bundle_copy, "--videos", videos / "test.csv", "--no-record")
    assert code == 0
    assert "the bundle holds no golden clips: none were replayed" in stderr


def test_names_in_a_manifest_are_shown_as_they_are(ivdr, tiny_bundle_copy: Path, videos: Path) -> None:
    """To rich, which draws the tables, they could be markup."""
    manifest = open_bundle(tiny_bundle_copy).manifest
    reference, exported = manifest.variants
    reseal(tiny_bundle_copy, variants=(reference, replace(exported, id="[/bold]x[red]-and-a-long-name-too")))
    code, _, stderr = ivdr("verify", tiny_bundle_copy, "--videos", videos / "test.csv", "--no-record")
    assert code == 0, stderr
    assert stderr.count("│ [/bold]x[red]-and-a-long-name-too ") == 10  # 4 outputs twice, labels, retrieval
    assert "…" not in stderr


def test_verify_says_at_once_that_the_bundle_cannot_be_changed(
    ivdr, tiny_bundle_copy: Path, videos: Path
) -> None:
    own = Path(tempfile.gettempdir())
    for folder in (videos, *videos.parents, tiny_bundle_copy, *tiny_bundle_copy.parents):
        if folder != own and folder.is_relative_to(own):
            folder.chmod(0o755)
    user = os.geteuid()
    if user:
        pytest.skip("only root can be somebody else")
    os.seteuid(65534)
    try:
        code, stdout, stderr = ivdr("verify", tiny_bundle_copy, "--videos", videos / "test.csv")
        assert (code, stdout, stderr.count("\n")) == (9, "", 1)
        assert f"{tiny_bundle_copy.parent}: Permission denied" in stderr
        assert "--no-record" in stderr
    finally:
        os.seteuid(user)


def test_verify_leaves_the_bundle_alone_when_asked(ivdr, tiny_bundle_copy: Path, videos: Path) -> None:
    before = (tiny_bundle_copy / "manifest.json").read_bytes()
    code, stdout, _ = ivdr("verify", tiny_bundle_copy, "--data", videos / "test.csv", "--no-record", "--json")
    assert (code, json.loads(stdout)["passed"]) == (0, True)
    assert (tiny_bundle_copy / "manifest.json").read_bytes() == before


def test_verify_says_at_once_that_it_could_not_keep_the_records(
    ivdr, tiny_bundle_copy: Path, videos: Path
) -> None:
    (tiny_bundle_copy / "notes.txt").write_text("mine")
    code, stdout, stderr = ivdr("verify", tiny_bundle_copy, "--data", videos / "test.csv")
    assert (code, stdout, stderr.count("\n")) == (10, "", 1)
    assert "notes.txt" in stderr


def test_a_gpu_that_is_not_there_is_one_line_and_code_6(
    ivdr, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ivdr_deploy.evaluation.verify.has_nvidia_driver", lambda: False)
    code, _, stderr = ivdr("verify", tiny_bundle, "--device", "cuda")
    assert (code, stderr.count("\n")) == (6, 1), stderr
    assert "no NVIDIA driver was found. use device 'cpu', or see `ivdr doctor`" in stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        *(
            (("--recheck", *words), f"{words[0]} is for a run, and --recheck runs nothing")
            for words in (
                ("--videos", "x.csv"),
                ("--no-record",),
                ("--decoder-skew",),
                ("--decoder", "pyav"),
                ("--device", "cpu"),
                ("--root", "x"),
                ("--allow-container", "asf"),
            )
        ),
        (("--root", "x"), "--root needs videos"),
        (("--allow-container", "asf"), "--allow-container needs videos"),
        (("--threshold", "abstain=1"), "--threshold is for --recheck"),
        (("--recheck", "--threshold", "speed=1"), "'speed=1' is not a threshold"),
        (("--decoder-skew",), "--decoder-skew needs videos"),
    ],
)
def test_verify_refuses_options_that_make_no_sense_together(
    ivdr, tiny_bundle: Path, words: tuple[str, ...], said: str
) -> None:
    code, _, stderr = ivdr("verify", tiny_bundle, *words)
    assert (code, stderr.count("\n")) == (2, 1)
    assert said in stderr


def test_verify_shows_how_the_decoders_differ(ivdr, tiny_bundle: Path, videos: Path) -> None:
    pytest.importorskip("cv2")
    words = ("--data", videos / "with_broken.csv", "--no-record", "--decoder-skew")
    code, stdout, _ = ivdr("verify", tiny_bundle, *words, "--json")
    skew = json.loads(stdout)["skew"]
    assert code == 1  # one of the videos is broken
    assert [video["uri"] for video in skew if video["error"]] == ["broken.mp4"]
    compared = [video for video in skew if not video["error"]]
    assert compared
    assert all(video["mean_diff"] < 5 and video["expected"] for video in compared)


@pytest.mark.parametrize("keeping", [(), ("--no-record",)])
def test_verify_says_before_any_work_that_opencv_is_absent(
    ivdr, tiny_bundle_copy: Path, videos: Path, monkeypatch: pytest.MonkeyPatch, keeping: tuple[str, ...]
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setattr("ivdr_deploy.evaluation.verify.open_variant", pytest.fail)
    before = (tiny_bundle_copy / "manifest.json").read_bytes()
    words = ("--data", videos / "test.csv", "--decoder-skew", *keeping)
    code, stdout, stderr = ivdr("verify", tiny_bundle_copy, *words)
    assert (code, stdout, stderr.count("\n")) == (6, "", 1)
    assert "ivdr-deploy[opencv]" in stderr
    assert (tiny_bundle_copy / "manifest.json").read_bytes() == before


def test_verify_fails_on_a_wrong_model(ivdr, tiny_bundle: Path, videos: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    make_tiny_checkpoint(folder / "model.safetensors", seed=1)
    reseal(folder)
    code, _, stderr = ivdr("verify", folder)
    assert code == 1
    assert "FAIL: " in stderr
    assert "next:" not in stderr
    code, stdout, _ = ivdr("verify", folder, "--data", videos / "test.csv", "--json")
    assert code == 1
    assert json.loads(stdout)["passed"] is False


def test_verify_lists_bad_videos_and_says_so_in_the_exit_code(ivdr, tiny_bundle: Path, videos: Path) -> None:
    code, _, stderr = ivdr("verify", tiny_bundle, "--data", videos / "with_broken.csv", "--no-record")
    assert code == 1
    assert "not used: broken.mp4:" in stderr
    assert "1 videos could not be used" in stderr


def test_verify_says_what_is_wrong_with_the_list_or_the_bundle(
    ivdr, tiny_bundle: Path, videos: Path, tmp_path: Path
) -> None:
    code, _, stderr = ivdr("verify", tiny_bundle, "--data", videos / "unknown.csv")
    assert (code, "tango" in stderr) == (3, True)
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    content = bytearray((folder / "golden.npz").read_bytes())
    content[100] ^= 1
    (folder / "golden.npz").write_bytes(content)
    code, _, stderr = ivdr("verify", folder)
    assert (code, "golden.npz was changed" in stderr) == (5, True)
