from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ivdr_deploy._console import done, exiting
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
