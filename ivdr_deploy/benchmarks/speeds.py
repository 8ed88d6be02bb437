"""A timing -> what the bundle keeps, JSON for machines and a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from ivdr_deploy._text import one_line
from ivdr_deploy.artifacts.bundle import Bundle, changed_bundle
from ivdr_deploy.artifacts.speed import Speed, this_machine
from ivdr_deploy.benchmarks.engines import Timing
from ivdr_deploy.environment import environment_facts


def found_speeds(bundle: Bundle, timing: Timing, *, load_average: float | None = None) -> dict[str, Speed]:
    """Return what was measured as a bundle keeps it, by the id of the variant.

    Args:
        bundle: As it was when its variants were timed.
        timing: What was measured.
        load_average: Of the machine before that.
    """
    machine, now = (
        this_machine(timing.device, timing.threads),
        datetime.now(UTC).isoformat(timespec="seconds"),
    )
    speeds = {}
    for variant in bundle.manifest.variants:
        if variant.id not in timing.ms:
            continue
        ratio = timing.over_reference(variant.id)
        speeds[variant.id] = Speed(
            machine=machine,
            variant_sha256=bundle.manifest.variant_sha256(variant),
            reference=timing.reference,
            over_reference=ratio.median,
            low=ratio.low,
            high=ratio.high,
            ms_per_clip=timing.ms_per_clip(variant.id),
            turns=len(timing.ms[variant.id]),
            batch=timing.batch,
            clip_shape=timing.clip_shape,
            runtime=timing.runtimes[variant.id],
            load_average=load_average,
            measured_at=now,
        )
    return speeds


def keep_speeds(bundle: Bundle, speeds: Mapping[str, Speed]) -> None:
    """Put what was measured into a bundle, in the place of what was there; the bundle changes as a whole.

    Args:
        bundle: As it was when its variants were timed.
        speeds: Of some of its variants, see ``found_speeds``.

    Raises:
        FolderError: if the bundle was changed meanwhile, or holds files that are not its own.
    """
    with changed_bundle(bundle) as draft:
        draft.variants = [
            replace(variant, speed=speeds[variant.id]) if variant.id in speeds else variant
            for variant in draft.variants
        ]


def speed_report(
    bundle: Bundle,
    timing: Timing,
    speeds: Mapping[str, Speed],
    left_out: Mapping[str, str],
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return all that was measured, as JSON can hold it.

    Args:
        bundle: What was timed.
        timing: What was measured; ``order`` and ``ms`` have every turn.
        speeds: What is kept of it, see ``found_speeds``.
        left_out: Ids of variants that were not timed, with the reason.
        facts: ``environment_facts`` from before the timing; from now when None.
    """
    manifest = bundle.manifest
    return {
        "model": manifest.name,
        "model_version": manifest.version,
        "contract_hash": manifest.contract_hash,
        "speeds": {name: asdict(speed) for name, speed in speeds.items()},
        "left_out": dict(left_out),
        "order": list(timing.order),
        "turn_ms": {name: list(values) for name, values in timing.ms.items()},
        "environment": dict(facts or environment_facts()),
    }


def render_speeds(report: Mapping[str, Any]) -> Table:
    """Lay a report out for people, the fastest first."""
    facts = report["environment"]
    speeds = sorted(report["speeds"].items(), key=lambda item: -item[1]["over_reference"])
    _, first = speeds[0]
    threads = f", {first['machine']['threads']} threads" if first["machine"]["threads"] else ""
    table = Table(
        title=Text(
            f"{report['model']} {report['model_version']}: {first['turns']} turns each, calls of {first['batch']} "
            f"clip{'s' * (first['batch'] != 1)} of {'x'.join(map(str, first['clip_shape']))}"
        ),
        caption=Text(
            one_line(f"{first['machine']['processor']}{threads}, load {facts['load_average']} before")
        ),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("variant")
    for name in (f"times as fast as {first['reference']}", "95 %", "ms per clip"):
        table.add_column(Text(name), justify="right")
    for name, speed in speeds:
        interval = f"{speed['low']:.2f} to {speed['high']:.2f}"
        table.add_row(Text(name), f"{speed['over_reference']:.2f}", interval, f"{speed['ms_per_clip']:.1f}")
    return table
