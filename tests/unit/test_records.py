from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from ivdr_deploy.errors import ConfigError
from ivdr_deploy.records import from_dict, to_dict


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
