from __future__ import annotations

from dataclasses import replace

import pytest
import run_plans

from ivdr_deploy.errors import ConfigError
from ivdr_deploy.scoring.plan import ScoreOptions, name_differences
from ivdr_deploy.spec import ViewPlan

PLAN = replace(run_plans.PLAN, top_k=5, limits={"max_bytes": 100})


def test_equal_plans_have_the_same_run_id():
    again = replace(PLAN)

    assert again.run_id == PLAN.run_id


@pytest.mark.parametrize(
    "change",
    [
        {"ivdr_version": "0.2.0"},
        {"software": {"av": "18"}},
        {"share": "1/2"},
        {"model_sha256": "bc"},
        {"runtime": "torch 2.14"},
        {"variant": "torch-fp32"},
        {"contract_hash": "cd"},
        {"top_k": 4},
        {"outputs": ("inter",)},
        {"view_plan": ViewPlan(num_clips=3)},
        {"hash_files": True},
        {"decoder": "opencv"},
        {"limits": {"max_bytes": 99}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_rows_changes_the_run_id_and_is_named(change):
    other = replace(PLAN, **change)

    assert other.run_id != PLAN.run_id
    (name,) = PLAN.differences(other)
    assert name.split(".")[0] == next(iter(change))


def test_a_difference_is_short_and_names_the_setting():
    long = replace(PLAN, model_sha256="b" * 64, runtime="x" * 1000, limits={"max_bytes": 99})

    assert PLAN.differences(long) == {
        "model_sha256": "bb, not bbbbbbbbbbbb",
        "runtime": f"{PLAN.runtime}, not {'x' * 60}...",
        "limits.max_bytes": "100, not 99",
    }


def test_a_ledger_that_somebody_made_does_not_fill_a_message():
    made = replace(PLAN, runtime="a\x1b[31m\nb", limits={"x" * 200 + str(i): 1 for i in range(500)})
    found = PLAN.differences(made)
    assert found["runtime"].endswith("not a\\u001b[31m\\u000ab")
    named = name_differences(found)
    assert named.endswith(f"; and {len(found) - 50} more")
    assert len(named) < 8000
    assert name_differences({"top_k": "1, not 2"}) == "top_k: 1, not 2"


def test_options_refuse_what_is_no_output():
    with pytest.raises(ConfigError, match="unknown output 'logits'; expected any of feature, inter, intra"):
        ScoreOptions(outputs=("logits",))
    with pytest.raises(ConfigError, match="top_k must be at least 1, found 0"):
        ScoreOptions(top_k=0)
