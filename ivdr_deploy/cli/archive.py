"""``ivdr archive``: a bundle into the file that TorchServe takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ivdr_deploy._console import done, print_json
from ivdr_deploy.cli._options import DeviceOption, JsonOption, VariantOption

if TYPE_CHECKING:
    from ivdr_deploy.artifacts.manifest import Variant


def archive(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="What `ivdr export` wrote.")],
    model_store: Annotated[Path, typer.Option(help="Folder for the archive.")] = Path("model_store"),
    variant: VariantOption = None,
    device: DeviceOption = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file: workers, batch_size, max_batch_delay_ms, queue_size, a table [service] and its limits."
        ),
    ] = None,
    allow_unverified: Annotated[
        bool,
        typer.Option(
            "--allow-unverified",
            help="Also pack a --variant that is not verified, or failed its verification.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Pack one variant of a bundle, the settings and the handler into MODEL_STORE/NAME.mar, and read it back."""
    from ivdr_deploy.serving.core.settings import read_settings
    from ivdr_deploy.serving.torchserve.archive import build_archive, why_unverified
    from ivdr_deploy.serving.torchserve.settings import EndpointSettings

    settings = read_settings(config, EndpointSettings) if config else EndpointSettings()
    service = settings.service
    service = replace(service, variant=variant or service.variant, device=device or service.device)
    built = build_archive(
        bundle,
        model_store=model_store,
        settings=replace(settings, service=service),
        allow_unverified=allow_unverified,
    )
    service, (packed,) = built.settings.service, built.manifest.variants
    why = why_unverified(packed)
    if as_json:
        print_json(
            {
                "archive": str(built.path),
                "name": built.manifest.name,
                "version": built.manifest.version,
                "variant": service.variant,
                "device": service.device,
                "verified": not why,
                "verdict": _verdict(packed, why),
                "contract_hash": built.manifest.contract_hash,
                "size_bytes": built.path.stat().st_size,
            }
        )
        return
    megabytes = built.path.stat().st_size / 1e6
    done(
        f"packed: {service.variant} for {service.device} ({built.reason}), read back, every file equal; "
        f"{_verdict(packed, why)} -> {built.path} ({megabytes:.1f} MB)",
        next_command=("ivdr", "serve", built.path),
    )


def _verdict(packed: Variant, why: str) -> str:
    """Say what is known of a variant that was packed, and not run for that."""
    if why:
        return f"not verified: {why.removeprefix('not verified, since ')}"
    if packed.verification is not None:
        return f"verified: {packed.verification}"
    return "verified: " + (
        "by its golden clips" if packed.derived_from is not None else "it is the reference"
    )
