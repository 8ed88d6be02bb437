from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import make_tiny_checkpoint
from rich.console import Console

from ivdr_deploy.benchmarks.latency import Samples
from ivdr_deploy.benchmarks.report import build_report, render_report, write_report
from ivdr_deploy.benchmarks.speeds import render_speeds
from ivdr_deploy.runtimes.base import LoadedModel
from ivdr_deploy.runtimes.loading import open_model

SAMPLES = Samples(
    videos=2,
    clips=6,
    rounds=2,
    failed={"bad.mp4": "unreadable"},
    decode_ms=[20.0, 20.0, 20.0, 20.0],
    preprocess_ms=[1.0, 2.0, 3.0, 4.0],
    infer_ms=[10.0, 10.0, 10.0, 10.0],
    reference_ms=[20.0, 30.0, 40.0, 50.0],
    pipeline_seconds=0.05,
    max_abs_diff={"logits": 1e-6},
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    model = open_model(make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"))
    with model.runtime:
        yield model


@pytest.fixture
def report(model: LoadedModel) -> dict:
    return build_report(SAMPLES, engine=model, reference=model, threads=2)


NAME = "[/bold]m[red][a1::b2]"


def test_names_in_reports_are_no_markup_to_the_tables(report):
    """They come from manifests and addresses; rich raises for a tag that closes nothing, and swallows others."""
    strange = {**report, "model": NAME, "view_plan": NAME, "reference": f"{NAME} x"}
    machine = {"processor": NAME, "threads": 2}
    speed = {"machine": machine, "turns": 9, "batch": 1, "clip_shape": (8, 8, 8, 3), "reference": NAME}
    speed |= {"over_reference": 2.0, "low": 1.9, "high": 2.1, "ms_per_clip": 3.0}
    speeds = {
        "model": NAME,
        "model_version": NAME,
        "speeds": {NAME: speed},
        "environment": report["environment"],
    }
    for table in (render_report(strange), render_speeds(speeds)):
        console = Console(width=300, record=True, file=io.StringIO())
        console.print(table)
        assert console.export_text().count(NAME) >= 3


def test_figures_follow_from_the_samples(report):
    expected = {
        "decode_ms_p50": 20.0,
        "preprocess_ms_p50": 2.0,
        "preprocess_ms_p99": 4.0,
        "total_ms_p50": 32.0,
        "total_ms_p95": 34.0,
        "total_ms_mean": 32.5,
        "reference_infer_ms_p95": 50.0,
        "videos_per_s": 40.0,
        "videos_per_s_serial": 1000.0 / 32.5,
        "roof_decode_videos_per_s": 50.0,
        "roof_infer_videos_per_s": 100.0,
        "speedup_median": 3.0,
        "speedup_p25": 2.0,
        "speedup_p75": 4.0,
        "speedup_low": 2.0,
        "speedup_high": 5.0,
        "speedup_pairs": 4,
        "max_abs_diff_logits": 1e-6,
        "videos_failed": 1,
        "threads": 2,
    }

    assert {name: report[name] for name in expected} == pytest.approx(expected)


def test_without_a_reference_there_is_no_ratio(model):
    report = build_report(replace(SAMPLES, reference_ms=[]), engine=model, reference=None, threads=None)

    assert report["reference"] is None
    assert not [name for name in report if name.startswith(("speedup", "reference_infer"))]
    console = Console(width=100)
    with console.capture() as capture:
        console.print(render_report(report))
    assert "speed-up" not in capture.get()


def test_figures_are_flat_and_the_environment_lies_beside_them(report, model):
    nested = [name for name, value in report.items() if isinstance(value, dict | list)]

    assert nested == ["failed", "environment"]
    assert report["contract_hash"] == model.contract_hash
    assert report["engine"] == model.runtime.description


def test_report_is_written_as_json(report, tmp_path: Path):
    path = tmp_path / "build" / "bench" / "tiny.json"

    write_report(report, path)

    assert json.loads(path.read_text()) == report


def test_table_shows_stages_roofs_and_speedup(report):
    console = Console(width=100)
    with console.capture() as capture:
        console.print(render_report(report))
    lines = capture.get().splitlines()

    cells = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in lines if line.startswith("│")}
    assert [cell.strip() for cell in cells["preprocess"]] == ["2.0", "4.0", "4.0", "2.5"]
    assert cells["roof: decoding alone, one thread"][0].strip() == "50.0"
    assert cells["speed-up over the reference (half: 2.00 to 4.00)"][0].strip() == "3.00x"
