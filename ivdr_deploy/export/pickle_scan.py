"""Looks through a pickle before a reader does, for what would take that memory or time without end.

A reader makes room for all places of its memo up to the last one that is named. And it hashes what becomes the key of
a dict or goes into a set: a tuple of two tuples, each of the same two, and so on, has few bytes and is hashed without
end, in one call that hears no interrupt.
"""

from __future__ import annotations

import pickletools
from typing import IO

from ivdr_deploy._text import quoted
from ivdr_deploy.errors import CheckpointError

_MAX_MEMO = 100_000
"""Places; the published file of I3D has 1,729."""

_MAX_VALUES = 1000
"""In one tuple, with those of the tuples in it; an array or a tensor takes some ten to be described."""

_HINT = "no file of weights needs that: do not trust it, and load it nowhere else"
_NESTING = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET")
_FILLING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
_STORING = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_FETCHING = ("GET", "BINGET", "LONG_BINGET")
_MARK = 0
"""Stands on the stack for a mark; every value counts at least as one."""


def require_bounded(stream: IO[bytes]) -> None:
    """Read one pickle to its end, without making anything of it.

    Args:
        stream: It lies at its place; the stream is left behind it.

    Raises:
        CheckpointError: if reading it would take memory or time without end.
        ValueError: if it is damaged; so do ``LookupError`` and what else its parts raise.
    """
    stack: list[int] = []
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in _STORING:
            place = len(memo) if name == "MEMOIZE" else int(argument or 0)
            if place > _MAX_MEMO:
                raise CheckpointError(f"it asks for a memo of {quoted(place)} places", hint=_HINT)
            memo[place] = stack[-1]
        elif name in _FETCHING:
            stack.append(memo[int(argument or 0)])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP":
            stack.pop()
        elif name == "MARK":
            stack.append(_MARK)
        else:
            taken = _taken(stack, opcode)
            if name in _FILLING:
                stack.append(taken[0])
            elif name in _NESTING:
                stack.append(1 + sum(taken))
                if stack[-1] > _MAX_VALUES:
                    raise CheckpointError(f"it nests more than {_MAX_VALUES} values in one", hint=_HINT)
            else:
                stack += [1] * len(opcode.stack_after)


def _taken(stack: list[int], opcode: pickletools.OpcodeInfo) -> list[int]:
    """Take from the stack what an opcode does, the mark not among it."""
    before = opcode.stack_before
    taken: list[int] = []
    if pickletools.markobject in before:
        while (value := stack.pop()) != _MARK:
            taken.append(value)
        before = before[: before.index(pickletools.markobject)]
    taken += [stack.pop() for _ in before]
    return taken[::-1]
