"""Damage to files, drawn from a seed: bytes that change, go or come, and values of JSON that become others."""

from __future__ import annotations

import copy
import json
import random
from typing import Any


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 3, 10**9, 10**30, 0.5, float("nan"), float("inf"), "", "x", "x" * 10_000, "a\0b", "\ud800",
    "../../etc/passwd", [], [[]], [1, 2], ["a", "a"], {}, {"a": 1}, deep(500),
)  # fmt: skip


def damaged_bytes(data: bytes, seed: int, *, within: int | None = None) -> bytes:
    """Damage a file; ``within`` says how many bytes at its start most of the damage is done to."""
    rng = random.Random(seed)
    out = bytearray(data)
    end = len(out) if within is None or rng.random() < 0.2 else within
    kind = rng.randrange(6)
    if kind <= 2:
        for _ in range(rng.choice((1, 1, 2, 8))):
            out[rng.randrange(end)] ^= 1 << rng.randrange(8)
    elif kind == 3:
        del out[rng.randrange(end) :]
    elif kind == 4:
        begin = rng.randrange(end)
        out[begin : begin + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(64))
    else:
        begin, count = rng.randrange(end), rng.randrange(1, 64)
        out[begin : begin + count] = bytes([rng.choice((0, 0x5B, 0x7F, 0xFF))]) * count
    return bytes(out)


def damaged_json(values: Any, seed: int) -> Any:
    """Replace, remove, add or rename one value somewhere in a tree."""
    rng = random.Random(seed)
    tree = copy.deepcopy(values)
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            places.append((node, key))
            visit(value)

    visit(tree)
    node, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice(("x", "name ", "é" * 50, ""))] = node.pop(key)
    elif kind == 2 and isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    elif kind == 3 and len(places) > 1:
        other, name = rng.choice(places)
        node[key] = copy.deepcopy(other[name])
    else:
        node[key] = rng.choice(VALUES)
    return tree


def dumped(values: Any) -> str:
    """Write JSON that may hold what JSON has no word for."""
    return json.dumps(values, ensure_ascii=True, allow_nan=True)
