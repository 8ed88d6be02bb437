"""Names on a command line: what is to be measured of what there is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from ivdr_deploy._text import quoted
from ivdr_deploy.errors import ConfigError

Name = TypeVar("Name", bound=str)


def chosen(text: str, known: Iterable[Name], *, what: str) -> list[Name]:
    """Return the names in a text, with blanks or commas between.

    Args:
        text: As it was given.
        known: Every name that there is.
        what: What they are names of.

    Raises:
        ConfigError: if there is none of a name; or no name, which would measure nothing and end well.
    """
    there: dict[str, Name] = {name: name for name in known}
    words = text.replace(",", " ").split()
    unknown = [word for word in words if word not in there]
    if unknown or not words:
        raise ConfigError(
            f"there is no {what} {quoted(unknown[0])}" if unknown else f"no {what} is named",
            hint=f"there are: {', '.join(there)}",
        )
    return [there[word] for word in words]
