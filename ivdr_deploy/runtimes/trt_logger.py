"""Sends what TensorRT says to ``logging``, and keeps its errors: its calls only return None."""

from __future__ import annotations

import logging
from typing import Any

_log = logging.getLogger(__name__)


def make_logger(trt: Any) -> Any:
    """Make a logger for ``tensorrt`` or ``tensorrt_rtx``.

    Args:
        trt: The module; its logger class can only be derived from once it is imported.

    Returns:
        A ``trt.ILogger`` whose ``last_error`` is the last error it was told, on one line, or an empty string.
    """
    errors = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = ""

        def log(self, severity: Any, message: str) -> None:
            # An error is raised, with this text, by whoever made the failing call; as a warning it would be
            # said twice.
            if severity in errors:
                self.last_error = " ".join(message.split())
            _log.log(logging.WARNING if severity == trt.ILogger.WARNING else logging.DEBUG, "%s", message)

    return Logger()
