from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest

from ivdr_deploy._console import done, print_json, print_text
from ivdr_deploy._text import as_text, cut, one_line, quoted, quoted_few
from ivdr_deploy.errors import DataError
from ivdr_deploy.records import to_dict


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("caf\u00e9", "caf\u00e9"),
        ("caf\udce9", "caf\\xe9"),
        ("\udcc3\udca9", "\u00e9"),  # UTF-8 that was read as ASCII
        ("\ud800", "\\xed\\xa0\\x80"),
        ("\ud800\udce9", "\\xed\\xa0\\x80\\xed\\xb3\\xa9"),
    ],
)
def test_text_that_goes_out_is_valid_unicode(value: str, text: str) -> None:
    assert as_text(value) == text
    assert as_text(text) == text


def test_a_path_gives_the_text_of_its_bytes() -> None:
    assert as_text(Path(os.fsdecode(b"caf\xe9/\xc3\xa9"))) == "caf\\xe9/\u00e9"


def test_a_line_for_people_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_text("not used: a\nPASS\x1b[2J [red]b.mp4")
    done("PASS\n: x", next_command=("ivdr", "show", "a\x1bb"))
    assert capsys.readouterr().err == (
        "not used: a\\u000aPASS\\u001b[2J [red]b.mp4\nPASS\\u000a: x\nnext: ivdr show 'a\\u001bb'\n"
    )


def test_errors_and_records_hold_valid_text() -> None:
    error = DataError("no \udce9", hint="see \udce9")
    assert (str(error), error.to_dict()["hint"]) == ("no \\xe9. see \\xe9", "see \\xe9")
    assert to_dict({"\udce9": ["\udce9"]}) == {"\\xe9": ["\\xe9"]}


def test_an_error_is_one_line_whatever_it_names() -> None:
    error = DataError("a\nERROR root: b\x1b[2J.mp4 is absent", hint="see c\r\n")
    assert str(error) == "a\\u000aERROR root: b\\u001b[2J.mp4 is absent. see c\\u000d\\u000a"
    assert str(error) == f"{error.to_dict()['message']}. {error.to_dict()['hint']}"


def test_one_line_spells_whatever_would_end_it_or_act_on_a_terminal() -> None:
    assert one_line("a\nb\x1b[2J\x85\u2028") == "a\\u000ab\\u001b[2J\\u0085\\u2028"


def test_quoted_is_short() -> None:
    assert len(quoted("x" * 1000)) < 100


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "iso-8859-1", "cp1252"])
def test_json_is_one_line_of_utf8_whatever_the_encoding(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    value = {"caf\u00e9": ["\u65e5\u2028\x85\x7f\n", "\udce9", "\ud800"], "n": [1, None]}
    print_json(value)
    text = written.getvalue().decode("utf-8")
    assert len(text.splitlines()) == 1
    assert json.loads(text) == {
        "caf\u00e9": ["\u65e5\u2028\x85\x7f\n", "\\xe9", "\\xed\\xa0\\x80"],
        "n": [1, None],
    }


def test_a_list_that_is_cut_short_says_so() -> None:
    assert quoted_few([]) == "none"
    assert quoted_few(["a", 1]) == "'a', 1"
    assert quoted_few(list("abcdef")) == "'a', 'b', 'c', 'd', 'e' and 1 more"


def test_text_is_cut_where_there_is_more() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("abcd", 3) == "abc..."
