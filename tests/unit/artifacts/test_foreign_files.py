"""What somebody else wrote: names that would be lines of their own, files without an end, libraries that quote both."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import reseal

from ivdr_deploy._files import read_bounded
from ivdr_deploy._text import as_file_name, is_plain, one_line, reason_of
from ivdr_deploy.artifacts import manifest as manifest_module
from ivdr_deploy.artifacts.bundle import check_replaceable, open_bundle
from ivdr_deploy.artifacts.checkpoint import read_checkpoint_info
from ivdr_deploy.artifacts.manifest import FileEntry, Target, Variant
from ivdr_deploy.artifacts.onnx_metadata import OnnxMetadata
from ivdr_deploy.artifacts.sidecar import BatchProfile, EngineInfo, read_sidecar, write_sidecar
from ivdr_deploy.artifacts.speed import Machine, Speed
from ivdr_deploy.artifacts.verification import Verification
from ivdr_deploy.errors import ArtifactError, CheckpointError, ConfigError, FolderError
from ivdr_deploy.export.hf_files import read_json
from ivdr_deploy.export.importing import read_file
from ivdr_deploy.runtimes.base import OpenRequest
from ivdr_deploy.runtimes.trt_runtime import open_variant

BAD_NAMES = ("", "x\nPASS: all verified", "x\x1b[2J", "x\u2028y", "x" * 100_000)


def said(error: Exception) -> str:
    """The message, which must be one line of a bearable length."""
    text = str(error)
    assert one_line(text) == text
    assert len(text) < 700
    return text


@pytest.mark.parametrize("name", BAD_NAMES, ids=["empty", "line", "escape", "separator", "long"])
def test_a_name_that_would_be_a_line_of_its_own_is_refused_wherever_it_stands(
    name: str, tiny_bundle: Path
) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    variant, output = manifest.variants[1], manifest.outputs[0]
    plan = {
        "provider": "tensorrt_rtx",
        "precision": "fp32",
        "clip_shape": (8, 56, 56, 3),
        "build_seconds": 0.5,
    }
    plan |= {"batch": BatchProfile(min=1, opt=2, max=64), "onnx_sha256": "0", "contract_hash": "1"}
    plan |= {"provider_version": "1.2", "compute_capabilities": ("8.6",), "outputs": ("logits",)}
    verdict = {
        "record": "r",
        "variant_sha256": "0",
        "passed": True,
        "videos": 3,
        "data": "",
        "measured_at": "now",
    }
    verdict |= {"runtime": "torch"}
    onnx = {
        "name": "tiny",
        "version": "1",
        "contract_hash": manifest.contract_hash,
        "contract": manifest.clip,
    }
    onnx |= {"view_plan": manifest.view_plan, "labels": (), "outputs": ("logits",), "ivdr_version": "1"}
    attempts: list[Callable[[], object]] = [
        lambda: replace(variant, id=name),
        lambda: replace(variant, derived_from=name),
        lambda: replace(manifest, name=name),
        lambda: replace(manifest, version=name),
        lambda: replace(manifest, ivdr_version=name),
        lambda: Verification(**{**verdict, "runtime": name}),
        lambda: Verification(**{**verdict, "measured_at": name}),
        lambda: Target(compute_capabilities=("8.6", name)),
        lambda: FileEntry(path=name, sha256="0", size_bytes=1, kind="model"),
        *(lambda key=key: EngineInfo(**{**plan, key: name}) for key in ("provider_version", "onnx_sha256")),
        lambda: EngineInfo(**{**plan, "compute_capabilities": (name,)}),
        *(lambda key=key: OnnxMetadata(**{**onnx, key: name}) for key in ("name", "version", "ivdr_version")),
    ]
    outputs: list[Callable[[], object]] = [
        lambda: replace(manifest, outputs=(replace(output, name=name),)),
        lambda: EngineInfo(**{**plan, "outputs": (name,)}),
        lambda: OnnxMetadata(**{**onnx, "outputs": (name,)}),
    ]
    if name:  # these may be left empty
        attempts += [
            lambda: Target(instruction_set=name),
            lambda: replace(variant, provider=name),
            lambda: OnnxMetadata(**{**onnx, "instruction_set": name}),
        ]
    EngineInfo(**plan), OnnxMetadata(**onnx), Verification(**verdict)  # type: ignore[arg-type]  # sound but for the name
    for attempt in attempts:
        with pytest.raises(ConfigError, match="expected one line of 1 to") as caught:
            attempt()
        said(caught.value)
    for attempt in outputs:
        with pytest.raises(ConfigError, match="is none of logits, feature, inter, intra") as caught:
            attempt()
        said(caught.value)


@pytest.mark.parametrize(
    ("least", "best", "most"), [(1, 2, 10**4000), (1, 10**4000, 64), (-(10**4000), 2, 64), (1, 2, 65)]
)
def test_a_plan_for_batches_of_any_size_is_refused_in_a_short_message(
    least: int, best: int, most: int, tiny_bundle: Path, tmp_path: Path
) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    info = EngineInfo(
        provider="tensorrt_rtx",
        provider_version="1.2",
        compute_capabilities=("8.6",),
        precision="fp32",
        onnx_sha256="0",
        contract_hash=manifest.clip.contract_hash,
        clip_shape=manifest.clip.clip_shape,
        batch=BatchProfile(min=least, opt=best, max=most),
        outputs=manifest.output_names,
        build_seconds=0.5,
    )
    engine = tmp_path / "trt.engine"
    write_sidecar(engine, info)
    variant = replace(manifest.variants[1], runtime="tensorrt", provider="tensorrt_rtx")
    request = OpenRequest(
        variant=variant, path=engine, clip=manifest.clip, output_names=manifest.output_names, device="cuda"
    )
    with pytest.raises(ArtifactError, match="no plan takes from") as caught:
        open_variant(request)
    assert len(said(caught.value)) < 500


def test_large_numbers_of_a_record_are_quoted_short() -> None:
    large = 10**4000
    machine = Machine(device="cpu", processor="x", threads=large)
    speed = Speed(
        machine=machine, variant_sha256="0", reference="r", over_reference=2.0, low=1.0, high=3.0, ms_per_clip=1.0,
        turns=large, batch=large, clip_shape=(1,), runtime="r", measured_at="now",
    )  # fmt: skip
    verdict = Verification(
        record="r", variant_sha256="0", passed=False, videos=large, bad_videos=large, data="", measured_at="now",
        runtime="r",
    )  # fmt: skip
    assert max(len(str(speed)), len(str(verdict))) < 500


def test_as_many_names_as_nobody_reads_are_refused() -> None:
    assert Target(compute_capabilities=("8.6",) * 100)
    with pytest.raises(ConfigError, match="there are 101 of the compute capability, expected at most 100"):
        Target(compute_capabilities=("8.6",) * 101)


def test_a_bundle_with_such_a_name_is_damaged(tiny_bundle_copy: Path) -> None:
    path = tiny_bundle_copy / "manifest.json"
    text = path.read_text().replace('"onnx-fp32"', json.dumps("onnx\nPASS"))
    for strange in (text, path.read_text().replace('"MODEL_CARD.md"', json.dumps("c" * 900))):
        values = json.loads(strange)
        del values["manifest_sha256"]
        values = {"manifest_sha256": manifest_module._digest(values), **values}
        path.write_text(json.dumps(values))
        with pytest.raises(ArtifactError) as caught:
            open_bundle(tiny_bundle_copy)
        assert "onnx\\nPASS" in str(caught.value) or "is listed in the manifest, but missing" in str(
            caught.value
        )


def test_a_file_of_settings_without_an_end_is_not_read(tmp_path: Path, tiny_bundle_copy: Path) -> None:
    """The sparse files take no room on the disk; read whole they would take a terabyte of memory."""
    (tmp_path / "config.json").touch()
    os.truncate(tmp_path / "config.json", 1 << 40)
    with pytest.raises(CheckpointError, match="holds more than 67,108,864 bytes"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"weights file .* holds more than"):
        read_file(tmp_path / "config.json")
    os.truncate(tiny_bundle_copy / "manifest.json", 1 << 40)
    with pytest.raises(ArtifactError, match="holds more than"):
        open_bundle(tiny_bundle_copy)
    with pytest.raises(FolderError, match="exists and is not a bundle"):
        check_replaceable(tiny_bundle_copy)
    (tmp_path / "x.engine.json").touch()
    os.truncate(tmp_path / "x.engine.json", 1 << 40)
    with pytest.raises(ArtifactError, match="holds more than"):
        read_sidecar(tmp_path / "x.engine")


@pytest.mark.timeout(60)
def test_a_pipe_is_no_file_and_nobody_waits_for_what_comes_out_of_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    for attempt in (lambda: read_json(tmp_path / "config.json"), lambda: read_file(tmp_path / "config.json")):
        with pytest.raises(CheckpointError, match="cannot be read"):
            attempt()
    with pytest.raises(OSError, match="not a file"):
        read_bounded(Path("/dev/zero"), 10)
    (tmp_path / "ten").write_bytes(b"0123456789")
    assert read_bounded(tmp_path / "ten", 10) == b"0123456789"
    with pytest.raises(ValueError, match="more than 9 bytes"):
        read_bounded(tmp_path / "ten", 9)


def test_what_a_library_says_of_a_file_is_one_short_line() -> None:
    assert reason_of(ValueError("\n\n  first \x1b[2J\nsecond")) == "first \\u001b[2J"
    assert reason_of(ValueError("\n first\n\n  second \x1b[2J "), whole=True) == "first second \\u001b[2J"
    assert reason_of(MemoryError()) == "MemoryError"
    assert reason_of(ValueError("\n")) == "ValueError"
    assert len(reason_of(ValueError("x" * 10**6))) == 200
    assert is_plain("x" * 255)
    assert not is_plain("x" * 256)


def test_safetensors_quotes_its_file_and_we_a_little_of_that(tmp_path: Path) -> None:
    header = json.dumps(
        {"x": {"dtype": "F\x1b\n" + "9" * 100_000, "shape": [1], "data_offsets": [0, 4]}}
    ).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"0000")
    with pytest.raises(CheckpointError, match="is not a readable") as caught:
        read_checkpoint_info(path)
    said(caught.value)


@pytest.mark.parametrize("name", ["../../etc/x", "/etc/x", "..", "a/b\nc", "", "x" * 1000, ".bashrc"])
def test_a_name_from_a_bundle_leads_a_report_to_no_other_folder(name: str) -> None:
    found = as_file_name(name)
    assert Path(found).name == found
    assert not found.startswith(".")
    assert 1 <= len(found) <= 100
    assert as_file_name("tiny-1.0_x") == "tiny-1.0_x"


def test_every_check_that_failed_is_named_in_a_verdict() -> None:
    names = (
        "golden",
        "outputs",
        "cosine",
        "finite",
        "agreement",
        "sure_flips",
        "accuracy",
        "recall",
        "confidence",
    )
    names += ("abstain", "batch", "sensitivity", "runs")
    given: dict[str, Any] = {
        "record": "r.json",
        "variant_sha256": "0",
        "passed": False,
        "videos": 3,
        "data": "l.csv",
    }
    verdict = str(Verification(failed=names, measured_at="now", runtime="r", **given))
    assert verdict == f"FAIL ({', '.join(names)}) over 3 videos of l.csv"
    many = str(Verification(failed=("x\n" * 500,) * 40, measured_at="now", runtime="r", **given))
    assert "and 27 more" in many
    assert one_line(many) == many
    assert len(many) < 12 * 450


def test_a_variant_of_the_bundle_may_have_any_plain_name(tiny_bundle_copy: Path) -> None:
    reference, exported = open_bundle(tiny_bundle_copy).manifest.variants
    renamed: Variant = replace(exported, id="../[/bold] é\u4e2d")
    reseal(tiny_bundle_copy, variants=(reference, renamed))
    assert open_bundle(tiny_bundle_copy).manifest.variants[1] == renamed
