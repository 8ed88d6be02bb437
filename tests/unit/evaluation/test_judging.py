"""Each check by itself, on records made by hand."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest

from ivdr_deploy.artifacts.manifest import OutputParity
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.evaluation.invariance import BatchInvariance, Company, Sensitivity
from ivdr_deploy.evaluation.judging import judge
from ivdr_deploy.evaluation.records import VariantRecord, VideoColumns
from ivdr_deploy.evaluation.thresholds import THRESHOLDS, Thresholds, parse_thresholds, thresholds_for
from ivdr_deploy.evaluation.verify_report import VariantReport, VerifyReport
from ivdr_deploy.spec import Precision

VIDEOS = 100


def parity(relative: float = 0.0, cosine: float = 1.0, tolerance: float = 1e-4) -> tuple[OutputParity, ...]:
    """A difference of so much of the size 3."""
    return (
        OutputParity(output="logits", max_abs_diff=3 * relative, min_cosine=cosine, tolerance=3 * tolerance),
    )


def columns(*, flips: int = 0, margin: float = 0.0, **changes: Any) -> VideoColumns:
    values: dict[str, Any] = {
        "uris": tuple(f"{index}.mp4" for index in range(VIDEOS)),
        "truth": ("sit",) * VIDEOS,
        "expected": ("sit",) * VIDEOS,
        "found": ("bow",) * flips + ("sit",) * (VIDEOS - flips),
        "margins": (margin,) * flips + (0.0,) * (VIDEOS - flips),
        "expected_confidence": (0.9,) * VIDEOS,
        "confidence": (0.9,) * VIDEOS,
        "expected_hits": (True,) * VIDEOS,
        "hits": (True,) * VIDEOS,
    }
    return VideoColumns(**{**values, **changes})


def record(precision: Precision = "fp32", **changes: Any) -> VariantRecord:
    tolerance = THRESHOLDS[precision].tolerance
    sound = VariantRecord(
        variant="onnx",
        variant_sha256="0" * 64,
        precision=precision,
        reference="torch",
        runtime="a runtime",
        view_plan="2 clips",
        decoder="pyav",
        data="test.csv",
        measured_at="2026-01-01T00:00:00+00:00",
        tolerance=tolerance,
        golden=parity(tolerance=tolerance),
        outputs=parity(tolerance=tolerance),
        batch=BatchInvariance(
            clips=4, sizes=(2, 3), flips=0, max_flip_margin=0.0, outputs=parity(tolerance=tolerance)
        ),
        sensitivity=(Sensitivity(output="logits", moved=1.0, error=1e-6),),
        videos=columns(),
    )
    return replace(sound, **changes)


def failed(found: VariantRecord, **thresholds: float) -> set[str]:
    report = judge(found, thresholds_for(found.precision, thresholds))
    assert report.passed == (not report.failures)
    return {check.name for check in report.failures}


def test_a_sound_variant_passes_every_check() -> None:
    report = judge(record(), thresholds_for("fp32"))
    assert report.passed
    assert [check.name for check in report.checks] == [
        "golden", "outputs", "cosine", "finite", "agreement", "sure_flips", "accuracy", "recall", "confidence",
        "abstain", "batch", "sensitivity",
    ]  # fmt: skip
    assert all(check.text for check in report.checks)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"golden": parity(2e-4)}, {"golden"}),
        ({"outputs": parity(2e-4)}, {"outputs"}),
        ({"outputs": parity(float("inf"), -1.0)}, {"outputs", "cosine"}),
        ({"outputs": parity(5e-5, cosine=0.9)}, {"cosine"}),
        ({"not_finite": 1}, {"finite"}),
        ({"videos": columns(flips=1, margin=0.3)}, {"agreement", "sure_flips"}),
        ({"videos": columns(hits=(False,) * 20 + (True,) * 80)}, {"recall"}),
        ({"videos": columns(confidence=(0.89,) * VIDEOS)}, {"confidence"}),
        ({"videos": columns(confidence=(0.91,) * VIDEOS)}, {"confidence"}),  # too sure is as wrong
        (
            {"videos": columns(confidence=(0.49, *(0.9,) * 99), expected_confidence=(0.51, *(0.9,) * 99))},
            {"abstain"},
        ),
        (
            {"batch": BatchInvariance(clips=4, sizes=(2,), flips=1, max_flip_margin=0.1, outputs=parity())},
            {"batch"},
        ),
        (
            {"batch": BatchInvariance(clips=4, sizes=(2,), flips=0, max_flip_margin=0, outputs=parity(1.0))},
            {"batch"},
        ),
        ({"sensitivity": (Sensitivity(output="inter", moved=1e-4, error=1e-5),)}, {"sensitivity"}),
        ({"sensitivity": (Sensitivity(output="inter", moved=0.0, error=0.0),)}, {"sensitivity"}),
    ],
)
def test_what_is_wrong_fails_by_its_name(changes: dict[str, Any], names: set[str]) -> None:
    assert failed(record(**changes)) == names


def test_a_check_says_what_it_found_and_what_was_expected() -> None:
    batch = BatchInvariance(
        clips=4,
        sizes=(2, 3),
        flips=1,
        max_flip_margin=0.25,
        outputs=parity(2e-4),
        calls=(Company(size=8, place=2),),
        left_out=(64,),
    )
    wrong = record(
        failure="on the golden clips (RuntimeError: gone)",
        golden=parity(2e-4),
        outputs=parity(2e-4, cosine=0.9),
        not_finite=3,
        videos=columns(
            flips=2, margin=0.3, confidence=(0.4,) * 5 + (0.9,) * 95, hits=(False,) * 20 + (True,) * 80
        ),
        batch=batch,
        sensitivity=(Sensitivity(output="inter", moved=1e-4, error=1e-5),),
    )
    said = {check.name: check.text for check in judge(wrong, thresholds_for("fp32")).checks}
    differs = "logits differs by 6.00e-04 (tolerance 3.00e-04)"
    assert said == {
        "runs": "it failed on the golden clips (RuntimeError: gone), expected to run through",
        "golden": differs,
        "outputs": differs,
        "cosine": "smallest cosine 0.900000 (logits), expected 0.9999",
        "finite": "NaN, infinity or nothing for 3 videos, expected none",
        "agreement": "98 of 100 videos have the reference's label (98.0%, 0 ties included), expected 100.0%",
        "sure_flips": "the surest label that flipped has a margin of 0.3000, expected at most 0.0001",
        "accuracy": said["accuracy"],
        "recall": said["recall"],
        "confidence": "the mean confidence went from 0.9000 to 0.8750, expected within 0.001",
        "abstain": "5 of 100 videos cross the confidence 0.5, expected at most 0.0%",
        "batch": "1 flips of 4 clips over batches of 2, 3 at every place and calls over the videos (place 3 of 8); "
        f"64 left out for time, with a margin of up to 0.2500 (a tie is 0.0001); {differs}",
        "sensitivity": "a real change of the input moves inter by 1.0e-04, 10 times the parity error 1.0e-05, "
        "expected 100 times",
    }
    assert said["accuracy"].startswith("accuracy changed by -2.0% [")
    assert said["recall"].startswith("R@1 changed by -20.0% [")
    assert said["recall"].endswith("], may fall by 0.0%")


def test_what_is_exactly_at_its_bound_passes() -> None:
    limits = thresholds_for("int8")
    at = record(
        "int8",
        outputs=parity(cosine=limits.min_cosine),
        videos=columns(flips=1, margin=limits.max_flip_margin),
        batch=BatchInvariance(
            clips=4, sizes=(2,), flips=1, max_flip_margin=limits.tie_margin, outputs=parity()
        ),
        sensitivity=(Sensitivity(output="logits", moved=limits.min_sensitivity, error=1.0),),
    )
    assert failed(at) == set()


def test_labels_that_agree_are_within_the_tightest_bounds() -> None:
    assert failed(record(), max_flip_margin=0.0, tie_margin=0.0, max_confidence_shift=0.0) == set()


def test_one_output_of_several_is_enough_to_fail() -> None:
    """The first, the last and the one between: none is excused by the others."""
    names = ("logits", "feature", "inter")
    for wrong in names:
        moved = tuple(
            Sensitivity(output=name, moved=0.0 if name == wrong else 1.0, error=1e-6) for name in names
        )
        turned = tuple(
            replace(parity(cosine=0.5 if name == wrong else 1.0)[0], output=name) for name in names
        )
        off = tuple(replace(parity(1e-3 if name == wrong else 0.0)[0], output=name) for name in names)
        assert failed(record(sensitivity=moved)) == {"sensitivity"}
        assert failed(record(outputs=turned)) == {"cosine"}
        assert failed(record(outputs=off)) == {"outputs"}
        assert failed(record(golden=off)) == {"golden"}


def test_the_share_of_flips_is_judged_by_precision() -> None:
    allowed = {"fp32": 0, "fp16": 1, "bf16": 1, "int8": 3, "fp8": 3}
    assert set(allowed) == set(get_args(Precision))
    for precision, flips in allowed.items():
        margin = THRESHOLDS[precision].max_flip_margin / 2
        within, beyond = (
            record(precision, videos=columns(flips=count, margin=margin)) for count in (flips, flips + 1)
        )
        tie = precision == "fp32"  # half of what fp32 explains is a tie, which is not counted
        assert failed(within) == set()
        assert failed(beyond) == (set() if tie else {"agreement"})
    assert failed(record(videos=columns(flips=1, margin=2e-4))) == {"agreement", "sure_flips"}


def test_a_flip_of_a_sure_label_fails_however_few_there_are() -> None:
    for precision in get_args(Precision):
        limit = THRESHOLDS[precision].max_flip_margin
        sure = record(precision, videos=columns(flips=1, margin=1.1 * limit))
        assert "sure_flips" in failed(sure)


def test_accuracy_fails_when_the_fall_is_certain() -> None:
    loose = {"min_agreement": 0.0, "max_flip_margin": 1.0, "max_confidence_shift": 1.0}
    fallen = {count: record(videos=columns(flips=count, margin=0.1)) for count in (3, 20)}
    assert failed(fallen[3], **loose) == set()  # three of a hundred may be chance
    assert failed(fallen[20], **loose) == {"accuracy"}
    assert failed(fallen[20], **loose, max_drop=0.2) == set()


def test_another_tolerance_is_applied_to_what_was_measured() -> None:
    found = record(golden=parity(2e-4), outputs=parity(2e-4))
    assert failed(found) == {"golden", "outputs"}
    assert failed(found, tolerance=3e-4) == set()
    assert failed(record(outputs=parity(5e-5)), tolerance=4e-5) == {"outputs"}
    report = judge(found, thresholds_for("fp32", {"tolerance": 3e-4}))
    assert report.figures()["max_relative_diff"] == pytest.approx(2e-4)


def test_the_reference_is_judged_without_comparison() -> None:
    own = record(variant="torch", outputs=(), videos=columns())
    report = judge(own, thresholds_for("fp32"))
    assert [check.name for check in report.checks] == ["golden", "finite", "batch", "sensitivity"]
    assert report.agreement is None
    assert report.accuracy_change is None
    assert report.accuracy is not None
    assert "confidence_shift" not in report.figures()


def test_figures_hold_what_was_measured_and_only_finite_numbers() -> None:
    figures = judge(record(videos=columns(flips=2, margin=0.1)), thresholds_for("fp32")).figures()
    assert figures["agreement"] == pytest.approx(0.98)
    assert figures["accuracy_change"] == pytest.approx(-0.02)
    assert figures["accuracy_change_low"] < -0.02 < figures["accuracy_change_high"]
    assert (figures["flips"], figures["batch_flips"], figures["ece"]) == (2, 0, pytest.approx(0.08))
    broken = judge(record(outputs=parity(float("inf"), -1.0)), thresholds_for("fp32")).figures()
    assert "max_relative_diff" not in broken


@pytest.mark.parametrize(
    "column", ["expected", "found", "margins", "expected_confidence", "confidence", "hits"]
)
def test_a_record_without_a_column_compares_nothing_and_is_refused(column: str) -> None:
    """Without margins, for example, no flip would be found."""
    with pytest.raises(ConfigError, match="some are empty, so nothing can be compared"):
        columns(flips=50, margin=0.5, **{column: ()})


def test_a_bundle_of_which_nothing_was_judged_has_not_passed() -> None:
    known = {
        "bundle": "b",
        "name": "n",
        "version": "1",
        "contract_hash": "0",
        "view_plan": "2 clips",
        "data": None,
    }
    sound = judge(record(), thresholds_for("fp32"))
    assert VerifyReport(videos=VIDEOS, variants=(sound,), **known).passed  # type: ignore[arg-type]
    assert not VerifyReport(videos=0, variants=(), **known).passed  # type: ignore[arg-type]


def test_settings_of_thresholds_are_read_strictly() -> None:
    assert parse_thresholds(["abstain=0.7", "min_agreement = 1"]) == {"abstain": 0.7, "min_agreement": 1.0}
    for wrong in ("abstain", "abstain=x", "abstain=-1", "abstain=nan", "abstain=inf", "fp32=1", "=1"):
        with pytest.raises(ConfigError) as caught:
            parse_thresholds([wrong])
        assert "\n" not in str(caught.value)


def test_a_report_without_a_run_has_not_passed() -> None:
    assert not VariantReport(id="trt", not_run="no GPU").passed


def test_every_threshold_is_the_one_that_the_page_promises() -> None:
    """A bound that was loosened would still be a bound, and every other test would pass."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "formats.md").read_text(encoding="utf-8")
    table = page.split("## What `ivdr verify` judges", 1)[1].split("\n## ", 1)[0]
    number = r"\d[\d.e-]*"
    promised = {
        name: [float(value) for value in values.split(", ")]
        for name, values in re.findall(rf"`(\w+)` ({number}(?:, {number}){{3}})", table)
    }
    promised["tie_margin"] = [float(re.findall(rf"`tie_margin` ({number})", table)[0])] * 4
    promised["abstain"] = [float(re.findall(rf"`abstain` \(({number})\)", table)[0])] * 4
    found = {
        field.name: [
            getattr(THRESHOLDS[precision], field.name) for precision in ("fp32", "fp16", "bf16", "int8")
        ]
        for field in fields(Thresholds)
    }
    assert promised == found
    assert THRESHOLDS["fp8"] == THRESHOLDS["int8"]


def test_every_precision_has_thresholds_and_fewer_bits_looser_ones() -> None:
    assert set(THRESHOLDS) == set(get_args(Precision))
    ordered = [THRESHOLDS[precision] for precision in ("fp32", "fp16", "bf16", "int8")]
    for fine, coarse in pairwise(ordered):
        assert fine.tolerance < coarse.tolerance
        assert fine.min_cosine > coarse.min_cosine
        assert fine.min_agreement >= coarse.min_agreement
        assert fine.max_flip_margin < coarse.max_flip_margin
        assert fine.min_sensitivity > coarse.min_sensitivity
