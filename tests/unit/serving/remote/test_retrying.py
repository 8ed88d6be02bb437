from __future__ import annotations

import email.utils
import json
import sys

import pytest

import ivdr_deploy as ivdr
from ivdr_deploy import errors
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.serving.remote.answers import failure_of, result_of
from ivdr_deploy.serving.remote.retrying import Retry, Schedule, passes, retry_after


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_waits_double_up_to_a_bound_and_are_drawn_from_nothing_to_all_of_it() -> None:
    retry = Retry(first_seconds=1.0, most_seconds=5.0, deadline_seconds=1000.0, attempts=6)
    for chance, expected in ((1.0, [1.0, 2.0, 4.0, 5.0, 5.0, None]), (0.0, [0.0] * 5 + [None])):
        schedule = Schedule(retry, clock=Clock(), chance=lambda chance=chance: chance)  # type: ignore[misc]
        found = []
        for _ in range(6):
            schedule.remaining()
            found.append(schedule.wait_seconds())
        assert found == expected


def test_what_a_server_asks_for_comes_first_and_chance_on_top() -> None:
    schedule = Schedule(Retry(first_seconds=1.0), clock=Clock(), chance=lambda: 0.5)
    schedule.remaining()
    assert schedule.wait_seconds(asked=7.0) == 7.5


def test_nothing_is_waited_for_that_ends_after_the_deadline() -> None:
    clock = Clock()
    schedule = Schedule(Retry(deadline_seconds=10.0), clock=clock, chance=lambda: 0.0)
    assert schedule.remaining() == 10.0
    assert schedule.wait_seconds(asked=11.0) is None
    assert schedule.wait_seconds(asked=9.0) == 9.0
    clock.now += 9.5
    assert schedule.remaining() == 0.5
    assert schedule.wait_seconds(asked=1.0) is None
    clock.now += 9.5
    assert schedule.remaining() == 0.0


def test_any_number_of_tries_has_a_wait() -> None:
    schedule = Schedule(
        Retry(first_seconds=0.001, most_seconds=0.5, attempts=5000), clock=Clock(), chance=lambda: 1.0
    )
    waits = [schedule.remaining() and schedule.wait_seconds() for _ in range(2000)]
    assert waits[-1] == 0.5


def test_one_attempt_sends_nothing_again() -> None:
    schedule = Schedule(Retry(attempts=1), clock=Clock())
    schedule.remaining()
    assert schedule.wait_seconds() is None


@pytest.mark.parametrize(
    "wrong",
    [{"attempts": 0}, {"deadline_seconds": 0}, {"first_seconds": -1.0}, {"most_seconds": float("nan")}],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Retry(**wrong)  # type: ignore[arg-type]


def test_which_failures_pass() -> None:
    died = '{"code": 507, "type": "InternalServerException", "message": "Worker died."}'
    assert passes(429, "")
    assert passes(503, "")
    assert passes(500, died)
    assert passes(507, died)
    assert not passes(500, '{"code": "inference_failed"}')
    assert not passes(422, died)


def test_a_time_to_come_back_is_a_number_or_a_date() -> None:
    assert retry_after(None) == 0.0
    assert retry_after(" 7 ") == 7.0
    assert retry_after("soon") == 0.0
    assert retry_after("-3") == 0.0
    assert retry_after(email.utils.formatdate(1000.0, usegmt=True), now=940.0) == 60.0
    assert retry_after(email.utils.formatdate(1000.0, usegmt=True), now=2000.0) == 0.0


def kinds(kind: type[errors.IvdrError]) -> list[type[errors.IvdrError]]:
    """Return the kinds of ``ivdr_deploy.errors``; what other modules raise for themselves alone reaches no client."""
    public = [sub for sub in kind.__subclasses__() if sub.__module__ == errors.__name__]
    return [kind, *(inner for sub in public for inner in kinds(sub))]


@pytest.mark.parametrize("kind", kinds(errors.IvdrError)[1:])
def test_every_error_arrives_as_what_it_was_raised_as(kind: type[errors.IvdrError]) -> None:
    error = kind("what was found", hint="what to do")
    found = failure_of(400, json.dumps(error.to_dict()).encode())
    assert type(found) is kind
    assert (found.message, found.hint) == (error.message, error.hint)


@pytest.mark.parametrize(
    ("status", "content", "kind", "words"),
    [
        (503, b'{"code": 503, "message": "no worker"}', errors.ServerError, "no worker"),
        (413, b"", errors.VideoLimitError, "answered 413"),
        (429, b"<html>busy</html>", errors.QueueFullError, "busy"),
        (502, b"\xff" * 5000, errors.ServerError, "answered 502"),
        (404, b"[1]", errors.ServerError, "answered 404"),
        (500, b"[" * 100_000, errors.ServerError, "answered 500"),
    ],
)  # fmt: skip
def test_answers_of_others_keep_their_words(
    status: int, content: bytes, kind: type[Exception], words: str
) -> None:
    found = failure_of(status, content)
    assert type(found) is kind
    assert words in found.message
    assert len(found.message) < 1200


def test_words_of_a_server_stay_on_a_line() -> None:
    body = json.dumps({"message": "one\ntwo\x1b[31m", "hint": {"a": ["b" * 5000]}}).encode()
    found = failure_of(500, body)
    assert "one\\u000atwo\\u001b[31m" in found.message
    assert len(found.hint) < 200


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"<html>",
        b'{"video": 1, "view_plan": 2, "model": 3}',
        b'{"predictions": [{"label": "x", "score": 1' + b"0" * 400 + b"}]}",
    ],
)
def test_a_page_of_something_else_is_no_result(content: bytes) -> None:
    with pytest.raises(errors.ServerError, match="none of an ivdr endpoint"):
        result_of(content, request_id="")


def test_without_httpx_the_client_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    for kind in (ivdr.Client, ivdr.AsyncClient):
        with pytest.raises(errors.MissingDependencyError, match=r"ivdr-deploy\[client\]"):
            kind("http://127.0.0.1:8080", "tiny")
