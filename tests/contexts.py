"""The context that TorchServe hands to a handler: its own classes, without the server."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ivdr_deploy.serving.core.settings import ServiceSettings
from ivdr_deploy.serving.torchserve.settings import EndpointSettings, to_model_config


def make_context(
    model_dir: Path,
    rows: Sequence[Any],
    *,
    describe: int | None = None,
    headers: dict[str, str] | None = None,
    gpu_id: int | None = None,
    settings: ServiceSettings = ServiceSettings(top_k=2),  # noqa: B008  frozen
    workers: int = 1,
) -> Any:
    """TorchServe's own context and metrics, as a worker makes them for one batch.

    Args:
        model_dir: Folder that holds the unpacked archive, with the bundle in ``bundle``.
        rows: The requests of the batch.
        describe: The one of them that asks what is loaded.
        headers: Of each request.
        gpu_id: The GPU that TorchServe gives to the worker.
        settings: Of the service, as the archive's ``model-config.yaml`` holds them.
        workers: How many TorchServe starts.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # TorchServe leaves its own files open
        import ts
        from ts.context import Context, RequestProcessor
        from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

        metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
        metrics.initialize_cache()
    metrics.model_name = "tiny"
    config = yaml.safe_load(to_model_config(EndpointSettings(service=settings, workers=workers)))
    context = Context(
        "tiny", str(model_dir), None, 4, gpu_id, "0.12", metrics=metrics, model_yaml_config=config
    )
    context.request_processor = [
        RequestProcessor((headers or {}) | ({"describe": "True"} if i == describe else {}))
        for i in range(len(rows))
    ]
    context.request_ids = metrics.request_ids = {i: f"request-{i}" for i in range(len(rows))}
    return context
