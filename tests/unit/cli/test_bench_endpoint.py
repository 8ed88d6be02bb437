"""``ivdr bench --endpoint`` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from known_server import known_server
from rights import make_too_deep

from ivdr_deploy.benchmarks.load import LoadGenerator, Step
from ivdr_deploy.cli import _bench_endpoint

LOAD = ("--seconds", 0.3)


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "list.txt").write_text("a.mp4\n")
    return tmp_path / "list.txt"


def test_rates_are_measured_and_reported(ivdr, listed: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    with known_server(2.0) as address:
        url = f"http://127.0.0.1:{address.port}/predictions/known"
        given = ("--endpoint", url, "--videos", listed, "--rate", 60, "--rate", 30, *LOAD, "-o", out)
        code, stdout, stderr = ivdr("bench", *given, "--json")
        assert code == 0, stderr
    report = json.loads(stdout)
    assert report == json.loads(out.read_text())
    assert [step["rate"] for step in report["steps"]] == [60.0, 30.0]
    assert report["steps"][0]["outcomes"] == {"200": report["steps"][0]["requests"]}


def test_a_rate_at_which_nothing_was_answered_is_a_failure(
    ivdr, listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(generator: LoadGenerator, rate: float, seconds: float) -> Step:
        monkeypatch.setattr(
            generator, "_requests", [generator.address.request(b"refuse", content_type="x/y")]
        )
        return open_loop(generator, rate, seconds)

    open_loop = LoadGenerator.open_loop
    monkeypatch.setattr(LoadGenerator, "open_loop", break_down)
    with known_server(2.0) as address:
        url = f"http://127.0.0.1:{address.port}/predictions/known"
        given = ("--endpoint", url, "--videos", listed, "--rate", 30, *LOAD, "-o", tmp_path / "r.json")
        code, _, stderr = ivdr("bench", *given)
    assert (code, "FAIL: no request was answered with a 2xx at 30 requests/s" in stderr) == (1, True)


def test_a_folder_that_could_not_be_read_ends_with_1_and_leaves_the_report(
    ivdr, listed: Path, tmp_path: Path
) -> None:
    (listed.parent / "videos").mkdir()
    (listed.parent / "a.mp4").rename(listed.parent / "videos" / "a.mp4")
    make_too_deep(listed.parent / "videos")
    with known_server(2.0) as address:
        url = f"http://127.0.0.1:{address.port}/predictions/known"
        given = ("--endpoint", url, "--videos", listed.parent / "videos", "--rate", 60, *LOAD)
        code, stdout, stderr = ivdr("bench", *given, "--json", "-o", tmp_path / "r.json")
    assert (code, "left out: 1 folders that cannot be read" in stderr) == (1, True)
    assert json.loads(stdout)["steps"][0]["answered_per_s"] > 0


def test_a_bound_that_no_rate_holds_is_a_failure(ivdr, listed: Path, tmp_path: Path) -> None:
    with known_server(30.0) as address:
        url = f"http://127.0.0.1:{address.port}/predictions/known"
        given = ("--endpoint", url, "--videos", listed, "--p99-ms", 20, *LOAD, "-o", tmp_path / "r.json")
        code, _, stderr = ivdr("bench", *given)
    assert code == 1
    assert "does not hold p99 <= 20 ms at any rate" in stderr
    assert json.loads((tmp_path / "r.json").read_text())["holds_requests_per_s"] is None
    code, _, stderr = ivdr("bench", *given)
    assert code == 8
    assert "is the server running?" in stderr


def test_a_report_that_cannot_be_written_is_noticed_before_the_load_and_loses_no_figure_after_it(
    ivdr, listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    given = ("bench", "--endpoint", "http://127.0.0.1:1/p", "--videos", listed, "--json", "-o")
    code, _, stderr = ivdr(*given, tmp_path / "file" / "r.json")
    assert (code, str(tmp_path / "file") in stderr) == (9, True), "not 8: no server was asked"

    def load_meanwhile(generator: LoadGenerator, rate: float, seconds: float) -> Step:
        (tmp_path / "r.json").mkdir()
        return open_loop(generator, rate, seconds)

    open_loop = LoadGenerator.open_loop
    monkeypatch.setattr(LoadGenerator, "open_loop", load_meanwhile)
    with known_server(2.0) as address:
        url = f"http://127.0.0.1:{address.port}/predictions/known"
        given = ("bench", "--endpoint", url, "--videos", listed, "--rate", 30, *LOAD, "--json")
        code, stdout, stderr = ivdr(*given, "-o", tmp_path / "r.json")
    assert (code, "r.json" in stderr) == (9, True), stderr
    assert json.loads(stdout)["steps"][0]["rate"] == 30.0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "one thing is measured"),
        (("bundle", "--endpoint", "http://127.0.0.1:1/p"), "one thing is measured"),
        (("--endpoint", "127.0.0.1"), "is not the address of an endpoint"),
        (
            ("--endpoint", "http://a..b/predictions/x", "--videos", "LIST"),
            "is not the address of an endpoint",
        ),
        (("--endpoint", f"http://{'a' * 64}.b/p", "--videos", "LIST"), "is not the address of an endpoint"),
        (("--endpoint", "http://127.0.0.1:1/p"), "no videos to send"),
        *(
            (
                ("--endpoint", "http://127.0.0.1:1/p", "--videos", "LIST", *words),
                f"{words[0]} is for a bundle",
            )
            for words in (
                ("--speeds",),
                ("--variant", "onnx-fp32"),
                ("--against", "torch-fp32"),
                ("--device", "cpu"),
                ("--decoder", "pyav"),
                ("--threads", "1"),
                ("--rounds", "0"),
                ("--allow-container", "asf"),
            )
        ),
        *(
            (("bundle", "--videos", "LIST", option, "3"), f"{option} is for a server")
            for option in ("--rate", "--p99-ms", "--clients", "--seconds")
        ),
        *(
            (("bundle", "--speeds", *words), f"{words[0]} does not go with --speeds")
            for words in (
                ("--videos", "LIST"),
                ("--against", "torch-fp32"),
                ("--decoder", "opencv"),
                ("--root", "x"),
                ("--allow-container", "asf"),
            )
        ),
    ],
)
def test_what_makes_no_sense_is_refused(ivdr, listed: Path, given: tuple[str, ...], said: str) -> None:
    code, _, stderr = ivdr("bench", *(str(listed) if word == "LIST" else word for word in given))
    assert code == 2
    assert said in stderr


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "1e300", "1e9", "1e-300"])
def test_a_rate_that_never_ends_or_fills_the_memory_is_refused(ivdr, listed: Path, given: str) -> None:
    words = ("--endpoint", "http://127.0.0.1:1/p", "--videos", listed, "--rate", 30)
    code, _, stderr = ivdr("bench", *words, "--rate", given)
    assert (code, "expected 1 to 1000000" in stderr) == (2, True)


@pytest.mark.parametrize(
    ("option", "given", "said"),
    [
        ("--seconds", "0", "from 0.1 to 3600, found 0"),
        ("--seconds", "nan", "from 0.1 to 3600, found nan"),
        ("--seconds", "inf", "from 0.1 to 3600, found inf"),
        ("--seconds", "1e300", "from 0.1 to 3600, found 1e+300"),
        ("--p99-ms", "-1", "from 0 to 60000, found -1"),
        ("--p99-ms", "nan", "from 0 to 60000, found nan"),
        ("--p99-ms", "inf", "from 0 to 60000, found inf"),
        ("--clients", "0", "--clients must be from 1"),
        ("--clients", "1000000000", "--clients must be from 1"),
    ],
)
def test_a_load_that_never_ends_is_refused(ivdr, listed: Path, option: str, given: str, said: str) -> None:
    code, _, stderr = ivdr("bench", "--endpoint", "http://127.0.0.1:1/p", "--videos", listed, option, given)
    assert (code, said in stderr) == (2, True), stderr


def test_more_videos_than_memory_should_hold_are_refused(
    ivdr, listed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bench_endpoint, "_MOST_BYTES", 0)
    code, _, stderr = ivdr("bench", "--endpoint", "http://127.0.0.1:1/p", "--videos", listed)
    assert (code, "give a shorter list" in stderr) == (2, True)
