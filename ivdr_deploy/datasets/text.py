"""Text lists: one ``path`` or ``path label`` a line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ivdr_deploy.datasets.entries import VIDEO_SUFFIXES, Entry, Root, listed, open_text

# A path may contain blanks: it ends at the first video suffix that a blank or the line's end follows.
_UNQUOTED = re.compile(
    rf"(?P<path>.*?(?:{'|'.join(map(re.escape, sorted(VIDEO_SUFFIXES)))}))(?:[ \t]+(?P<label>.+))?",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"""(?P<quote>["'])(?P<path>.+?)(?P=quote)(?:[ \t]+(?P<label>.+))?""")


def read_text(source: Path, root: Path) -> Iterator[Entry]:
    """Yield the entries of a text list; lines end where an editor ends them, not at other characters of Unicode.

    A line that begins with ``#`` is a comment, unless the name of a video follows at once: there are such names.

    Raises:
        DataError: if it cannot be read, is no text, or a label is not UTF-8.
    """
    with open_text(source) as lines:
        place, base = f"{source}: line", Root(root)
        for number, line in enumerate(lines, start=1):
            written, label = parse_line(line)
            if written:
                yield listed(base, written, label, place, number)


def parse_line(line: str) -> tuple[str, str | None]:
    """Return path and label of one line; the path is empty for a comment or a line without text."""
    line = line.strip(" \t\r\n")
    match = _QUOTED.fullmatch(line) or _UNQUOTED.fullmatch(line)
    if re.match(r"#(\s|#|$)", line) or (line.startswith("#") and match is None):
        return "", None
    if match is None:
        written, label = [*line.split(None, 1), "", ""][:2]
        return written, label or None
    label = match["label"]
    if label and (unquoted := re.fullmatch(r"""(["'])(.+)\1""", label)):
        label = unquoted[2]
    return match["path"], label


def is_blank_separated(line: str) -> bool:
    """Whether a line is that of a text list, with a video suffix, and not the header of a table."""
    return "," not in line and _UNQUOTED.fullmatch(line.strip()) is not None
