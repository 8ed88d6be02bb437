from __future__ import annotations

from pathlib import Path

import pytest

from ivdr_deploy._console import exiting
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
