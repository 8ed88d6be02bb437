"""Damaged videos cost the HTTP server nothing but their own answers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from examples.serving.faults import DOCUMENTED_5XX, odd_files, send_all, undocumented_5xx
from examples.serving.material import CODECS, make_video
from examples.serving.mutants import mutants
from examples.serving.servers import Served, serving

pytestmark = pytest.mark.slow

MORE_BYTES = 50_000_000
ENDED = {400, 413, 415, 422, 504}
"""What a damaged file may be answered with, besides 200 where the damage is not seen."""


def memory(served: Served) -> int:
    return sum(size for _, size in served.memory().values())


@pytest.mark.parametrize(
    ("count", "odd"), [(100, False), pytest.param(1500, True, marks=pytest.mark.exhaustive)]
)
def test_damaged_videos_are_answered_and_leave_the_server_as_it_was(
    count: int, odd: bool, tiny_bundle: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    originals = [make_video(tmp_path / f"whole.{kind}", num_frames=25, size=(96, 64)) for kind in CODECS]
    files: list[bytes] = []
    if odd:
        os.environ.setdefault("IVDR_TEST_DATA", str(request.getfixturevalue("shared_data")))
        files = odd_files()
    with serving("http", tiny_bundle, tmp_path / "server") as served:
        send_all(
            served.client, [*originals * 8, *mutants(originals, count // 4, seed=1)]
        )  # memory is warm then
        before, processes = memory(served), served.workers()
        said = send_all(served.client, [*files, *mutants(originals, count)])
        assert send_all(served.client, originals) == {(200, ""): 3}
        assert memory(served) < before + MORE_BYTES
        assert served.workers() == processes
        assert served.process.poll() is None
    assert sum(said.values()) == count + len(files)
    assert undocumented_5xx(said) == 0
    assert said[0, "none"] == 0
    assert {status for status, _ in said} <= ENDED | {200}
    assert not said[422, "crashed"]
    # The damage is real: of each hundred some are no container any more, and some have broken pictures.
    refused = sum(number for (status, _), number in said.items() if status != 200)
    assert 0.15 * count < refused
    assert said[400, "unreadable"]
    assert said[422, "decode_failed"]


def test_what_counts_as_undocumented() -> None:
    from collections import Counter

    said = Counter(
        {(200, ""): 5, (422, "decode_failed"): 4, (500, "internal"): 2, (503, "server"): 1, (507, "x"): 3}
    )
    assert undocumented_5xx(said) == 6
    assert undocumented_5xx(Counter(dict.fromkeys(DOCUMENTED_5XX, 7))) == 0


def test_mutants_are_drawn_from_their_seed_and_each_is_damaged() -> None:
    originals = [bytes(range(256)) * 20, bytes(reversed(range(256))) * 20]
    drawn = list(mutants(originals, 60))
    assert drawn == list(mutants(originals, 60))
    assert drawn != list(mutants(originals, 60, seed=1))
    assert len(set(drawn)) >= 58
    assert sum(one in originals for one in drawn) <= 1
    cut, same_size = [one for one in drawn if len(one) < 5120], [one for one in drawn if len(one) == 5120]
    assert len(cut) == 20
    assert all(original.startswith(one) for one, original in zip(cut, _turns(originals), strict=True))
    assert len(same_size) == 40


def _turns(originals: list[bytes]) -> list[bytes]:
    return [originals[number % len(originals)] for number in range(20)]
