"""What ``make bench-serving`` measures, with little of everything."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from examples.serving.accelerator import Accelerator, Cost
from examples.serving.bench_serving import PARTS, main, run
from examples.serving.faults import _longest_gap
from examples.serving.material import make_bundle
from examples.serving.parts import Bench
from examples.serving.traffic import Errand, Exchange
from ivdr_deploy.errors import ServerError
from ivdr_deploy.runtimes.loading import open_model


def test_the_accelerator_takes_its_time_and_gives_what_the_network_gives(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    model, turn = open_model(tiny_bundle, threads=1), tmp_path / "turn"
    clips = np.random.default_rng(0).integers(0, 256, (4, *model.clip.clip_shape), dtype=np.uint8)
    turn.touch()
    with (
        model.runtime,
        Accelerator(model.runtime, Cost(call_ms=200.0, clip_ms=25.0), turn=turn) as accelerator,
    ):
        expected = model.runtime.infer(clips)
        begin, used = time.perf_counter(), time.process_time()
        found = accelerator.infer(clips)
        assert time.perf_counter() - begin >= 0.3
        assert time.process_time() - used < 0.15
    assert np.array_equal(found["logits"], expected["logits"])
    assert Cost().seconds(1) == 0.045
    assert Cost().seconds(16) == 0.12
    assert Cost(most_clips=1).seconds(16) == pytest.approx(16 * 0.045)


def test_who_shares_an_accelerator_waits_for_its_turn(tiny_bundle: Path, tmp_path: Path) -> None:
    turn, cost = tmp_path / "turn", Cost(call_ms=150.0, clip_ms=0.0)
    turn.touch()
    models = [open_model(tiny_bundle, threads=1) for _ in range(2)]
    clip = np.zeros((1, *models[0].clip.clip_shape), dtype=np.uint8)
    with ExitStack() as opened, ThreadPoolExecutor(2) as threads:
        sharing = [opened.enter_context(Accelerator(model.runtime, cost, turn=turn)) for model in models]
        begin = time.perf_counter()
        for done in [threads.submit(one.infer, clip) for one in sharing]:
            done.result()
        assert time.perf_counter() - begin >= 0.3


def test_a_gap_is_the_longest_time_without_a_good_answer() -> None:
    def errand(*tries: tuple[float, int]) -> Errand:
        return Errand(tuple(Exchange(sent=0.0, ended=ended, status=status) for ended, status in tries))

    errands = [errand((9.0, 200)), errand((10.2, 200)), errand((10.3, 500), (12.0, 200)), errand((12.5, 503))]
    assert _longest_gap(errands, since=10.0) == pytest.approx(1.8)
    assert [one.answered for one in errands] == [True, True, True, False]
    with pytest.raises(ServerError, match="nothing was answered any more"):
        _longest_gap(errands, since=13.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--parts", "latency luck"), "there is no part 'luck'"),
        (("--parts", ""), "no part is named"),
        (("--servers", " "), "no server is named"),
    ],
)
def test_a_choice_of_nothing_is_refused_before_anything_is_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--out", str(tmp_path / "serving.json")])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_what_a_server_has_not_is_absent_with_its_reason(tmp_path: Path) -> None:
    out = tmp_path / "serving.json"
    out.write_text(json.dumps({"http": {"extra_ms_2mb": 1.0}, "parts": {}}))
    bench = Bench(bundle=tmp_path, scratch=tmp_path)  # nothing is started
    assert run("update", "torchserve", bench, out)
    report = json.loads(out.read_text())
    assert (report["http"], report["torchserve"]) == ({"extra_ms_2mb": 1.0}, {})
    record = report["parts"]["update torchserve"]
    assert record["figures"] == []
    assert "is for --server http" in record["not_measured"]
    assert record["environment"]["cpu"]


@pytest.mark.exhaustive
def test_every_part_measures_the_http_server(tmp_path: Path) -> None:
    out = tmp_path / "serving.json"
    bench = Bench(
        bundle=make_bundle(tmp_path / "bundle"), scratch=tmp_path, turns=6, seconds=2.0, mutants=60, soak=300
    )
    for part in PARTS:
        assert run(part, "http", bench, out), json.loads(out.read_text())["parts"]
    found = json.loads(out.read_text())["http"]
    assert abs(found["bytes_280kb"] / (281 << 10) - 1) < 0.2
    assert abs(found["bytes_2mb"] / (2.3 * (1 << 20)) - 1) < 0.1
    assert 0 < found["echo_ms_280kb"] < found["http_ms_280kb"]
    assert found["batching_gain"] > 1.1  # of 4 to 6 on a quiet machine; decoding is what a busy one lacks
    assert 0.3 < found["overlap_efficiency"] < 1.3
    assert found["mutants_sent"] >= 60
    assert (found["mutants_undocumented_5xx"], found["worker_deaths"]) == (0, 0)
    assert found["drain_under_way"] > 0
    assert found["drain_accepted_lost"] == 0
    assert found["kill_worker_failed_once"] > 0
    assert found["kill_worker_lost_after_retries"] == 0
    assert found["update_failed_requests"] == 0
    assert set(found["update_answers_by_version"]) == {"1.0", "2.0"}
    assert found["soak_requests"] == 300
    # A part that is measured again takes the place of what it gave before, and nothing else's.
    assert run("drain", "http", bench, out)
    again = json.loads(out.read_text())["http"]
    assert set(again) == set(found)
    assert again["soak_rss_growth"] == found["soak_rss_growth"]
