"""Weights in a pickle are read, and nothing in it runs."""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivdr_deploy.errors import CheckpointError
from ivdr_deploy.export.numpy_pickle import read_arrays

ARRAYS = {
    "params": {"a/b": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "c": np.float32([[1.5]])},
    "stats": {"d": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)), "e": np.zeros(0, "f4")},
}


class Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_are_read_as_numpy_wrote_them(protocol: int) -> None:
    found = read_arrays(pickle.dumps(ARRAYS, protocol=protocol), where="w")
    assert set(found) == {("params", "a/b"), ("params", "c"), ("stats", "d"), ("stats", "e")}
    for (outer, inner), value in found.items():
        np.testing.assert_array_equal(value, ARRAYS[outer][inner])
        assert value.dtype == np.float32


def test_the_spelling_of_older_numpy_is_read() -> None:
    content = pickle.dumps(ARRAYS, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert len(read_arrays(content, where="w")) == 4


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Runs(os.system, "touch ran"), "posix.system"),
        (Runs(eval, "open('ran', 'w')"), "builtins.eval"),
        (Runs(getattr, "x", "real"), "builtins.getattr"),
        (Runs(np.load, "x"), "numpy.load"),
        (Path("x"), "pathlib.PosixPath"),
        (np.float32(1), "numpy._core.multiarray.scalar"),
    ],
)
def test_any_other_name_is_refused_and_nothing_runs(
    value: Any, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps({"params": ARRAYS["params"], "more": value}, protocol=4)
    with pytest.raises(CheckpointError, match=f"^weights.ckpt: the file names '{named}'") as caught:
        read_arrays(content, where="weights.ckpt")
    assert "do not trust it" in caught.value.hint
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("root", "found"),
    [(np.zeros(3, "f4"), "an array"), ([ARRAYS], "list"), (3, "int"), ("\ud800", "str"), (None, "NoneType")],
)
def test_a_file_of_anything_but_a_dict_is_refused(root: Any, found: str) -> None:
    with pytest.raises(CheckpointError, match=f"^w: expected nested dicts of arrays, found {found} alone"):
        read_arrays(pickle.dumps(root, protocol=4), where="w")


def test_a_file_cut_short_anywhere_is_an_error() -> None:
    content = pickle.dumps(ARRAYS, protocol=4)
    for length in range(len(content) - 1):
        with pytest.raises(CheckpointError, match=r"not a readable pickle|holds no arrays"):
            read_arrays(content[:length], where="w")


def test_a_changed_byte_gives_arrays_or_an_error() -> None:
    content = pickle.dumps(ARRAYS, protocol=4)
    rng = np.random.default_rng(0)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= int(rng.integers(1, 256))
        with contextlib.suppress(CheckpointError):
            read_arrays(bytes(changed), where="w")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": np.arange(3)}, "not of little-endian float32"),
        ({"a": np.arange(3, dtype=">f4")}, "not of little-endian float32"),
        ({"a": np.array([None])}, "not of little-endian float32"),
        ({"a": np.zeros(2, [("x", "<f4")])}, "not of little-endian float32"),
        ([1, 2], "nested dicts of arrays, found list"),
        ({"a": {"b": 3}}, "found int at 'a/b'"),
        ({}, "holds no arrays"),
    ],
)
def test_what_is_no_dict_of_float32_arrays_is_refused(value: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_arrays(pickle.dumps(value, protocol=4), where="w")


def test_a_small_file_cannot_claim_to_be_endless() -> None:
    value: Any = {"a": np.zeros(3, np.float32)}
    for _ in range(15):
        value = {str(number): value for number in range(10)}
    with pytest.raises(CheckpointError, match="nested dicts"):
        read_arrays(pickle.dumps(value, protocol=4), where="w")
    many = {str(number): ARRAYS["params"]["a/b"] for number in range(100)}
    with pytest.raises(CheckpointError, match="share their bytes"):
        read_arrays(pickle.dumps(many, protocol=4), where="w")
