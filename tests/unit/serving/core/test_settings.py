from __future__ import annotations

from typing import Any

import pytest

from ivdr_deploy.errors import ConfigError
from ivdr_deploy.serving.core.settings import ServiceSettings
from ivdr_deploy.spec import ViewPlan


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"decode_workers": 0}, "decode_workers must be at least 1"),
        ({"decode_memory_mib": 0}, "decode_memory_mib must be at least 1"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"num_clips": 0}, "num_clips must be at least 1"),
        ({"num_clips": 65}, "num_clips 65 is more than max_clips 64"),
        ({"num_clips": 500}, "num_clips 500 is more than max_clips 64"),
        ({"max_clips": 0}, "max_clips must be between 1 and 1024"),
        ({"max_clips": 2000}, "max_clips must be between 1 and 1024"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ServiceSettings(**values)


def test_plan_is_the_bundles_with_the_endpoints_number_of_clips() -> None:
    plan = ViewPlan(num_clips=4, spatial_crops=3)
    assert ServiceSettings().view_plan(plan) == plan
    assert ServiceSettings(num_clips=21).view_plan(plan) == ViewPlan(num_clips=21, spatial_crops=3)


@pytest.mark.parametrize(
    ("settings", "plan", "said"),
    [
        (ServiceSettings(max_clips=5), ViewPlan(num_clips=6), "the bundle's view plan takes 6 clips"),
        (ServiceSettings(num_clips=22), ViewPlan(spatial_crops=3), "22 clips of a video, each 3 times"),
    ],
)
def test_plan_that_costs_more_than_a_request_may_is_refused(
    settings: ServiceSettings, plan: ViewPlan, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        settings.view_plan(plan)
    assert "max_clips" in caught.value.hint
