"""Frozen dataclasses to plain dicts and back, strictly.

One mechanism reads every structured input: manifests, checkpoint metadata, training configs, request options. An
unknown key, a missing key or a wrong type is an error that names the place, never a silent default.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from ivdr_deploy._text import NAMED, QUOTED, as_text, is_plain, quoted
from ivdr_deploy.errors import ConfigError

T = TypeVar("T")

_MOST_NAMES = 100
"""That one field of a foreign file may hold."""

_DEEPEST = 100
"""Tables and lists inside one another in a foreign file. Settings of real networks have some ten; what is deeper by far
ends the recursion of whoever writes it again."""


def parse_json(text: str | bytes) -> Any:
    """Read JSON that somebody else wrote; what it gives can be written as JSON again.

    Raises:
        ValueError: if it is no JSON, holds NaN, infinity or a number that is none of a float, or is nested too deep.
    """
    too_deep = f"it is nested deeper than {_DEEPEST} levels"
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError(too_deep) from error
    level = [values]
    for _ in range(_DEEPEST + 1):
        if any(isinstance(value, float) and not math.isfinite(value) for value in level):
            raise ValueError("it holds NaN, infinity or a number as large, which JSON does not have")
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise ValueError(too_deep)
    return values


def require_range(what: str, *values: float, least: float = 0.0, most: float = math.inf) -> None:
    """Refuse numbers that no measurement gives.

    Raises:
        ConfigError: if one is NaN, below ``least`` or above ``most``.
    """
    for value in values:
        if not least <= value <= most:
            raise ConfigError(f"the {what} is {value:g}, expected {least:g} to {most:g}")


def to_dict(record: Any) -> Any:
    """Turn a dataclass (nested, with tuples and mappings) into what JSON and TOML can hold.

    Dicts, lists and scalars; text is valid Unicode, whatever bytes a path in it holds.
    """
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {field.name: to_dict(getattr(record, field.name)) for field in dataclasses.fields(record)}
    if isinstance(record, Mapping):
        return {as_text(str(key)): to_dict(value) for key, value in record.items()}
    if isinstance(record, tuple | list):
        return [to_dict(value) for value in record]
    return as_text(record) if isinstance(record, str) else record


def from_dict(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Build ``cls`` from a mapping.

    Args:
        cls: A dataclass whose fields are scalars, ``Literal``, ``X | None``, ``tuple``, ``dict`` or dataclasses.
        values: What was read from a file or request. Keys that are absent take the field's default.
        where: Name of the source, used in error messages, e.g. ``"manifest.json"``.

    Raises:
        ConfigError: on an unknown key (the nearest known one is suggested), a missing key without a default, a value
            of another type, or a value that the dataclass itself refuses.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{where}: expected a table of settings, found {type(values).__name__} {quoted(values)}"
        )
    fields, hints = _fields_of(cls)  # type: ignore[arg-type]  # mypy takes no class for hashable
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key)[:100], fields, n=1)
            hint = f"did you mean {quoted(near[0])}?" if near else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"{where}: unknown key {quoted(key)}", hint=hint)
    arguments = {name: _convert(hints[name], value, f"{where}: {name}") for name, value in values.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise ConfigError(f"{where}: the key {quoted(name)} is missing")
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", hint=error.hint) from error


@functools.cache
def _fields_of(cls: type) -> tuple[dict[str, dataclasses.Field[Any]], dict[str, Any]]:
    """Return the fields of a dataclass by name, and their types, which take longer to find than to use."""
    return {field.name: field for field in dataclasses.fields(cls)}, typing.get_type_hints(cls)


def require_plain(what: str, *names: str, most: int = NAMED) -> None:
    """Refuse names that cannot stand in a message, a log or a table as they are: people judge by what they read there.

    Raises:
        ConfigError: if one is empty, longer than ``most``, or holds line ends or other control characters; or there are
            more than anybody would read.
    """
    if len(names) > _MOST_NAMES:
        raise ConfigError(f"there are {len(names)} of the {what}, expected at most {_MOST_NAMES}")
    for name in names:
        if not is_plain(name, most=most):
            raise ConfigError(f"the {what} is {quoted(name)}, expected one line of 1 to {most} characters")


def require_within(name: str, value: float, least: float, most: float) -> None:
    """Refuse a number that nothing here could be made for: it decides how much memory or time something takes.

    Raises:
        ConfigError: if it is below ``least`` or above ``most``.
    """
    if not least <= value <= most:
        raise ConfigError(f"{name} must be between {least} and {most}, found {quoted(value)}")


def require_servable(name: str, version: str) -> None:
    """Refuse a name or version that cannot be a part of a URL, or would lead a file to another folder.

    Raises:
        ConfigError: names which of the two.
    """
    for what, value, option in (("name", name, "--name"), ("version", version, "--model-version")):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value):
            raise ConfigError(
                f"the model's {what} {quoted(value)} cannot be served under a URL",
                hint="use letters, digits, '_', '-' and '.', beginning with a letter or digit; give it with "
                + option,
            )


def json_schema(cls: type) -> dict[str, Any]:
    """Describe in JSON Schema what ``from_dict`` takes for a dataclass, ranges that it checks itself excepted."""
    fields, hints = _fields_of(cls)
    missing = dataclasses.MISSING
    return {
        "type": "object",
        "properties": {name: _schema_of(hints[name]) for name in fields},
        "required": [
            name
            for name, field in fields.items()
            if field.default is missing and field.default_factory is missing
        ],
        "additionalProperties": False,
    }


_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def _schema_of(kind: Any) -> dict[str, Any]:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if origin in (Union, types.UnionType):
        (inner,) = [arg for arg in args if arg is not type(None)]
        return {"anyOf": [_schema_of(inner), {"type": "null"}]} if type(None) in args else _schema_of(inner)
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return {"type": "array", "items": _schema_of(args[0])}
        items = [_schema_of(arg) for arg in args]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema_of(args[1])}
    return json_schema(kind) if dataclasses.is_dataclass(kind) else {"type": _JSON_TYPES[kind]}  # type: ignore[arg-type]


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Return ``value`` as ``kind``: lists become tuples and ints floats where asked for, nothing else changes."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = [arg for arg in args if arg is not type(None)]
        return _convert(inner, value, where)
    if origin is Literal:
        return _choose(args, value, where)
    if origin is tuple:
        return _convert_tuple(args, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a table, found {quoted(value)}")
        return {
            str(key): _convert(args[1], item, f"{where}.{str(key)[:QUOTED]}") for key, item in value.items()
        }
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else from_dict(kind, value, where=where)  # type: ignore[arg-type]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise ConfigError(f"{where}: {quoted(value)} is too large") from error
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{where}: expected {kind.__name__}, found {quoted(value)}")
    return value


def _choose(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    """Return the choice that equals ``value``: 3.0 is taken for 3, and becomes it."""
    for choice in choices:
        if value == choice and isinstance(value, bool) == isinstance(choice, bool):
            return choice
    raise ConfigError(f"{where}: expected one of {', '.join(map(repr, choices))}, found {quoted(value)}")


def _convert_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where}: expected a list, found {quoted(value)}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(args):
        raise ConfigError(
            f"{where}: expected a list of {len(args)}, found {len(value)} values: {quoted(value)}"
        )
    return tuple(
        _convert(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True))
    )
