from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from ivdr_deploy.errors import ConfigError
from ivdr_deploy.serving.core.settings import (
    ENDPOINT_LIMITS,
    EndpointSettings,
    ServiceSettings,
    from_model_config,
    read_settings,
    to_model_config,
)

CHANGED = EndpointSettings(
    service=ServiceSettings(
        runtime="torch",
        threads=2,
        decode_threads=3,
        num_clips=4,
        limits=replace(ENDPOINT_LIMITS, max_seconds=30.0, containers=("mov",)),
    ),
    workers=2,
    batch_size=8,
    max_batch_delay_ms=50,
    queue_size=7,
    startup_seconds=60,
)


@pytest.mark.parametrize("settings", [EndpointSettings(), CHANGED])
def test_settings_survive_the_archive(settings: EndpointSettings) -> None:
    text = to_model_config(settings)
    assert from_model_config(text, where="model-config.yaml") == settings


def test_torchserve_finds_its_own_keys() -> None:
    values = yaml.safe_load(to_model_config(CHANGED))
    assert values["minWorkers"] == values["maxWorkers"] == 2
    assert (values["batchSize"], values["maxBatchDelay"], values["deviceType"]) == (8, 50, "cpu")


def test_decode_limit_strikes_before_torchserve_kills_the_worker() -> None:
    # 8 videos, 3 at a time: three rounds of 20 s, before the network has begun.
    assert CHANGED.response_timeout_seconds > 3 * 20
    assert yaml.safe_load(to_model_config(CHANGED))["responseTimeout"] == CHANGED.response_timeout_seconds


def test_largest_video_fits_into_a_request_in_base64() -> None:
    largest = EndpointSettings().service.limits.max_bytes
    assert EndpointSettings().max_request_bytes > largest * 4 / 3


def test_limits_not_named_in_a_file_keep_the_endpoint_default(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text("batch_size = 2\n[service]\ntop_k = 3\n[service.limits]\nmax_seconds = 5\n")
    settings = read_settings(path)
    assert (settings.batch_size, settings.service.top_k) == (2, 3)
    assert settings.service.limits == replace(ENDPOINT_LIMITS, max_seconds=5.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batchsize = 2", "did you mean 'batch_size'"),
        ("[service.limits]\nmax_byte = 2", "did you mean 'max_bytes'"),
        ("workers = 0", "at least 1"),
        ("max_batch_delay_ms = 0", "at least 1"),
        ("[service.limits]\nmax_bytes = 2000000000", "more than TorchServe takes"),
        ("workers = ", "cannot be read"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_settings(path)
    assert said in str(caught.value)
    assert "serve.toml" in str(caught.value)


@pytest.mark.parametrize("text", ["", "minWorkers: 1", "[1", "a: b: c"])
def test_foreign_model_config_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"model-config\.yaml"):
        from_model_config(text, where="model-config.yaml")
