"""``ivdr archive``: a bundle into the file that TorchServe takes."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ivdr_deploy._console import done, print_json
from ivdr_deploy.spec import Precision, RuntimeName


def archive(
    bundle: Annotated[Path, typer.Argument(help="What `ivdr export` wrote.")],
    model_store: Annotated[Path, typer.Option(help="Folder for the archive.")] = Path("model_store"),
    runtime: Annotated[RuntimeName | None, typer.Option(help="What executes the model.")] = None,
    precision: Annotated[Precision | None, typer.Option(help="Which of the bundle's models.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with limits, batching and workers; see docs/serving.md.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Pack a bundle, its settings and the handler into MODEL_STORE/NAME.mar, and check what was packed."""
    from ivdr_deploy.serving.core.settings import EndpointSettings, read_settings
    from ivdr_deploy.serving.torchserve.archive import build_archive

    settings = read_settings(config) if config else EndpointSettings()
    service = settings.service
    service = replace(service, runtime=runtime or service.runtime, precision=precision or service.precision)
    built = build_archive(bundle, model_store=model_store, settings=replace(settings, service=service))
    if as_json:
        print_json(
            {
                "archive": str(built.path),
                "name": built.manifest.name,
                "version": built.manifest.version,
                "contract_hash": built.manifest.contract_hash,
                "size_bytes": built.path.stat().st_size,
            }
        )
        return
    megabytes = built.path.stat().st_size / 1e6
    done(
        f"PASS: {service.runtime} {service.precision}, read back, every file equal -> "
        f"{built.path} ({megabytes:.1f} MB)",
        next_command=f"ivdr serve {shlex.quote(str(built.path))}",
    )
