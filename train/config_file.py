"""Training settings from a TOML file, overridden by ``key=value``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ivdr_deploy.errors import ConfigError
from ivdr_deploy.records import from_dict
from train.config import RunConfig

C = TypeVar("C", bound=RunConfig)


def load_config(cls: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """Read a TOML file and apply overrides.

    Args:
        cls: ``PretrainConfig`` or ``FinetuneConfig``.
        path: The file.
        overrides: ``dotted.key=value`` each; the value is read as TOML, or else taken as a plain string.

    Raises:
        ConfigError: if the file is missing or malformed, or a key or value does not fit; says which.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"no config file at {path}", hint="train/configs has some") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML ({error})") from error
    for override in overrides:
        _apply(values, override)
    return from_dict(cls, values, where=str(path))


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{override!r} is not a setting", hint="write key=value, e.g. optim.lr=0.01")
    table: Any = values
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, Mapping):
            raise ConfigError(f"{override!r}: {part!r} is a value, not a table of settings")
    table[parts[-1]] = _parse(text.strip())


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
