"""What an actor takes of a cluster, and what it is given, without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivdr_deploy.scoring.inputs import Input
from ivdr_deploy.scoring.ray_engine import actor_shares, found_everywhere
from ivdr_deploy.scoring.shard import make_shard

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


def test_files_of_a_shard_are_found_from_every_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes of a cluster do not start where the command does."""
    shard = make_shard("run", [Input(0, "a.mp4", None, "v", "k", "videos/a.mp4")])
    monkeypatch.chdir(tmp_path)

    given = found_everywhere(shard)

    assert given.inputs[0].file == str(tmp_path / "videos" / "a.mp4")
    assert (given.name, given.inputs[0].uri) == (shard.name, "a.mp4")
