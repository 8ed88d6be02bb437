from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ivdr_deploy.errors import ArtifactError, ConfigError
from ivdr_deploy.serving.core.settings import ENDPOINT_LIMITS, ServiceSettings, read_settings
from ivdr_deploy.serving.torchserve.settings import (
    EndpointSettings,
    from_model_config,
    service_settings,
    to_model_config,
)

CHANGED = EndpointSettings(
    service=ServiceSettings(
        variant="torch-fp32",
        device="cpu",
        threads=2,
        decode_workers=3,
        decode_memory_mib=500,
        num_clips=4,
        max_clips=8,
        limits=replace(ENDPOINT_LIMITS, max_seconds=30.0, containers=("mov",)),
    ),
    workers=2,
    batch_size=8,
    max_batch_delay_ms=50,
    queue_size=7,
    startup_seconds=60,
    max_seconds_per_clip=0.5,
)


@pytest.mark.parametrize("settings", [EndpointSettings(), CHANGED])
def test_settings_survive_the_archive(settings: EndpointSettings) -> None:
    text = to_model_config(settings)
    assert from_model_config(text, where="model-config.yaml") == settings
    assert service_settings(yaml.safe_load(text), where="model-config.yaml") == settings.service


def test_torchserve_finds_its_own_keys() -> None:
    values = yaml.safe_load(to_model_config(CHANGED))
    assert values["minWorkers"] == values["maxWorkers"] == 2
    assert (values["batchSize"], values["maxBatchDelay"], values["deviceType"]) == (8, 50, "cpu")
    assert values["responseTimeout"] == CHANGED.response_timeout_seconds


def test_torchserve_waits_longer_than_any_allowed_batch_takes() -> None:
    # 8 videos, 3 at a time: three rounds, each 20 s and the 5 s after which a hanging worker is killed. Then 64 clips
    # of half a second, once together and once more alone.
    assert CHANGED.response_timeout_seconds > 3 * 25 + 2 * 64 * 0.5
    more = replace(CHANGED, service=replace(CHANGED.service, max_clips=16))
    assert more.response_timeout_seconds - CHANGED.response_timeout_seconds == 2 * 64 * 0.5


def test_largest_video_fits_into_a_request_in_base64() -> None:
    largest = EndpointSettings().service.limits.max_bytes
    assert EndpointSettings().service.max_request_bytes > largest * 4 / 3


def test_limits_not_named_in_a_file_keep_the_endpoint_default(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text("batch_size = 2\n[service]\ntop_k = 3\n[service.limits]\nmax_seconds = 5\n")
    settings = read_settings(path, EndpointSettings)
    assert (settings.batch_size, settings.service.top_k) == (2, 3)
    assert settings.service.limits == replace(ENDPOINT_LIMITS, max_seconds=5.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batchsize = 2", "did you mean 'batch_size'"),
        ("[service.limits]\nmax_byte = 2", "did you mean 'max_bytes'"),
        ('[service]\nruntime = "torch"', "unknown key 'runtime'"),
        ("workers = 0", "at least 1"),
        ("max_batch_delay_ms = 0", "at least 1"),
        ("max_seconds_per_clip = 0", "must be positive"),
        ("[service.limits]\nmax_bytes = 2000000000", "more than TorchServe takes"),
        ("[service]\nnum_clips = 500", "num_clips 500 is more than max_clips 64"),
        ("workers = ", "cannot be read"),
        ("workers = " + "9" * 5000, "cannot be read"),
        ("workers = " + "[" * 100_000, "cannot be read"),
        ("workers = 0x" + "f" * 5000, "at least 1, found a very large int"),
        ("max_seconds_per_clip = inf", "must be positive"),
        ("max_seconds_per_clip = 1e9", "longer than TorchServe can wait"),
        ("[service.limits]\nmax_decode_seconds = inf", "longer than TorchServe can wait"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_settings(path, EndpointSettings)
    assert said in str(caught.value)
    assert "serve.toml" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["", "minWorkers: 1", "[1", "a: b: c", "ivdr_format: 3", "ivdr_format: {}"])
def test_foreign_model_config_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match=r"model-config\.yaml") as caught:
        from_model_config(text, where="model-config.yaml")
    assert "ivdr archive" in str(caught.value)


FORMER: dict[str, Any] = {
    "minWorkers": 1,
    "batchSize": 4,
    "maxBatchDelay": 10,
    "startupTimeout": 300,
    "handler": {"runtime": "onnxruntime", "precision": "fp32", "decode_threads": 4},
    "server": {"queue_size": 32},
}


@pytest.mark.parametrize("values", [FORMER, {**yaml.safe_load(to_model_config(CHANGED)), "ivdr_format": 2}])
def test_archive_of_another_format_is_refused_by_name(values: dict[str, Any]) -> None:
    for read in (service_settings, lambda v, where: from_model_config(yaml.safe_dump(v), where=where)):
        with pytest.raises(ArtifactError, match=r"the archive has format [12]") as caught:
            read(values, where="model-config.yaml")
        assert "pack again" in caught.value.hint
