"""A small pickle that would take its reader memory or time without end is refused before it is read."""

from __future__ import annotations

import contextlib
import io
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ivdr_deploy.errors import CheckpointError
from ivdr_deploy.export.from_torchvision import _state_dict
from ivdr_deploy.export.numpy_pickle import read_arrays
from ivdr_deploy.export.pickle_scan import require_bounded
from ivdr_deploy.export.torch_file import foreign_name

DEEP = 22
"""Twice two to the power of this is how often such a key is hashed: a second where it is not refused."""

TWICE = b"N" + b"2\x86" * DEEP
MARKED = b"N" + b"(" + b"N" + b"".join(b"q%c0(h%ch%ct" % (n, n, n) for n in range(DEEP)) + b"t"
REMEMBERED = b"N" + b"".join(b"q%c0h%ch%c\x86" % (n, n, n) for n in range(DEEP))
BY_ORDER = b"N" + b"".join(b"\x940h%ch%c\x86" % (n, n) for n in range(DEEP))
FROZEN = b"N" + b"".join(b"q%c0(h%ch%c\x86h%c\x85\x91" % (n, n, n, n) for n in range(DEEP))

ENDLESS = {
    "key": b"\x80\x02}" + TWICE + b"Ns.",
    "key of a mark": b"\x80\x02}" + MARKED + b"Ns.",
    "key by the memo": b"\x80\x02}" + REMEMBERED + b"Ns.",
    "key by the order of the memo": b"\x80\x04}" + BY_ORDER + b"Ns.",
    "keys": b"\x80\x02}(" + TWICE + b"Nu.",
    "set": b"\x80\x04\x8f(" + TWICE + b"\x90.",
    "frozenset": b"\x80\x04(" + TWICE + b"\x91.",
    "frozen sets": b"\x80\x04" + FROZEN + b".",
}
ROOMY = b"\x80\x02N" + b"r\x00\x00\x20\x00" + b"."
"""It names a place of the memo that is 16 MB behind its beginning."""


def archive(content: bytes, name: str = "archive/data.pkl") -> bytes:
    stream = io.BytesIO()
    torch.save({}, stream)
    made = io.BytesIO()
    with zipfile.ZipFile(stream) as source, zipfile.ZipFile(made, "w") as target:
        for member in source.namelist():
            own = member.endswith("data.pkl")
            target.writestr(name if own else member, content if own else source.read(member))
    return made.getvalue()


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_is_hashed_without_end_is_refused_by_every_reader(kind: str) -> None:
    for read in (lambda content: read_arrays(content, where="w"), lambda content: _state_dict(content, "w")):
        with pytest.raises(CheckpointError, match=r"^w: it nests more than 1000 values") as caught:
            read(ENDLESS[kind])
        assert "do not trust it" in caught.value.hint
    assert foreign_name(ENDLESS[kind][:-1] + b"0cos\nsystem\n.") == "", "it was read"


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/DATA.PKL"])
def test_the_same_in_an_archive_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"^w: it nests more than 1000 values"):
        _state_dict(archive(ENDLESS["key by the memo"], name), "w")
    assert foreign_name(archive(ENDLESS["key"][:-1] + b"0cos\nsystem\n.", name)) == "", "it was read"


def test_behind_other_pickles_it_is_refused() -> None:
    """As files of ``torch.save`` had several."""
    with pytest.raises(CheckpointError, match=r"^w: it nests more than 1000 values"):
        _state_dict(pickle.dumps(1) + pickle.dumps(2) + ENDLESS["key"], "w")


def test_a_memo_of_many_places_takes_no_memory(ivdr: Callable[..., Any], tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        for read in (lambda: read_arrays(ROOMY, where="w"), lambda: _state_dict(ROOMY, "w")):
            with pytest.raises(CheckpointError, match=r"^w: it asks for a memo of 2097152 places"):
                read()
        assert foreign_name(ROOMY) == ""
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    (tmp_path / "e.pth").write_bytes(ROOMY)
    code, _, stderr = ivdr(
        "import", "torchvision:r3d_18", "--weights", tmp_path / "e.pth", "-o", tmp_path / "out"
    )
    assert (code, "e.pth: it asks for a memo of 2097152 places" in " ".join(stderr.split())) == (5, True)


@pytest.mark.parametrize("shape", [[0], (1 << 80, 0), (-1, 0)])
def test_an_array_whose_axes_are_no_tuple_of_numbers_of_a_size_is_refused(shape: Any) -> None:
    """The product of a list of long numbers takes minutes, and hears no interrupt either."""
    content = pickle.dumps({"a": Given((1, shape, np.dtype("f4"), False, b""))}, protocol=4)
    with pytest.raises(CheckpointError, match="does not have the bytes of its shape"):
        read_arrays(content, where="w")


class Given:
    """Pickled as an array of numpy with this state."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        function, arguments, _ = np.zeros(1).__reduce__()
        return function, arguments, self.state


VALUES: list[Any] = [
    {"a": [(1, 2), {3}, frozenset({4}), "text"], "b": (1,) * 900, (5, 6): None, "c": [[[]]] * 3000},
    {index: (index, str(index)) for index in range(5000)},
    [Path("x"), np.arange(3), np.float32(1), slice(1, 2), Exception("said")],
]


@pytest.mark.parametrize("protocol", range(6))
def test_what_python_writes_is_looked_through_to_its_end(protocol: int) -> None:
    for value in VALUES:
        stream = io.BytesIO(pickle.dumps(value, protocol=protocol) + b"behind")
        require_bounded(stream)
        assert stream.read() == b"behind"


@pytest.mark.parametrize("new", [True, False])
def test_state_dicts_of_torch_are_still_read(new: bool) -> None:
    state = torch.nn.Sequential(*(torch.nn.BatchNorm1d(2) for _ in range(300))).state_dict()
    stream = io.BytesIO()
    torch.save(state, stream, _use_new_zipfile_serialization=new)
    assert _state_dict(stream.getvalue(), "w").keys() == state.keys()


@pytest.mark.filterwarnings("ignore:invalid escape")
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_damaged_pickle_is_an_error_and_nothing_else(protocol: int) -> None:
    content = pickle.dumps([{"a": (1, [2])}, Path("x"), {3}, np.zeros(2)], protocol=protocol)
    rng = np.random.default_rng(0)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= int(rng.integers(1, 256))
        with contextlib.suppress(CheckpointError, ValueError, LookupError):
            require_bounded(io.BytesIO(bytes(changed)))
