"""Tensors whose content costs nothing to send and would cost much to hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from ivdr_deploy.errors import RequestError
from ivdr_deploy.serving.core.tensors import from_elements, from_numbers, from_plain, from_raw


def test_more_videos_than_any_server_takes_are_refused_before_they_are_read() -> None:
    empty = bytes(4 * 5000)
    with pytest.raises(RequestError, match=r"the shape \[5000\], which is more than 4096 elements"):
        from_raw("video", "BYTES", (5000,), empty)
    with pytest.raises(RequestError, match="more than 4096 elements"):
        from_plain("video", "BYTES", (5000,), [""] * 5000)
    with pytest.raises(RequestError, match="more than 4096 elements"):
        from_elements("video", (5000,), Untouched())


class Untouched(Sequence[bytes]):
    """Elements that have a number, and must not be looked at."""

    def __len__(self) -> int:
        return 5000

    def __getitem__(self, place: Any) -> Any:
        pytest.fail("an element was read")


def test_no_more_elements_are_read_than_the_shape_says() -> None:
    for shape in ((4,), (), (1,) * 9, (-1,), (5000, 0)):
        with pytest.raises(RequestError, match="the input 'video' has"):
            from_elements("video", shape, Untouched())
    with pytest.raises(RequestError, match="has 2 or more elements, its shape says 1"):
        from_raw("video", "BYTES", (1,), bytes(4 * 1_000_000))
    with pytest.raises(RequestError, match="has 1 elements, its shape says 2"):
        from_raw("video", "BYTES", (2,), bytes(4))


@pytest.mark.parametrize("datatype", ["UINT8", "BYTES"])
def test_a_shape_that_is_too_large_to_be_written_down_is_refused(datatype: str) -> None:
    """Python refuses to write a number of more than 4300 digits."""
    shape = (10**3000, 10**3000)
    for read in (
        lambda: from_raw("video", datatype, shape, b""),
        lambda: from_plain("video", datatype, shape, []),
    ):
        with pytest.raises(RequestError, match="more than") as caught:
            read()
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("shape", [(0, 2**62, 2**62), (0, 10**30), (10**30, 0), (0,) * 7 + (2**33,)])
def test_an_extent_of_nothing_lets_no_other_one_be_endless(shape: tuple[int, ...]) -> None:
    for read in (
        lambda: from_raw("frames", "UINT8", shape, b""),
        lambda: from_plain("frames", "UINT8", shape, []),
        lambda: from_raw("video", "BYTES", shape, b""),
    ):
        with pytest.raises(RequestError, match="more than"):
            read()
    assert from_raw("frames", "UINT8", (0, 5, 4), b"").shape == (0, 5, 4)


@pytest.mark.parametrize("wrong", ["1", None, True, [1], [[1, 2]], {"a": 1}])
def test_what_is_no_number_is_refused_by_name_and_not_made_one(wrong: object) -> None:
    for data in ([wrong, 1], [1, wrong], [wrong, wrong]):
        with pytest.raises(RequestError, match=r"the input 'timestamps' holds .* is no number"):
            from_plain("timestamps", "FP64", (2,), data)
    with pytest.raises(RequestError, match="too large"):
        from_numbers("timestamps", "FP64", (1,), [10**400])
