"""Samples -> named figures, as JSON for machines and a table for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ivdr_deploy._files import atomic_path
from ivdr_deploy._text import one_line
from ivdr_deploy.benchmarks.latency import Samples
from ivdr_deploy.benchmarks.timing import speedup, summarise
from ivdr_deploy.environment import environment_facts
from ivdr_deploy.records import to_dict
from ivdr_deploy.runtimes.base import LoadedModel


def build_report(
    samples: Samples,
    *,
    engine: LoadedModel,
    reference: LoadedModel | None,
    threads: int | None,
    not_compared: str = "",
) -> dict[str, Any]:
    """Turn samples into a flat table of named figures, plus ``failed`` (videos that were no use) and ``environment``.

    Figures are per video, all its clips together. ``total`` is decode + preprocess + infer, one after the
    other. ``videos_per_s`` was measured with one decoder running ahead of the engine, ``videos_per_s_serial``
    is what ``total`` gives. The roofs are what would be reached if nothing but one thread of decoding, or
    nothing but the engine, took any time. ``speedup`` is the reference over the engine, pair by pair; without a
    reference it and ``reference_infer`` are absent.

    Args:
        samples: What was measured.
        engine: The model that was measured.
        reference: The variant it was compared with.
        threads: What the runtimes were told; None is their own choice.
        not_compared: Why there is no reference.
    """
    stages = {
        "decode": samples.decode_ms,
        "preprocess": samples.preprocess_ms,
        "infer": samples.infer_ms,
        "total": [
            math.fsum(parts)
            for parts in zip(samples.decode_ms, samples.preprocess_ms, samples.infer_ms, strict=True)
        ],
    }
    if reference is not None:
        stages["reference_infer"] = samples.reference_ms
    summaries = {stage: summarise(values) for stage, values in stages.items()}
    figures: dict[str, Any] = {
        "model": engine.name,
        "model_version": engine.version,
        "contract_hash": engine.contract_hash,
        "variant": engine.variant,
        "engine": engine.runtime.description,
        "reference": reference.runtime.description if reference is not None else None,
        "not_compared": not_compared or None,
        "threads": threads,
        "videos": samples.videos,
        "videos_failed": len(samples.failed),
        "failed": [{"uri": uri, "code": code} for uri, code in samples.failed.items()],
        "rounds": samples.rounds,
        "clips_per_video": samples.clips / samples.videos,
        "view_plan": str(engine.view_plan),
        "percentile_method": "nearest rank",
    }
    for stage, summary in summaries.items():
        figures |= {f"{stage}_ms_{name}": value for name, value in asdict(summary).items()}
    figures |= {
        "videos_per_s": samples.videos / samples.pipeline_seconds,
        "videos_per_s_serial": 1000.0 / summaries["total"].mean,
        "roof_decode_videos_per_s": 1000.0 / summaries["decode"].mean,
        "roof_infer_videos_per_s": 1000.0 / summaries["infer"].mean,
    }
    if reference is not None:
        ratios = asdict(speedup(samples.infer_ms, samples.reference_ms))
        figures |= {f"speedup_{name}": value for name, value in ratios.items()}
    figures |= {f"max_abs_diff_{name}": value for name, value in samples.max_abs_diff.items()}
    return {**figures, "environment": environment_facts()}


def write_report(report: Mapping[str, Any], path: Path) -> None:
    """Write a report as JSON; the file is complete or absent."""
    with atomic_path(path) as temporary:
        temporary.write_text(
            json.dumps(to_dict(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
            encoding="utf-8",
        )


def render_report(report: Mapping[str, Any]) -> Table:
    """Lay a report out for people."""
    facts = report["environment"]
    table = Table(
        title=Text(
            f"{report['model']} {report['model_version']}: {report['videos']} videos of "
            f"{report['view_plan']}, {report['rounds']} rounds"
        ),
        caption=Text(
            one_line(f"{facts['cpu']}, {facts['cores']} cores, load {facts['load_average']}; nearest rank")
        ),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("ms per video")
    for name in ("p50", "p95", "p99", "mean"):
        table.add_column(name, justify="right")
    names = {stage: stage for stage in ("decode", "preprocess", "infer", "total")}
    if report["reference"]:
        names["reference_infer"] = f"infer, {report['reference']}"
    for stage, name in names.items():
        cells = (f"{report[f'{stage}_ms_{column}']:.1f}" for column in ("p50", "p95", "p99", "mean"))
        table.add_row(Text(one_line(name)), *cells, end_section=stage in ("total", "reference_infer"))
    per_second = {
        "videos/s, decoding ahead": report["videos_per_s"],
        "videos/s, one after the other": report["videos_per_s_serial"],
        "roof: decoding alone, one thread": report["roof_decode_videos_per_s"],
        "roof: engine alone": report["roof_infer_videos_per_s"],
    }
    for name, value in per_second.items():
        table.add_row(name, f"{value:.1f}")
    if not report["reference"]:
        return table
    table.add_section()
    middle_half = f"{report['speedup_p25']:.2f} to {report['speedup_p75']:.2f}"
    table.add_row(f"speed-up over the reference (half: {middle_half})", f"{report['speedup_median']:.2f}x")
    return table
