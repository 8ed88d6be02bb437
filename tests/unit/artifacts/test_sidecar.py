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
    assert "--trt" in caught.value.hint
    for content in ("{", "{}", '{"provider": "openvino"}'):
        sidecar_path(engine).write_text(content)
        with pytest.raises(ArtifactError, match="cannot be read"):
            read_sidecar(engine)
