from dataclasses import replace
from pathlib import Path

import pytest

from ivdr_deploy.artifacts.sidecar import BatchProfile, EngineInfo, read_sidecar, sidecar_path, write_sidecar
from ivdr_deploy.errors import ArtifactError

INFO = EngineInfo(
    provider="tensorrt_rtx",
    provider_version="1.2.3",
    compute_capabilities=("8.6", "12.0"),
    precision="fp32",
    onnx_sha256="0" * 64,
    contract_hash="1" * 64,
    clip_shape=(8, 56, 56, 3),
    batch=BatchProfile(min=1, opt=2, max=64),
    outputs=("logits",),
    build_seconds=0.5,
)


def test_sidecar_lies_beside_its_engine_and_reads_back(tmp_path: Path) -> None:
    engine = tmp_path / "model.fp32.engine"
    write_sidecar(engine, INFO)
    assert sidecar_path(engine).name == "model.fp32.engine.json"
    assert read_sidecar(engine) == INFO


def test_missing_or_damaged_sidecar_says_how_to_rebuild(tmp_path: Path) -> None:
    engine = tmp_path / "model.engine"
    with pytest.raises(ArtifactError, match=r"model\.engine\.json is missing") as caught:
        read_sidecar(engine)
    assert "`ivdr export BUNDLE --engine trt --precision" in caught.value.hint  # -o would replace the bundle
    for content in ("{", "[]", "3", '{"format_version": 2}', "[" * 100_000, '{"build_seconds": 1e999}'):
        sidecar_path(engine).write_text(content)
        with pytest.raises(ArtifactError, match="cannot be read"):
            read_sidecar(engine)
    for version in ("99", "{}", "null"):
        sidecar_path(engine).write_text(f'{{"format_version": {version}, "provider": "openvino"}}')
        with pytest.raises(ArtifactError, match=r"has format version .*, this ivdr reads 1 to 2"):
            read_sidecar(engine)


def test_a_sidecar_of_version_1_has_the_same_fields(tmp_path: Path) -> None:
    former = replace(INFO, format_version=1)
    write_sidecar(tmp_path / "model.engine", former)
    assert read_sidecar(tmp_path / "model.engine") == former
