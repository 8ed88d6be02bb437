"""What the logs of TorchServe say about why something did not start."""

from __future__ import annotations

import re
from pathlib import Path

from ivdr_deploy._text import one_line, quoted

_MOST_CHARACTERS = 16 << 20
"""Of a log. What is looked for is said while a server starts."""

_SHOWN_CHARACTERS = 500
"""Of a line: an exception may say anything."""


def worker_failure(log: str) -> str:
    """Find in a worker's log why it could not start.

    Args:
        log: Text of TorchServe's ``model_log.log``.

    Returns:
        Type and message of the exception that ended the first attempt; one of ours where there is one.
    """
    lines = [line.split(" MODEL_LOG - ", 1)[-1] for line in log.splitlines()]
    raised = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt): ", line)]
    ours = [line for line in raised if line.startswith("ivdr_deploy.errors.")]
    if ours or raised:
        return one_line((ours or raised)[0].removeprefix("ivdr_deploy.errors.")[:_SHOWN_CHARACTERS])
    return (
        f"the process ended without a word; its last line was {quoted(lines[-1])}"
        if lines
        else "it logged nothing"
    )


def front_end_failure(log: str) -> str:
    """Find in TorchServe's own log why it could not load the archive.

    Args:
        log: Text of ``ts_log.log``.

    Returns:
        Type and message of the exception, and of the first one that caused it.
    """
    _, said, trace = log.partition(" - Failed to load model: ")
    if not said:
        return "it does not say why; is the disk of the run folder full?"
    raised = re.findall(
        r"^(?:Caused by: )?((?:[\w$]+\.)+[\w$]*(?:Exception|Error)\b.*)$", trace, re.MULTILINE
    )
    causes = list(dict.fromkeys(re.sub(r"^(?:[\w$]+\.)+", "", line) for line in raised))
    return one_line(
        (" <- ".join([*causes[:1], *causes[1:][-1:]]) or trace.splitlines()[0])[:_SHOWN_CHARACTERS]
    )


def last_words(log: str) -> str:
    """Return the first error that Java printed before it ended, or else its last line."""
    lines = log.strip().splitlines()
    errors = [line for line in lines if re.match(r"[\w.]+(Exception|Error): ", line)]
    return one_line((errors or lines[-1:] or ["it printed nothing"])[0][:_SHOWN_CHARACTERS])


def read_log(path: Path) -> str:
    """Return the text of a log, which may not be there yet; of one that has grown large its beginning."""
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as log:
        return log.read(_MOST_CHARACTERS)
