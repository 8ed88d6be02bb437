from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from ivdr_deploy.errors import ConfigError
from ivdr_deploy.records import from_dict, parse_json, require_range, to_dict


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 1.0
    sizes: tuple[int, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    mode: Literal["fast", "slow"] = "fast"
    limit: int | None = None
    inner: Inner = field(default_factory=Inner)
    counts: dict[str, int] = field(default_factory=dict)
    rows: tuple[Inner, ...] = ()
    switch: bool = False


def test_the_types_of_a_record_are_found_once_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Row:
        name: str
        size: int | None = None

    find, found = typing.get_type_hints, list[type]()

    def find_and_note(cls: type) -> dict[str, Any]:
        found.append(cls)
        return find(cls)

    monkeypatch.setattr(typing, "get_type_hints", find_and_note)
    for place in range(1000):
        assert from_dict(Row, {"name": f"{place}", "size": place}, where="test") == Row(f"{place}", place)
    assert found == [Row]


def test_a_record_survives_the_way_to_a_dict_and_back() -> None:
    record = Outer(
        name="a",
        mode="slow",
        limit=3,
        inner=Inner(rate=2.5, sizes=(1, 2)),
        counts={"x": 1},
        rows=(Inner(),),
        switch=True,
    )
    assert from_dict(Outer, to_dict(record), where="test") == record


@pytest.mark.parametrize(
    "text", ["", "[1,", b"\xff", "[" * 100_000, "9" * 5000, '{"a": ' * 600 + "1" + "}" * 600]
)
def test_json_that_cannot_be_read_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # each says it in its own words
        parse_json(text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("around", ["{}", "[{}]", '{{"a": [1, {{"b": {}}}]}}'])
def test_numbers_that_json_does_not_have_are_refused_wherever_they_stand(number: str, around: str) -> None:
    with pytest.raises(ValueError, match="JSON does not have"):
        parse_json(around.format(number))
    assert parse_json(around.format("1e308"))


def test_what_is_nested_as_deep_as_any_file_of_ours_is_read() -> None:
    for begin, end in (("[", "]"), ('{"a": ', "}")):
        to_dict(parse_json(begin * 100 + "1" + end * 100))
        with pytest.raises(ValueError, match="deeper than 100 levels"):
            parse_json(begin * 101 + "1" + end * 101)


def test_numbers_out_of_range_are_named() -> None:
    require_range("share", 0.0, 1.0, most=1.0)
    require_range("difference", float("inf"))
    for value in (-1.0, 1.5, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"the share is {value:g}, expected 0 to 1"):
            require_range("share", 0.5, value, most=1.0)


def test_an_unknown_key_names_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"file\.toml: unknown key 'nmae'.*did you mean 'name'"):
        from_dict(Outer, {"nmae": "a"}, where="file.toml")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="'name' is missing"):
        from_dict(Outer, {}, where="file.toml")


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"name": 1}, "name: expected str"),
        ({"name": "a", "limit": "3"}, "limit: expected int"),
        ({"name": "a", "limit": True}, "limit: expected int"),
        ({"name": "a", "switch": 1}, "switch: expected bool"),
        ({"name": "a", "mode": "quick"}, "mode: expected one of 'fast', 'slow'"),
        ({"name": "a", "inner": 3}, "inner: expected a table"),
        ({"name": "a", "inner": {"rate": "x"}}, "inner: rate: expected float"),
        ({"name": "a", "inner": {"sizes": 3}}, "sizes: expected a list"),
        ({"name": "a", "inner": {"pair": [1, 2, 3]}}, "pair: expected a list of 2"),
        ({"name": "a", "counts": [1]}, "counts: expected a table"),
        ({"name": "a", "rows": [{"rate": 1}, {"rat": 2}]}, r"rows\[1\]: unknown key 'rat'"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(values: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError, match=place):
        from_dict(Outer, values, where="test")


def test_an_int_is_taken_for_a_float_and_becomes_one() -> None:
    rate = from_dict(Inner, {"rate": 2}, where="test").rate
    assert isinstance(rate, float)
    assert rate == 2.0


def test_a_choice_is_the_one_that_was_declared() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Choice:
        crops: Literal[1, 3] = 1

    assert isinstance(from_dict(Choice, {"crops": 3.0}, where="test").crops, int)
    for wrong in (True, 2, "1"):
        with pytest.raises(ConfigError, match="expected one of 1, 3"):
            from_dict(Choice, {"crops": wrong}, where="test")


def test_a_number_too_large_for_a_float_is_refused() -> None:
    with pytest.raises(ConfigError, match="is too large"):
        from_dict(Inner, {"rate": 10**400}, where="test")


@pytest.mark.parametrize(
    "values",
    [
        {"x" * 10_000_000: 1},
        {"name": ["x" * 10_000]},
        {"name": "a", "mode": "x" * 10_000_000},
        {"name": "a", "counts": {"x" * 10_000_000: "1"}},
        {"name": "a", "inner": list(range(100_000))},
        {"name": "a", "inner": {"pair": ["x"] * 100_000}},
    ],
    ids=["key", "type", "choice", "place", "table", "list"],
)
def test_a_message_shows_little_of_what_was_sent(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Outer, values, where="test")
    assert len(str(caught.value)) < 400
