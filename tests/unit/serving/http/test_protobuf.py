"""Protobuf messages whose parts cost two bytes to send, and those that are none."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from ivdr_deploy.errors import RequestError
from ivdr_deploy.serving.http.oip_messages import read_message
from ivdr_deploy.serving.http.protobuf import parse

INFER = service_pb2.ModelInferRequest


def a_request(seed: int) -> Any:
    """A request with something in each of its fields."""
    rng = np.random.default_rng(seed)
    request = INFER(model_name="tiny", model_version="1.0", id="é" * int(rng.integers(0, 200)))
    request.parameters["top_k"].int64_param = int(rng.integers(-(2**62), 2**62))
    request.parameters["score"].double_param = float(rng.normal())
    for place in range(int(rng.integers(1, 4))):
        tensor = request.inputs.add(
            name=f"x{place}", datatype="FP32", shape=rng.integers(0, 2**40, 3).tolist()
        )
        tensor.parameters["binary"].bool_param = True
        tensor.contents.fp32_contents.extend(rng.normal(size=5))
        tensor.contents.bytes_contents.extend([rng.bytes(300), b""])
        request.outputs.add(name=f"y{place}").parameters["z"].string_param = "z"
        request.raw_input_contents.append(rng.bytes(int(rng.integers(0, 1000))))
    return request


@pytest.mark.parametrize("seed", range(5))
def test_a_message_is_what_protobuf_makes_of_it(seed: int) -> None:
    request = a_request(seed)
    assert parse(INFER, request.SerializeToString()) == request


def test_what_is_no_message_is_refused_and_nothing_hides_parts_from_the_count() -> None:
    """Bytes are changed, cut off and added; whoever reads them after us must not see more parts than we did."""
    rng, read, refused = np.random.default_rng(0), 0, 0
    for turn in range(1500):
        message = bytearray(a_request(turn % 5).SerializeToString())
        for place in rng.integers(0, len(message), 2):
            message[place] = rng.integers(0, 256)
        if turn % 3:
            message = message[: rng.integers(0, len(message))]
        if turn % 2:
            message += b"\x2a\x00" * 150
        try:
            found = parse(INFER, bytes(message))
        except RequestError:
            refused += 1
        else:
            read += 1
            assert len(found.inputs) <= 100
    assert read > 100
    assert refused > 500


@pytest.mark.parametrize(
    "sent", [b"\xff\xff\xff", b"\x0a", b"\x0a\x02\xff\xfe", b"\x0a\x05abc", b"\x0b", b"\x0f\1", b"\0\1"]
)
def test_it_says_that_the_message_is_none(sent: bytes) -> None:
    with pytest.raises(DecodeError):
        INFER.FromString(sent)
    with pytest.raises(RequestError, match="the message is"):
        parse(INFER, sent)


EMPTY_ENTRY = b"\x22\x02\x0a\x00"
UNKNOWN = b"\xf8\x07\x00"


@pytest.mark.parametrize(
    ("part", "inside", "words"),
    [
        (b"\x2a\x00", None, "inputs in its ModelInferRequest"),
        (b"\x32\x00", None, "outputs in its ModelInferRequest"),
        (EMPTY_ENTRY, None, "parameters in its ModelInferRequest"),
        (b"\x3a\x00", None, "raw_input_contents"),
        (b"\x1a\x01x", None, "id"),
        (UNKNOWN, None, "unknown fields"),
        (EMPTY_ENTRY, b"\x2a", "parameters in its InferInputTensor"),
        (b"\x18\x01", b"\x2a", "shape"),
        (b"\x12\x02\x0a\x00", b"\x32", "parameters in its InferRequestedOutputTensor"),
    ],
)
def test_too_many_parts_are_refused_before_they_are_made(
    part: bytes, inside: bytes | None, words: str
) -> None:
    def message(count: int) -> bytes:
        content = part * count
        if inside is None:
            return content
        size = len(content)
        return inside + bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14]) + content

    assert parse(INFER, message(100)) == INFER.FromString(message(100))
    with pytest.raises(RequestError, match=f"more than 100 {words}"):
        parse(INFER, message(101))
    with pytest.raises(RequestError, match=f"more than 100 {words}"):
        parse(_NeverMade, message(200_000))


@pytest.mark.parametrize("shape", [[1], [5000], [1] * 100_000])
def test_elements_are_not_made_for_a_shape_that_does_not_fit(shape: list[int]) -> None:
    request = INFER()
    request.inputs.add(name="video", datatype="BYTES", shape=shape).contents.bytes_contents.extend(
        [b""] * 100_000
    )
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="the input 'video' has"):
            read_message(request)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


class _NeverMade:
    DESCRIPTOR = INFER.DESCRIPTOR

    @staticmethod
    def FromString(message: bytes) -> Any:  # noqa: N802  # protobuf's name
        pytest.fail("an object was made of the message")
