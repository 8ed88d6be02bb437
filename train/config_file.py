"""Training settings from a TOML file, overridden by ``key=value``, and back into one."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from ivdr_deploy._text import quoted, reason_of
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.records import from_dict, to_dict
from train.config import RunConfig
from train.method import fill_preset

C = TypeVar("C", bound=RunConfig)


def load_config(
    cls: type[C],
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    complete: Callable[[dict[str, Any]], None] | None = None,
) -> C:
    """Read a TOML file and apply overrides.

    Args:
        cls: ``PretrainConfig`` or ``FinetuneConfig``.
        path: The file.
        overrides: ``dotted.key=value`` each. The value is read as TOML; what is no TOML is text, and where the setting
            is text anything but a quoted string is taken as it stands: ``out=2024`` is a folder. ``preset`` names a
            set of settings, see ``train.method``.
        complete: Adds what follows from the settings that are given.

    Raises:
        ConfigError: if the file is missing or malformed, or a key or value does not fit; says which.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"no config file at {path}", hint="train/configs has some") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML ({reason_of(error)})") from error
    for override in overrides:
        _apply(cls, values, override)
    if complete is not None:
        complete(values)
    fill_preset(values)
    return from_dict(cls, values, where=str(path))


def changed_settings(config: RunConfig) -> list[str]:
    """Spell the settings that are not the default, as ``key=value`` for the command line."""
    return [f"{key}={_spelled(value)}" for key, value, default in _settings(config) if value != default]


def settings_toml(config: RunConfig) -> str:
    """Spell all settings as a file that ``load_config`` reads."""
    return "".join(f"{key} = {_toml(value)}\n" for key, value, _ in _settings(config) if value is not None)


def _toml(value: Any) -> str:
    """Spell a value as TOML does: as JSON does, but for tables."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_text(key)} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return _toml_text(value) if isinstance(value, str) else json.dumps(value)


def _toml_text(text: str) -> str:
    """Spell text as TOML does: not as JSON, which parts a character such as an emoji into two halves."""
    return re.sub(r"[^ -~]", lambda sign: f"\\U{ord(sign[0]):08x}", json.dumps(text, ensure_ascii=False))


def _settings(record: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted key, value and default of every setting, in the types of JSON."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{prefix}{field.name}.")
        else:
            make = field.default_factory
            default = field.default if make is dataclasses.MISSING else make()
            yield f"{prefix}{field.name}", to_dict(value), to_dict(default)


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def text_of_override(override: str) -> tuple[str, str]:
    """Return the key of ``key=value``, and the value of a setting that is text."""
    key, _, text = override.partition("=")
    return key.strip(), str(_parse(text.strip(), is_text=True))


def _apply(cls: type, values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{quoted(override)} is not a setting", hint="write key=value, e.g. optim.lr=0.01")
    table: Any = values
    kind: Any = cls
    for part in parts[:-1]:
        kind = _kind(kind, part)
        table = table.setdefault(part, {})
        if not isinstance(table, Mapping):
            raise ConfigError(f"{quoted(override)}: {quoted(part)} is a value, not a table of settings")
    table[parts[-1]] = _parse(text.strip(), is_text=_kind(kind, parts[-1]) is str)


def _kind(cls: Any, name: str) -> Any:
    """Return the type of a setting; None for an unknown one, which is refused when all are read."""
    return get_type_hints(cls).get(name) if dataclasses.is_dataclass(cls) else None


def _parse(text: str, *, is_text: bool) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
    return text if is_text and not isinstance(value, str) else value
