"""Requests and answers in tensors as gRPC carries them: protobuf messages."""

from __future__ import annotations

from typing import Any

from tritonclient.grpc import service_pb2

from ivdr_deploy.errors import RequestError
from ivdr_deploy.serving.core.oip import TensorAnswer, TensorRequest
from ivdr_deploy.serving.core.tensors import Tensor, from_elements, from_numbers, from_raw

_CONTENTS = {
    "BYTES": "bytes_contents",
    "UINT8": "uint_contents",
    "INT32": "int_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
"""The field of an input that holds its content, by datatype, where it is not raw."""


def read_message(request: Any) -> TensorRequest:
    """Read a message.

    Raises:
        RequestError: if its tensors are not what it says of them.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(
            f"the request has {len(request.inputs)} inputs and {len(raw)} raw contents, expected as many"
        )
    inputs = tuple(
        from_raw(said.name, said.datatype, said.shape, raw[place]) if raw else _typed(said)
        for place, said in enumerate(request.inputs)
    )
    parameters = {
        name: getattr(value, value.WhichOneof("parameter_choice") or "", None)
        for name, value in request.parameters.items()
    }
    outputs = tuple(output.name for output in request.outputs)
    return TensorRequest(inputs=inputs, outputs=outputs, parameters=parameters, id=request.id)


def _typed(said: Any) -> Tensor:
    """Read an input whose content is in the field of its datatype."""
    held = getattr(said.contents, _CONTENTS.get(said.datatype, ""), ())
    if said.datatype == "BYTES":
        return from_elements(said.name, said.shape, held)
    return from_numbers(said.name, said.datatype, said.shape, held)


def write_message(answer: TensorAnswer, model: str, version: str) -> Any:
    """Make the message of an answer."""
    outputs = [
        service_pb2.ModelInferResponse.InferOutputTensor(
            name=tensor.name, datatype=tensor.datatype, shape=tensor.shape
        )
        for tensor in answer.outputs
    ]
    return service_pb2.ModelInferResponse(
        model_name=model,
        model_version=version,
        id=answer.id,
        parameters={
            name: service_pb2.InferParameter(string_param=value) for name, value in answer.parameters.items()
        },
        outputs=outputs,
        raw_output_contents=[tensor.raw() for tensor in answer.outputs],
    )
