"""The Open Inference Protocol (KServe v2) without a server: tensors in, tensors out, by the same service.

An input holds several videos, and so does an answer. A video that fails is told in one of two ways. Where the client
asks for the output ``status``, each video has its own there, and the others their results; the failed one has NaN, no
label, and its reason in ``error``. Where it does not, the whole request fails with the reason of the first that failed
and its place: an answer in which only a status says that a row means nothing would be taken for one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ivdr_deploy import __version__
from ivdr_deploy._text import NAMED, quoted, quoted_few
from ivdr_deploy.errors import ClipShapeError, IvdrError, OptionError, RequestError
from ivdr_deploy.results import VideoResult
from ivdr_deploy.serving.core.answers import MAX_ANSWER_BYTES
from ivdr_deploy.serving.core.parsing import parse_options
from ivdr_deploy.serving.core.schema import Options, PredictRequest, Response
from ivdr_deploy.serving.core.service import InferenceService
from ivdr_deploy.serving.core.tensors import Datatype, Tensor
from ivdr_deploy.spec import OUTPUT_NAMES
from ivdr_deploy.video.frame_array import pack_frames

VIDEO, FRAMES, TIMES = "video", "frames", "timestamps"
"""Inputs: encoded files; or what somebody else has decoded."""

STATUS, ERROR = "status", "error"
"""Outputs that a client must ask for by name."""

MOST_PARTS = 100
"""Inputs, outputs or parameters that a request may name: far more than a model has. Each takes a few bytes to send."""

_PARAMETERS = ("top_k", "num_clips")
"""Options of a request that the protocol carries as its parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRequest:
    """One request."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...] = ()
    """Those asked for; empty: all but ``status`` and ``error``."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    """The caller's; comes back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorAnswer:
    """One answer that is no error."""

    outputs: tuple[Tensor, ...]
    parameters: dict[str, str]
    id: str


@dataclass(frozen=True, slots=True)
class _Output:
    """What is known of an output before there is one; -1 is an extent that depends on the request."""

    datatype: Datatype
    shape: tuple[int, ...]


