"""What a test cannot do without: its absence skips it, unless IVDR_REQUIRE asks for it."""

from __future__ import annotations

import os

import pytest

IMPLIED = {"gpu": ("trt", "ort-gpu")}
"""What is required along: a machine that is to run ``tests/gpu`` must be able to run all of it."""


def required() -> set[str]:
    """Return what IVDR_REQUIRE asks for, with what that implies."""
    named = set(os.environ.get("IVDR_REQUIRE", "").split(","))
    return named.union(*(IMPLIED.get(name, ()) for name in named))


def missing(what: str, reason: str) -> None:
    """Skip, or fail when IVDR_REQUIRE names ``what``.

    Args:
        what: ``data`` (the real clips), ``i3d`` (its published weights), ``index`` (a package index), ``hf``
            (transformers), ``nginx``, ``gpu``, ``trt``, or ``ort-gpu`` (an ONNX Runtime built with CUDA).
            IVDR_REQUIRE is a list of these with commas between them; ``gpu`` implies ``trt`` and ``ort-gpu``.
        reason: What is not there.
    """
    if what in required():
        pytest.fail(f"{reason} (IVDR_REQUIRE asks for {what})")
    pytest.skip(reason)
