"""Damaged videos, drawn from a seed: cut off, with bits flipped, and with a header that says something else."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence

_HEAD_BYTES = 1024
"""From either end of a file, in which a header is looked for: mp4 has its index at the end, avi and webm describe
themselves at the beginning."""


def mutant(original: bytes, seed: int) -> bytes:
    """Damage one video; the same seed gives the same bytes."""
    return _WAYS[seed % len(_WAYS)](original, random.Random(seed))


def mutants(originals: Sequence[bytes], count: int, *, seed: int = 0) -> Iterator[bytes]:
    """Yield ``count`` damaged videos: each original in turns, in each way."""
    for number in itertools.islice(itertools.count(seed * count), count):
        yield mutant(originals[number // len(_WAYS) % len(originals)], number)


def _cut(original: bytes, draw: random.Random) -> bytes:
    return original[: draw.randrange(1, len(original))]


def _flipped(original: bytes, draw: random.Random) -> bytes:
    out = bytearray(original)
    for _ in range(draw.choice((1, 4, 16, 64))):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def _bad_header(original: bytes, draw: random.Random) -> bytes:
    """Change numbers near one end, and leave the first bytes, by which a container is told."""
    out = bytearray(original)
    reach = min(_HEAD_BYTES, len(out) - 16)
    for _ in range(draw.choice((1, 2, 8))):
        place = (
            draw.randrange(12, 12 + reach) if draw.random() < 0.5 else len(out) - 1 - draw.randrange(reach)
        )
        width = draw.choice((1, 4, 8))
        value = draw.choice(
            (b"\0" * width, b"\xff" * width, b"\x7f" + b"\xff" * (width - 1), draw.randbytes(width))
        )
        out[place : place + width] = value
    return bytes(out)


_WAYS: tuple[Callable[[bytes, random.Random], bytes], ...] = (_cut, _flipped, _bad_header)
