"""Requests and answers in tensors as HTTP carries them: JSON, and behind it the bytes of tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ivdr_deploy._text import quoted
from ivdr_deploy.errors import ConfigError, EncodingError, OptionError, RequestError
from ivdr_deploy.records import from_dict
from ivdr_deploy.serving.core.oip import MOST_PARTS, TensorAnswer, TensorRequest
from ivdr_deploy.serving.core.parsing import read_json
from ivdr_deploy.serving.core.schema import Envelope
from ivdr_deploy.serving.core.tensors import Tensor, from_plain, from_raw

HEADER_LENGTH = "Inference-Header-Content-Length"
"""Header: bytes of JSON in front of the tensors."""

_MOST_VALUES = 1 << 22
"""In the JSON of a request: 27 pictures of 224 x 224 as lists of numbers, each of which takes many times its size."""

_HINT = "see the Open Inference Protocol (KServe v2) and its binary tensor data extension"


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonInput:
    """One input, its content in ``data`` or behind the JSON."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, Any] = field(default_factory=dict)
    data: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonOutput:
    """One output that is asked for."""

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonRequest:
    """The JSON of a request."""

    inputs: tuple[JsonInput, ...]
    outputs: tuple[JsonOutput, ...] = ()
    parameters: dict[str, Any] = field(default_factory=dict)
    id: str = ""


@dataclass(frozen=True, slots=True)
class AskedTensors:
    """A request, and how its answer is to be written."""

    request: TensorRequest
    binary: frozenset[str]
    """Outputs that are wanted as bytes."""

    all_binary: bool
    """Whether those that are not named are."""


def read_tensors(body: bytes, header_length: str | None, envelope: Envelope) -> AskedTensors:
    """Read a request.

    Args:
        body: JSON, perhaps with bytes behind it.
        header_length: How many bytes the JSON has, as the header says it; None: all.
        envelope: What HTTP says besides.

    Raises:
        EncodingError: if the body is compressed.
        RequestError: if it does not have this form.
        OptionError: if it asks for something unknown.
    """
    if envelope.content_encoding.strip().lower() not in ("", "identity"):
        raise EncodingError(
            f"the body has the Content-Encoding {quoted(envelope.content_encoding)}, expected none",
            hint="send the tensors as they are; videos are compressed already",
        )
    length = len(body)
    if header_length is not None:
        if not header_length.isdecimal() or len(header_length) > 19 or int(header_length) > len(body):
            raise RequestError(
                f"the header {HEADER_LENGTH} says {quoted(header_length)}, the body has {len(body)} bytes",
                hint=_HINT,
            )
        length = int(header_length)
    view = memoryview(body)
    values = read_json(bytes(view[:length]), most_values=_MOST_VALUES, what="the request", hint=_HINT)
    _check_parts(values)
    try:
        asked = from_dict(JsonRequest, values, where="the request")
    except ConfigError as error:
        raise RequestError(error.message, hint=error.hint or _HINT) from error
    parameters = dict(asked.parameters)
    all_binary = _flag(parameters.pop("binary_data_output", False), "binary_data_output")
    binary = frozenset(output.name for output in asked.outputs if _wants_binary(output, all_binary))
    request = TensorRequest(
        inputs=_inputs(asked.inputs, view[length:]),
        outputs=tuple(output.name for output in asked.outputs),
        parameters=parameters,
        id=asked.id,
    )
    return AskedTensors(request, binary, all_binary)


def write_tensors(
    answer: TensorAnswer, asked: AskedTensors, model: str, version: str
) -> tuple[bytes, dict[str, str]]:
    """Write an answer; returns its body and headers."""
    behind: list[bytes] = []
    outputs = []
    for tensor in answer.outputs:
        said: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
        }
        if tensor.name in asked.binary or (not asked.request.outputs and asked.all_binary):
            behind.append(tensor.raw())
            said["parameters"] = {"binary_data_size": len(behind[-1])}
        else:
            said["data"] = tensor.plain()
        outputs.append(said)
    body: dict[str, Any] = {
        "model_name": model,
        "model_version": version,
        "parameters": answer.parameters,
        "outputs": outputs,
    }
    if answer.id:
        body["id"] = answer.id
    text = json.dumps(body, allow_nan=False).encode()
    if not behind:
        return text, {"Content-Type": "application/json"}
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return b"".join([text, *behind]), headers


def _check_parts(values: Any) -> None:
    """Refuse more parts than any request has before a record is made of each. Another form is refused there."""
    tables = [values]
    if isinstance(values, dict):
        for name in ("inputs", "outputs"):
            _check_count(values, name, name)
            tables += values[name] if isinstance(values.get(name), list) else []
    for table in tables:
        if isinstance(table, dict):
            _check_count(table, "parameters", "parameters")
            _check_count(table, "shape", "extents in a shape")


def _check_count(table: dict[str, Any], name: str, what: str) -> None:
    held = table.get(name)
    if isinstance(held, list | dict) and len(held) > MOST_PARTS:
        raise RequestError(f"the request has {len(held)} {what}, expected at most {MOST_PARTS}", hint=_HINT)


def _inputs(asked: tuple[JsonInput, ...], behind: memoryview) -> tuple[Tensor, ...]:
    found: list[Tensor] = []
    for said in asked:
        parameters = dict(said.parameters)
        size = parameters.pop("binary_data_size", None)
        if parameters:
            raise OptionError(
                f"the input {quoted(said.name)} has the unknown parameter {quoted(next(iter(parameters)))}"
            )
        if size is not None and said.data is not None:
            raise RequestError(
                f"the input {quoted(said.name)} has data and a binary_data_size, expected one", hint=_HINT
            )
        if size is None:
            found.append(from_plain(said.name, said.datatype, said.shape, said.data))
            continue
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(behind):
            raise RequestError(
                f"the input {quoted(said.name)} has the binary_data_size {quoted(size)}, {len(behind)} bytes are left",
                hint=_HINT,
            )
        found.append(from_raw(said.name, said.datatype, said.shape, behind[:size]))
        behind = behind[size:]
    if behind:
        raise RequestError(f"behind the last input are {len(behind)} bytes more", hint=_HINT)
    return tuple(found)


def _wants_binary(output: JsonOutput, otherwise: bool) -> bool:
    parameters = dict(output.parameters)
    binary = _flag(parameters.pop("binary_data", otherwise), "binary_data")
    if parameters:
        raise OptionError(
            f"the output {quoted(output.name)} has the unknown parameter {quoted(next(iter(parameters)))}"
        )
    return binary


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"the parameter {name} is {quoted(value)}, expected true or false")
    return value
