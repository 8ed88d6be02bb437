from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import reseal

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.manifest import write_manifest
from ivdr_deploy.artifacts.verification import Verification
from ivdr_deploy.cli import main
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.serving.core.service import InferenceService
from ivdr_deploy.serving.core.settings import ServiceSettings
from ivdr_deploy.serving.torchserve.archive import open_archive

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ivdr(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line; returns (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def test_variant_device_and_settings_are_those_asked_for(
    ivdr: Run, tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "serve.toml").write_text("batch_size = 2\n[service]\nvariant = 'onnx-fp32'\nmax_clips = 8\n")
    store, config = tmp_path / "my store", tmp_path / "serve.toml"
    command = ("archive", tiny_bundle, "--model-store", store, "--config", config, "--device", "cpu")
    code, stdout, stderr = ivdr(*command, "--variant", "torch-fp32", "--json")
    assert code == 0, stderr
    said = json.loads(stdout)
    assert (said["variant"], said["device"], said["name"]) == ("torch-fp32", "cpu", "tiny")
    settings = open_archive(Path(said["archive"])).settings
    assert (settings.batch_size, settings.service.max_clips) == (2, 8)
    assert (settings.service.variant, settings.service.device) == ("torch-fp32", "cpu")


def test_command_says_what_was_packed_and_what_comes_next(
    ivdr: Run, tiny_bundle: Path, tmp_path: Path
) -> None:
    code, stdout, stderr = ivdr("archive", tiny_bundle, "--model-store", tmp_path / "my store")
    assert (code, stdout) == (0, "")
    assert "packed: onnx-fp32 for cpu (the first verified variant that fits" in stderr
    assert "; verified: by its golden clips -> " in " ".join(stderr.split())
    assert f"next: ivdr serve '{tmp_path / 'my store' / 'tiny.mar'}'" in stderr


def test_variant_that_is_not_there_is_one_line(ivdr: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    code, _, stderr = ivdr("archive", tiny_bundle, "--model-store", tmp_path, "--variant", "onnx-int8")
    assert code == 5
    assert "no variant 'onnx-int8'" in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    "change", [{"name": "../../elsewhere"}, {"name": "{path}"}, {"version": "1/../../x"}]
)
def test_a_bundle_does_not_say_where_its_archive_lies_or_what_else_answers(
    ivdr: Run, tiny_bundle_copy: Path, tmp_path: Path, change: dict[str, str]
) -> None:
    reseal(tiny_bundle_copy, **change)
    store = tmp_path / "a" / "b" / "store"
    code, _, stderr = ivdr("archive", tiny_bundle_copy, "--model-store", store)
    assert (code, "cannot be served under a URL" in stderr) == (2, True)
    assert not list(tmp_path.rglob("*.mar"))
    with pytest.raises(ConfigError, match="cannot be served under a URL"):
        InferenceService.open(tiny_bundle_copy, ServiceSettings())


def test_variant_that_is_not_verified_is_packed_on_request_only(
    ivdr: Run, tiny_bundle_copy: Path, tmp_path: Path
) -> None:
    manifest = open_bundle(tiny_bundle_copy).manifest
    reference, exported = manifest.variants
    write_manifest(tiny_bundle_copy, replace(manifest, variants=(reference, replace(exported, parity=()))))
    command = ("archive", tiny_bundle_copy, "--model-store", tmp_path / "store", "--variant", "onnx-fp32")
    code, _, stderr = ivdr(*command)
    assert (code, stderr.count("\n")) == (5, 1)
    assert "onnx-fp32 must not be served: not verified" in stderr
    assert "`ivdr archive BUNDLE --allow-unverified` packs it" in stderr, "other commands build archives too"
    assert not (tmp_path / "store").exists()
    code, _, stderr = ivdr(*command, "--allow-unverified")
    assert (code, "PASS" in stderr) == (0, False)
    assert "; not verified: it was not run where it was built -> " in " ".join(stderr.split())
    code, stdout, _ = ivdr(*command, "--allow-unverified", "--json")
    said = json.loads(stdout)
    assert (code, said["verified"]) == (0, False)
    assert said["verdict"] == "not verified: it was not run where it was built"
    assert open_archive(tmp_path / "store" / "tiny.mar").manifest.variants[0].id == "onnx-fp32"


@pytest.mark.parametrize(
    ("runtime", "passed", "verdict"),
    [
        ("onnxruntime", True, "verified: PASS over 4 videos of test.csv"),
        (
            "onnxruntime",
            False,
            "not verified: its verification says FAIL (agreement) over 4 videos of test.csv",
        ),
        (
            "aoti",
            None,
            "not verified: it is machine code, and no `ivdr verify --videos LIST --variant onnx-fp32`",
        ),
    ],
)
def test_what_was_packed_is_told_with_its_verdict(
    ivdr: Run, tiny_bundle_copy: Path, tmp_path: Path, runtime: str, passed: bool | None, verdict: str
) -> None:
    manifest = open_bundle(tiny_bundle_copy).manifest
    reference, exported = manifest.variants
    record = Verification(
        record="verify-onnx-fp32.json",
        variant_sha256=manifest.variant_sha256(exported),
        passed=bool(passed),
        failed=() if passed else ("agreement",),
        videos=4,
        bad_videos=0,
        data="test.csv",
        measured_at="2026-01-01T00:00:00+00:00",
        runtime="ONNX Runtime",
    )
    exported = replace(exported, runtime=runtime, verification=None if passed is None else record)
    write_manifest(tiny_bundle_copy, replace(manifest, variants=(reference, exported)))
    code, stdout, stderr = ivdr(
        *("archive", tiny_bundle_copy, "--model-store", tmp_path, "--variant", "onnx-fp32", "--json"),
        "--allow-unverified",
    )
    assert code == 0, stderr
    said = json.loads(stdout)
    assert (said["verified"], said["verdict"].startswith(verdict)) == (bool(passed), True), said["verdict"]
