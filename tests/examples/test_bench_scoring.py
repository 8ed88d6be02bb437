"""What ``make bench-scoring`` refuses, and what becomes of the report of an earlier run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.scoring.bench_scoring import main, run


@pytest.mark.parametrize(
    ("only", "said"),
    [
        ("kill", "there is no part 'kill'"),
        ("plan rays", "there is no part 'rays'"),
        (" ", "no part is named"),
    ],
)
def test_a_part_that_there_is_not_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], only: str, said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--only", only, "--out", str(tmp_path / "r.json")])
    assert ended.value.code == 2
    assert f"{said}. there are: plan, throughput, reference, kills, ray" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_a_part_that_is_not_measured_again_keeps_the_machine_it_was_measured_on(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    run("plan", lambda: {"plan_seconds_1e6": 9.0}, out)
    run("kills", lambda: {"kills": 100, "lost": 0}, out)
    earlier = json.loads(out.read_text())
    elsewhere = {"cpu": "another", "cores": 64}
    for record in earlier["parts"].values():
        record["environment"] = elsewhere
    out.write_text(json.dumps(earlier))

    run("kills", lambda: {"kills": 5}, out)

    found = json.loads(out.read_text())
    assert (found["plan_seconds_1e6"], found["kills"]) == (9.0, 5)
    assert "lost" not in found, "of the run before"
    assert found["parts"]["plan"] == {"figures": ["plan_seconds_1e6"], "environment": elsewhere}
    assert found["parts"]["kills"]["figures"] == ["kills"]
    assert found["parts"]["kills"]["environment"] == found["environment"] != elsewhere
