"""Damaged videos cost the HTTP server nothing but their own answers."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def served(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving("http", tiny_bundle, tmp_path_factory.mktemp("http")) as running:
        yield running
        assert running.process.poll() is None


@pytest.mark.parametrize(
    ("count", "odd"), [(100, False), pytest.param(1500, True, marks=pytest.mark.exhaustive)]
)
def test_damaged_videos_are_answered_and_leave_the_server_as_it_was(
    count: int,
    odd: bool,
    served: Served,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    originals = [make_video(tmp_path / f"whole.{kind}", num_frames=25, size=(96, 64)) for kind in CODECS]
    files: list[bytes] = []
    if odd:
        monkeypatch.setenv("IVDR_TEST_DATA", str(request.getfixturevalue("shared_data")))
        files = odd_files()
    send_all(served.client, [*originals * 8, *mutants(originals, count // 4, seed=1)])  # memory is warm then
    before, processes = memory(served), served.workers()
    said = send_all(served.client, [*files, *mutants(originals, count)])
    assert send_all(served.client, originals) == {(200, ""): 3}
    assert memory(served) < before + MORE_BYTES
    assert served.workers() == processes
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and the setting is glibc's")
def test_the_memory_that_a_body_comes_in_is_used_again(served: Served) -> None:
    (worker,) = served.workers()

    def page_faults() -> int:
        return int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[7])

    body, count = b"no video" * 300_000, 20
    assert set(send_all(served.client, [body] * count)) == {(400, "unreadable")}
    before = page_faults()
    send_all(served.client, [body] * count)
    assert page_faults() - before < count * len(body) / 4096  # otherwise twice as many as it has pages


def test_what_counts_as_undocumented() -> None:
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