class TensorService:
    """Answers requests in tensors with a service.

    Args:
        service: Does the work, and counts each video as a request.
    """

    def __init__(self, service: InferenceService) -> None:
        self.service = service
        model = service.model
        held = model.output_names
        self._outputs: dict[str, _Output] = {}
        if "logits" in held:
            self._outputs |= {
                "label": _Output("BYTES", (-1, -1)),
                "score": _Output("FP32", (-1, -1)),
                "probabilities": _Output("FP32", (-1, len(model.labels))),
                "logits": _Output("FP32", (-1, -1, len(model.labels))),
            }
        golden = model.golden.expected if model.golden is not None else {}
        for name in OUTPUT_NAMES[1:]:
            if name in held:
                ndim = 3 if name == "intra" else 1
                own = golden[name].shape[1:] if name in golden else (-1,) * (ndim - (ndim > 1))
                self._outputs[name] = _Output("FP32", (-1, *((-1,) if name == "intra" else ()), *own))
        self._outputs["clip_seconds"] = _Output("FP64", (-1, -1, 2))
        self._outputs |= {STATUS: _Output("INT32", (-1,)), ERROR: _Output("BYTES", (-1,))}

    def server_metadata(self) -> dict[str, Any]:
        """Return what the protocol asks about a server."""
        return {"name": "ivdr_deploy", "version": __version__, "extensions": ["binary_tensor_data"]}

    def model_metadata(self) -> dict[str, Any]:
        """Return what the protocol asks about the model; a request has ``video``, or the two other inputs."""
        model = self.service.model
        return {
            "name": model.name,
            "versions": [model.version],
            "platform": f"ivdr_{model.runtime.name}",
            "inputs": [
                {"name": VIDEO, "datatype": "BYTES", "shape": [-1]},
                {"name": FRAMES, "datatype": "UINT8", "shape": [-1, -1, -1, -1, 3]},
                {"name": TIMES, "datatype": "FP64", "shape": [-1, -1]},
            ],
            "outputs": [
                {"name": name, "datatype": output.datatype, "shape": list(output.shape)}
                for name, output in self._outputs.items()
            ],
        }

    def videos(self, request: TensorRequest, hold: Callable[[int], None]) -> list[PredictRequest]:
        """Take a request apart: one for each of its videos.

        Args:
            request: The request.
            hold: Told how many there are before the first is made; what it raises goes through. A video of one pixel
                takes a few bytes to send, and far more as a file.

        Raises:
            RequestError: if its inputs are others than the model's.
            OptionError: if a parameter or an output is unknown, or a parameter out of range.
        """
        if len(request.id) > NAMED:  # it comes back, in JSON at up to three times its size
            raise RequestError(f"the id has {len(request.id)} characters, expected at most {NAMED}")
        for name in request.outputs:
            if name not in self._outputs:
                raise OptionError(
                    f"this model has no output {quoted(name)}", hint=f"it has: {', '.join(self._outputs)}"
                )
        if len(set(request.outputs)) < len(
            request.outputs
        ):  # naming it costs little, and each would be made and sent
            twice = next(name for name in request.outputs if request.outputs.count(name) > 1)
            raise OptionError(f"the output {quoted(twice)} is asked for twice", hint="name each output once")
        if unknown := sorted(set(request.parameters) - set(_PARAMETERS)):
            raise OptionError(
                f"unknown parameter {quoted(unknown[0])}", hint=f"known are {', '.join(_PARAMETERS)}"
            )
        options = parse_options(dict(request.parameters))
        return [PredictRequest(video=video, options=options) for video in _encoded(request.inputs, hold)]

    def submit(self, videos: Sequence[PredictRequest], request: TensorRequest) -> list[Future[Response]]:
        """Answer each video in the background; ``combine`` puts the answers together."""
        wanted = self._wanted(request)
        return [
            self.service.submit_video(video, lambda result, options: self._rows(result, options, wanted))
            for video in videos
        ]

    def combine(self, request: TensorRequest, answers: Sequence[Response]) -> TensorAnswer | Response:
        """Put the answers to the videos of a request together.

        Args:
            request: The request.
            answers: From ``submit``, at least one.

        Returns:
            The answer; or an error, whose body has the place of the video as ``item``.
        """
        wanted = self._wanted(request)
        failed = [place for place, answer in enumerate(answers) if answer.status != 200]
        if failed and STATUS not in wanted:
            first = answers[failed[0]]
            message = first.body["message"]
            if len(answers) > 1:
                message = f"video {failed[0]} of {len(answers)} (counted from 0): {message}"
            return Response(
                status=first.status,
                body={**first.body, "message": message, "item": failed[0]},
                headers=first.headers,
            )
        try:
            _check_together(answers)
            outputs = tuple(self._joined(name, answers) for name in wanted)
        except IvdrError as error:
            return self.service.refuse(error)
        model = self.service.model
        said = {"variant": model.variant, "contract_hash": model.contract_hash}
        return TensorAnswer(outputs=outputs, parameters=said, id=request.id)

    def _wanted(self, request: TensorRequest) -> tuple[str, ...]:
        return request.outputs or tuple(name for name in self._outputs if name not in (STATUS, ERROR))

    def _rows(self, result: VideoResult, options: Options, wanted: Sequence[str]) -> Response:
        """Return one video's part of each output, without the axis of the videos."""
        top = result.top(options.top_k or self.service.settings.top_k)
        rows: dict[str, Any] = {
            "label": np.array([label for label, _ in top], object),
            "score": np.array([score for _, score in top], np.float32),
            "probabilities": result.probabilities,
            "logits": result.clip_logits,
            "feature": result.feature,
            "inter": result.inter,
            "intra": result.intra,
            "clip_seconds": result.clip_seconds,
        }
        kept = {name: rows[name] for name in wanted if name in rows}
        _check_size(_bytes_of(kept))
        return Response(status=200, body=kept)

    def _joined(self, name: str, answers: Sequence[Response]) -> Tensor:
        """Stack one output over the videos."""
        count = len(answers)
        if name == STATUS:
            return Tensor(name, "INT32", (count,), np.array([answer.status for answer in answers], np.int32))
        if name == ERROR:
            said = [b"" if answer.status == 200 else json.dumps(answer.body).encode() for answer in answers]
            return Tensor(name, "BYTES", (count,), said)
        datatype, shape = self._outputs[name].datatype, self._outputs[name].shape
        rows = [answer.body[name] if answer.status == 200 else None for answer in answers]
        found = {row.shape for row in rows if row is not None}
        if len(found) > 1:
            raise OptionError(
                f"the output {name} has another shape for each of these videos, which have different numbers of clips",
                hint="send one video a request, or ask for other outputs",
            )
        own = found.pop() if found else tuple(max(extent, 0) for extent in shape[1:])
        if datatype == "BYTES":
            empty = np.full(own, "", object)
            texts = [
                str(text).encode() for row in rows for text in (empty if row is None else row).reshape(-1)
            ]
            return Tensor(name, datatype, (count, *own), texts)
        lost = np.full(own, np.nan)
        dtype = np.float64 if datatype == "FP64" else np.float32
        return Tensor(
            name,
            datatype,
            (count, *own),
            np.stack([lost if row is None else row for row in rows]).astype(dtype),
        )


