"""Every exception this package raises on purpose.

::

    IvdrError
    ├── ConfigError                 a setting, option or config file is wrong
    ├── DataError                   a list of videos or labels is missing, malformed or empty
    ├── MissingDependencyError      an optional package is not installed
    ├── DeviceError                 a device or execution provider that was asked for is not there
    ├── ResourceError               the system gives no more memory or threads
    ├── FolderError                 an output folder is in use, or holds something else
    ├── ClosedError                 something was used after it was closed
    ├── VideoError                  one video cannot be used; the others can
    │   ├── VideoOpenError          not a readable video file
    │   ├── NoVideoStreamError      a media file without pictures
    │   ├── VideoDecodeError        opened, but a needed frame cannot be decoded
    │   ├── VideoLimitError         larger, longer or wider than the limits allow
    │   ├── VideoTimeoutError       decoding took longer than allowed
    │   └── VideoCrashError         the process that decoded it died, or failed in a way nobody foresaw
    ├── ClipShapeError              an array does not have the shape or dtype a clip must have
    ├── CheckpointError             a checkpoint is damaged, or does not fit
    ├── ArtifactError               a bundle is damaged, incomplete or not what it says
    │   ├── ContractMismatchError   two artifacts turn a file into a network input differently
    │   ├── GoldenMismatchError     golden clips or videos do not give what is recorded
    │   └── EngineIncompatibleError a TensorRT plan does not belong to this machine
    ├── InferenceError              the network failed on the clips of one video
    ├── TrainingError               a training run cannot go on, e.g. its loss is not finite
    ├── ExportError                 a model cannot be exported
    │   └── ParityError             an exported model does not compute what the trained one computes
    ├── RequestError                a request to the endpoint is malformed
    │   ├── MethodError             its HTTP method is none that carries a request
    │   ├── EncodingError           its body is encoded for the transfer, for example with gzip
    │   ├── RequestTimeoutError     it did not come whole in time
    │   ├── UnauthorizedError       it does not show the token that the endpoint asks for
    │   ├── UrlError                it names its video by a URL that is not one that may be asked
    │   ├── FetchError              the server behind that URL did not give the video
    │   └── OptionError             it is well formed, but an option in it is not one that can be served
    ├── QueueFullError              the endpoint has taken as many requests as it takes at a time
    ├── DrainingError               the endpoint is about to stop and takes no more requests
    ├── WorkerDiedError             the process that had a request has ended
    └── ServerError                 a server did not start, answer or stop as it should

An error says what was found and what was expected in ``message``, and what to do in ``hint``. Errors know nothing
of HTTP or exit codes: ``serving.core.answers`` maps them to a status, ``cli`` to an exit code.
"""

from __future__ import annotations

from typing import ClassVar

from ivdr_deploy._text import one_line


class IvdrError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: What was found and what was expected, with the value and the file; kept as one line, with line ends
            and other control characters spelled.
        hint: What to do about it; may be empty.
    """

    code: ClassVar[str] = "error"
    """Stable machine-readable name, written to score tables and endpoint answers."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message, self.hint = one_line(message), one_line(hint)  # both name files, are logged and stored
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message

    def to_dict(self) -> dict[str, str]:
        """Return ``{code, message, hint}``, the form used in JSON answers."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class ConfigError(IvdrError):
    """A setting, option or config file is wrong."""

    code = "config"


class DataError(IvdrError):
    """A list of videos or labels is missing, malformed or empty."""

    code = "data"


class MissingDependencyError(IvdrError):
    """An optional package is not installed."""

    code = "missing_dependency"


class DeviceError(IvdrError):
    """A device or execution provider that was asked for is not there; nothing else takes its place."""

    code = "device"


class ResourceError(IvdrError):
    """The system gives this process no more memory or threads: no fault of a file."""

    code = "resources"


class FolderError(IvdrError):
    """An output folder is in use by another process, or holds something that is not this run's."""

    code = "folder"


class ClosedError(IvdrError):
    """Something was used after it was closed."""

    code = "closed"


class VideoError(IvdrError):
    """One video cannot be used; the others can."""

    code = "video"


class VideoOpenError(VideoError):
    """The bytes are not a readable video file."""

    code = "unreadable"


class NoVideoStreamError(VideoError):
    """A media file without a video stream."""

    code = "no_video_stream"


class VideoDecodeError(VideoError):
    """The file opened, but a frame that is needed cannot be decoded."""

    code = "decode_failed"


class VideoLimitError(VideoError):
    """The video is larger, longer or wider than the limits allow."""

    code = "too_large"


class VideoTimeoutError(VideoError):
    """Decoding took longer than the limits allow."""

    code = "too_slow"


class VideoCrashError(VideoError):
    """The process that decoded the video died, or decoding failed in a way that nobody foresaw."""

    code = "crashed"


class ClipShapeError(IvdrError):
    """An array does not have the shape or dtype that a clip must have."""

    code = "clip_shape"


class CheckpointError(IvdrError):
    """A checkpoint is damaged, or does not fit what it is asked for."""

    code = "checkpoint"


class ArtifactError(IvdrError):
    """A bundle or model file is damaged, incomplete or not what it says."""

    code = "artifact"


class ContractMismatchError(ArtifactError):
    """Two artifacts turn a file into a network input differently."""

    code = "contract_mismatch"


class GoldenMismatchError(ArtifactError):
    """Golden clips do not give the recorded outputs on this runtime, or golden videos not the recorded clips."""

    code = "golden_mismatch"


class EngineIncompatibleError(ArtifactError):
    """A TensorRT plan does not belong to this machine or library version."""

    code = "engine_incompatible"


class InferenceError(IvdrError):
    """The network failed on the clips of one video, also when they were alone in the batch."""

    code = "inference_failed"


class TrainingError(IvdrError):
    """A training run cannot go on, for example because its loss is not finite."""

    code = "training"


class ExportError(IvdrError):
    """A model cannot be exported."""

    code = "export"


class ParityError(ExportError):
    """An exported model does not compute what the trained one computes."""

    code = "parity"


class RequestError(IvdrError):
    """A request to the endpoint is malformed."""

    code = "bad_request"


class MethodError(RequestError):
    """A request came with an HTTP method that carries none."""

    code = "bad_method"


class EncodingError(RequestError):
    """The body of a request is encoded for the transfer, for example with gzip."""

    code = "bad_encoding"


class RequestTimeoutError(RequestError):
    """A request did not come whole in time."""

    code = "request_timeout"


class UnauthorizedError(RequestError):
    """A request does not show the token that the endpoint asks for."""

    code = "unauthorized"


class UrlError(RequestError):
    """A URL in a request is none, or not one that this endpoint may ask. It never shows a path or query."""

    code = "bad_url"


class FetchError(RequestError):
    """The server behind a URL did not give the video, or not whole and in time. It never shows a path or query."""

    code = "url_failed"


class QueueFullError(IvdrError):
    """The endpoint has taken as many requests as it takes at a time."""

    code = "queue_full"


class DrainingError(IvdrError):
    """The endpoint is about to stop: it finishes what it has taken, and takes no more."""

    code = "draining"


class WorkerDiedError(IvdrError):
    """The process that had a request has ended before it answered; another one can answer it."""

    code = "worker_died"


class OptionError(RequestError):
    """A request's option is unknown, out of range, or not possible with this model."""

    code = "bad_option"


class ServerError(IvdrError):
    """A server did not start, answer or stop as it should."""

    code = "server"
