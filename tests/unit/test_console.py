from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from ivdr_deploy import _console
from ivdr_deploy._console import done, exiting, print_json, progress
from ivdr_deploy.errors import DataError


def test_an_error_of_ours_is_one_line_with_its_hint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, exiting("ivdr"):
        raise DataError("found nothing", hint="look elsewhere")
    assert ended.value.code == 3
    assert capsys.readouterr().err == "ivdr: found nothing. look elsewhere\n"


def test_a_refused_file_is_one_line_that_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, exiting("ivdr"):
        (tmp_path / "absent" / "file").write_text("x")
    assert ended.value.code == 9
    (line,) = capsys.readouterr().err.splitlines()
    assert "absent/file" in line


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), exiting("ivdr"):
        raise ZeroDivisionError


def test_what_is_next_is_what_a_shell_takes(capsys: pytest.CaptureFixture[str]) -> None:
    done("wrote it", next_command=("ivdr", "show", Path("my run/it's")))
    assert capsys.readouterr().err == "wrote it\nnext: ivdr show 'my run/it'\"'\"'s'\n"


def test_output_that_could_not_be_written_is_noticed_at_the_end() -> None:
    code = "from ivdr_deploy._console import exiting\nwith exiting('ivdr'):\n    print('x')"
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (9, "ivdr: a file: No space left on device\n")


def test_an_error_keeps_its_code_when_nobody_reads_it() -> None:
    code = "from ivdr_deploy import _console, errors\nwith _console.exiting('ivdr'):\n    raise errors.DataError('x')"
    for closing in ("2>&-", ">&- 2>&-", "2>&1 | true; exit ${PIPESTATUS[0]}"):
        words = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {closing}"
        assert subprocess.run(["bash", "-c", words], check=False).returncode == 3, closing


def test_a_result_that_nobody_wants_is_no_error() -> None:
    words = (
        f"{shlex.quote(sys.executable)} -c 'from ivdr_deploy._console import print_json; print_json(1)' >&-"
    )
    ended = subprocess.run(["bash", "-c", words], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still unless a test moves it."""
    now = [1000.0]
    monkeypatch.setattr(_console.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_says_now_and_then_how_far_it_is(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    def items() -> Iterator[int]:
        for number in range(10):
            clock[0] += 12.0
            yield number

    assert list(progress(items(), total=10, description="scoring")) == list(range(10))
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 3 of 10, 0.0833/s, 0:01:24 left",
        "scoring: 6 of 10, 0.0833/s, 0:00:48 left",
        "scoring: 9 of 10, 0.0833/s, 0:00:12 left",
    ]


def test_a_short_run_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(1000), total=1000, description="scoring")) == list(range(1000))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGINT, 130, "ivdr: interrupted\n"), (signal.SIGTERM, 143, "ivdr: ended by SIGTERM\n")],
)
@pytest.mark.parametrize("through_typer", [False, True])
def test_signals_unwind_and_have_their_exit_codes(
    capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int, line: str, through_typer: bool
) -> None:
    before, closed = signal.getsignal(signal.SIGTERM), []
    app = typer.Typer(add_completion=False)

    @app.command()
    def work() -> None:
        try:
            signal.raise_signal(number)
        finally:
            closed.append(True)

    with pytest.raises(SystemExit) as ended, exiting("ivdr"):
        app(args=[]) if through_typer else work()
    assert ended.value.code == code
    assert capsys.readouterr().err == line
    assert closed == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_numbers_that_json_does_not_have_are_never_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json({"value": float("nan")})
    assert capsys.readouterr().out == ""


def test_a_run_whose_end_is_not_known_yet_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(_console, "LINE_SECONDS", 0.0)
    with _console.Meter("scoring") as meter:
        meter(3, None)
        meter(5, 10)
        meter(10, 10)

    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"scoring: 3, \S+/s", first)
    assert re.fullmatch(r"scoring: 5 of 10, \S+/s, 0:00:00 left", second)


@pytest.mark.parametrize(
    ("number", "ended"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_the_first_wish_to_stop_is_told_and_the_second_interrupts(number, ended, capsys) -> None:
    def sigterm(number: int, frame: object) -> None:
        raise SystemExit

    before = signal.signal(signal.SIGTERM, sigterm)
    try:
        reached = False
        with pytest.raises(ended), _console.stopping_softly("stopping soon") as stopping:  # noqa: PT012
            assert not stopping()
            signal.raise_signal(number)
            assert stopping()
            reached = True
        assert reached, "the block went on to its end, and only then was it over"
        with pytest.raises(ended), _console.stopping_softly("stopping soon"):  # noqa: PT012
            signal.raise_signal(number)
            signal.raise_signal(number)
            pytest.fail("the second did not interrupt")
        with _console.stopping_softly("stopping soon") as stopping:
            pass
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "stopping soon\n" * 2