def _bytes_of(rows: Mapping[str, Any]) -> int:
    return sum(value.nbytes for value in rows.values())


def _check_together(answers: Sequence[Response]) -> None:
    """Refuse videos whose answers are too large together; one that failed has as many numbers as the others."""
    sizes = [_bytes_of(answer.body) for answer in answers if answer.status == 200]
    _check_size(len(answers) * max(sizes, default=0))


def _check_size(size_bytes: int) -> None:
    if size_bytes > MAX_ANSWER_BYTES:
        raise OptionError(
            f"the answer would have {size_bytes} bytes, more than the limit of {MAX_ANSWER_BYTES}",
            hint="ask for fewer clips or outputs, or send fewer videos in one request",
        )


def _encoded(inputs: Sequence[Tensor], hold: Callable[[int], None]) -> list[bytes]:
    """Return the videos of a request as files: as they came, or made of their frames."""
    held = {tensor.name: tensor for tensor in inputs}
    if len(held) == len(inputs) and set(held) == {VIDEO}:
        return _files(held[VIDEO], hold)
    if len(held) == len(inputs) and set(held) == {FRAMES, TIMES}:
        return _packed(held[FRAMES], held[TIMES], hold)
    raise RequestError(
        f"the request has the inputs {quoted_few([tensor.name for tensor in inputs])}, expected {VIDEO}, or {FRAMES} "
        f"and {TIMES}",
        hint=f"one element of {VIDEO} is one encoded video file",
    )


def _files(tensor: Tensor, hold: Callable[[int], None]) -> list[bytes]:
    if isinstance(tensor.values, np.ndarray):
        raise RequestError(f"the input {VIDEO} is {tensor.datatype}, expected BYTES")
    if len(tensor.shape) > 2 or tensor.shape[1:] not in ((), (1,)) or not tensor.values:
        raise RequestError(
            f"the input {VIDEO} has the shape {list(tensor.shape)}, expected [N] or [N, 1] with N of at least 1"
        )
    hold(len(tensor.values))
    return list(tensor.values)


def _packed(frames: Tensor, times: Tensor, hold: Callable[[int], None]) -> list[bytes]:
    values, seconds = frames.values, times.values
    if not (
        isinstance(values, np.ndarray)
        and isinstance(seconds, np.ndarray)
        and (frames.datatype, times.datatype) == ("UINT8", "FP64")
        and values.ndim == 5
        and values.shape[:2] == seconds.shape
        and len(values)
    ):
        raise RequestError(
            f"the input {FRAMES} is {frames.datatype} {list(frames.shape)} and {TIMES} {times.datatype} "
            f"{list(times.shape)}, expected UINT8 [N, T, H, W, 3] and FP64 [N, T]"
        )
    hold(len(values))
    try:
        return [pack_frames(video, at) for video, at in zip(values, seconds, strict=True)]
    except ClipShapeError as error:
        raise RequestError(
            error.message, hint="frames are RGB as displayed, timestamps rising seconds"
        ) from error
