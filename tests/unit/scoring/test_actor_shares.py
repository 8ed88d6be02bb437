"""What an actor takes of a cluster, without one."""

from __future__ import annotations

import pytest

from ivdr_deploy.scoring.ray_engine import actor_shares

SMALL, LARGE = {"CPU": 2.0}, {"CPU": 16.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("nodes", "wanted", "gpus", "expected"),
    [
        ([SMALL], 2, 0, (2, 1)),
        ([SMALL, SMALL], 3, 0, (2, 2)),  # an actor of three cores would wait for ever
        ([LARGE, SMALL], 5, 0, (5, 3)),
        ([LARGE, SMALL], 5, 1, (5, 2)),
        ([LARGE | {"GPU": 8.0}], 8, 1, (8, 2)),  # cores for two only
        ([{"GPU": 1.0}, {"CPU": 0.5}], 3, 0, (1, 1)),
    ],
)
def test_an_actor_fits_on_a_node(
    nodes: list[dict[str, float]], wanted: int, gpus: int, expected: tuple[int, int]
) -> None:
    assert actor_shares(nodes, wanted, gpus=gpus) == expected
