"""What an error is as an answer, and how large an answer may be."""

from __future__ import annotations

import logging
from concurrent.futures import CancelledError
from typing import Any

from ivdr_deploy import errors
from ivdr_deploy.errors import ClosedError, DrainingError, IvdrError, OptionError
from ivdr_deploy.serving.core.schema import METHODS, Response

logger = logging.getLogger(__name__)

STATUS: tuple[tuple[type[IvdrError], int], ...] = (
    (errors.QueueFullError, 429),
    (errors.DrainingError, 503),
    (errors.WorkerDiedError, 503),
    (errors.RequestTimeoutError, 408),
    (errors.UnauthorizedError, 401),
    (errors.MethodError, 405),
    (errors.EncodingError, 415),
    (errors.UrlError, 422),
    (errors.FetchError, 424),  # of a server that is not this one
    (errors.OptionError, 422),  # understood, but not to be had
    (errors.RequestError, 400),
    (errors.VideoLimitError, 413),
    (errors.NoVideoStreamError, 415),
    (errors.VideoDecodeError, 422),  # a readable file, but its pictures are damaged
    (errors.VideoCrashError, 422),  # it is the file, as far as anyone knows: others are decoded beside it
    (errors.VideoTimeoutError, 504),
    (errors.VideoError, 400),
)
"""HTTP status of every error one request can cause; the first match counts, and 500 is what is left: the network failed
on this video, or a defect of ours. TorchServe answers a full queue by itself."""

HEADERS: dict[int, dict[str, str]] = {
    401: {"WWW-Authenticate": "Bearer"},
    405: {"Allow": ", ".join(METHODS)},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "5"},
}
"""That go with a status."""

MAX_ANSWER_BYTES = 16 << 20
"""Of one answer as JSON. A request for vectors of many clips may ask for more, and is refused."""

_MESSAGE_CHARACTERS = 1000
"""Of a message and of a hint in an answer. A guard: each message cuts short what it quotes."""


def status_of(error: Exception) -> int:
    """Return the HTTP status of an error, from the table above."""
    return next((status for kind, status in STATUS if isinstance(error, kind)), 500)


def refusal(error: Exception) -> Response:
    """Return the answer that an error is."""
    if isinstance(error, CancelledError | ClosedError):  # it was waiting when the service was closed
        error = DrainingError("this endpoint is closed", hint="send the request again later")
    status = status_of(error)
    return Response(status=status, body=_error_body(error), headers=HEADERS.get(status, {}))


def bounded(body: dict[str, Any]) -> Response:
    """Return an answer.

    Raises:
        OptionError: if it is too large.
    """
    response = Response(status=200, body=body)
    check_size(len(response.json))
    return response


def check_size(size_bytes: int) -> None:
    """Refuse an answer of more than ``MAX_ANSWER_BYTES``.

    Raises:
        OptionError: if it is larger.
    """
    if size_bytes > MAX_ANSWER_BYTES:
        raise OptionError(
            f"the answer would have {size_bytes} bytes or more, more than the limit of {MAX_ANSWER_BYTES}",
            hint="ask for fewer clips or outputs; a timeline can come as a stream of events",
        )


def _error_body(error: Exception) -> dict[str, Any]:
    if isinstance(error, IvdrError):
        return {name: text[:_MESSAGE_CHARACTERS] for name, text in error.to_dict().items()}
    logger.error("a request failed unexpectedly", exc_info=error)
    message = f"unexpected {type(error).__name__}"
    return {"code": "internal", "message": message, "hint": "see the log of the service"}
