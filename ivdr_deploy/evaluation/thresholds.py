"""What a variant must keep to, by precision: every number that ``verify`` judges by, and why it is what it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from ivdr_deploy._text import quoted
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.runtimes.compare import TOLERANCE
from ivdr_deploy.spec import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """Of one precision."""

    tolerance: float
    """Largest difference of an output value, by its size: ``runtimes.compare.TOLERANCE``, by which every loader and
    export judges as well."""

    min_cosine: float
    """Smallest cosine of an output vector. It guards vectors of unit length, whose values are so small that the
    tolerance of a coarse precision allows another direction."""

    min_agreement: float
    """Smallest share of videos with the reference's label; ties do not count against it."""

    tie_margin: float = 1e-4
    """Where the reference prefers its label by no more than this probability, it is a tie: fp32 arithmetic in another
    order moves probabilities by as much, so neither label is wrong."""

    max_flip_margin: float
    """Largest margin of a flip, however few there are: beyond what the precision explains, a label is wrong."""

    max_drop: float
    """Accuracy and R@1 may fall by this share; more fails when the paired interval excludes it, since a few videos of a
    short list prove nothing."""

    max_confidence_shift: float
    """Largest change of the mean confidence, the probability of the answer, in either direction."""

    abstain: float = 0.5
    """An answer with a smaller confidence counts as "don't know". As many videos may cross it as may flip."""

    min_sensitivity: float
    """A real change of the input moves an output at least this many times as much as the variant differs from the
    reference. Else that they agree says nothing: an output that is constant agrees with itself."""


_EIGHT_BITS = Thresholds(
    tolerance=TOLERANCE["int8"],
    min_cosine=0.95,
    min_agreement=0.97,
    max_flip_margin=TOLERANCE["int8"],
    max_drop=0.01,
    max_confidence_shift=0.03,
    min_sensitivity=4.0,
)
"""Values within 2e-1 leave 0.98; a vector of unit length may turn by 18 degrees. Three videos in a hundred may flip:
what post-training quantisation usually costs. Its error is 2 to 3 % of an output: 4 times is a tenth of the size."""

THRESHOLDS: dict[Precision, Thresholds] = {
    # Rounding in another order. No label may change but in a tie. Cosine: a relative difference of 1e-4 leaves
    # 1 - 5e-9; the rest is for vectors close to zero.
    "fp32": Thresholds(
        tolerance=TOLERANCE["fp32"],
        min_cosine=0.9999,
        min_agreement=1.0,
        max_flip_margin=TOLERANCE["fp32"],
        max_drop=0.0,
        max_confidence_shift=1e-3,
        min_sensitivity=100.0,
    ),
    # 11 bits: values within 2e-2 leave a cosine of 0.9998. One video in a hundred may flip where the reference wavers.
    # Its error is some 1e-3 of an output. The sensitivity of fp32 would ask for inputs that move it by a tenth of its
    # size, which clips of one class need not do; an output that is dead or clipped moves by less than its error.
    "fp16": Thresholds(
        tolerance=TOLERANCE["fp16"],
        min_cosine=0.999,
        min_agreement=0.99,
        max_flip_margin=TOLERANCE["fp16"],
        max_drop=0.005,
        max_confidence_shift=0.01,
        min_sensitivity=20.0,
    ),
    # 8 bits: values within 1e-1 leave 0.995. Its error is some 1 % of an output: 10 times is a tenth of the size.
    "bf16": Thresholds(
        tolerance=TOLERANCE["bf16"],
        min_cosine=0.99,
        min_agreement=0.99,
        max_flip_margin=TOLERANCE["bf16"],
        max_drop=0.005,
        max_confidence_shift=0.02,
        min_sensitivity=10.0,
    ),
    "int8": _EIGHT_BITS,
    "fp8": _EIGHT_BITS,
}


def parse_thresholds(settings: Sequence[str]) -> dict[str, float]:
    """Read ``name=value`` settings of thresholds.

    Raises:
        ConfigError: if one is malformed, names no threshold, or is no finite number of at least 0.
    """
    known = [field.name for field in fields(Thresholds)]
    values = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip()
        if not equals or name not in known:
            raise ConfigError(
                f"{quoted(setting)} is not a threshold",
                hint=f"write NAME=VALUE; the names are {', '.join(known)}",
            )
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise ConfigError(f"the threshold {name} must be a number of at least 0, found {quoted(text)}")
        values[name] = value
    return values


def thresholds_for(precision: Precision, changes: dict[str, float] | None = None) -> Thresholds:
    """Return the thresholds of a precision, some of them changed."""
    return replace(THRESHOLDS[precision], **(changes or {}))
