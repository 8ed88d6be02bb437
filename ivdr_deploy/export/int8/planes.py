"""A convolution over three axes as one over two.

ONNX Runtime copies what each output reads into a buffer before it multiplies. Over three axes it does so for a whole
clip at once, which falls out of the caches, and channel by channel where a pixel has few: 3 channels of 16 frames of
112x112 under a kernel of 3x7x7 took 85 ms on two cores, and 12 with the frames joined to 9 channels. Activations that
lie as (N, T, H, W, C) need no copy to be seen as frames (N * T, H, W, C), or as columns (N, T, H * W, C) whose pixels
move through time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper


@dataclass(frozen=True, slots=True)
class Planes:
    """How a convolution is done over two axes; every list is in the order of the axes it speaks of."""

    starts: list[int]
    """First frame, after padding in time, that each frame of the kernel reads; empty: frames are read as they lie."""

    length: int
    """Frames from the first to behind the last one that an output reads, for one of ``starts``."""

    step: int
    """Frames from one output to the next."""

    padding: tuple[int, int]
    """Frames of zeros to put before and behind."""

    view: list[int]
    """(images, rows, columns, channels) as which the activations are seen."""

    weights: np.ndarray
    """(outputs, channels, rows, columns)."""

    strides: list[int]
    dilations: list[int]
    pads: list[int]

    def read(self, x: str, *, zero: str, name: str) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
        """Make the nodes that turn activations into the images that the convolution reads, and their constants.

        Args:
            x: The activations.
            zero: A constant: what zero is among them.
            name: Of the convolution; new names begin with it.
        """
        nodes: list[onnx.NodeProto] = []
        constants: dict[str, np.ndarray] = {}

        def add(op_type: str, inputs: list[str], result: str, **given: Any) -> str:
            nodes.append(helper.make_node(op_type, inputs, [f"{name}/{result}"], **given))
            return f"{name}/{result}"

        def constant(end: str, *values: int) -> str:
            constants[f"{name}/{end}"] = np.array(values)
            return f"{name}/{end}"

        before, behind = self.padding
        if before or behind:
            x = add("Pad", [x, constant("pads", 0, before, 0, 0, 0, 0, behind, 0, 0, 0), zero], "padded")
        frames = [
            add(
                "Slice",
                [
                    x,
                    constant(f"start{start}", start),
                    constant(f"end{start}", start + self.length),
                    constant("axis", 1),
                    constant("step", self.step),
                ],
                f"from{start}",
            )
            for start in self.starts
        ]
        if len(frames) > 1:
            x = add("Concat", frames, "joined", axis=4)
        elif frames:
            (x,) = frames
        add("Reshape", [x, constant("view", *self.view)], "images")
        return nodes, constants


def as_planes(
    weights: np.ndarray,
    size: Sequence[int],
    frames_out: int,
    *,
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
) -> Planes:
    """Say how a convolution over time, height and width is done over two axes.

    Args:
        weights: (outputs, channels of a group, kt, kh, kw).
        size: Channels, frames, rows and columns of what it reads.
        frames_out: Frames that it gives.
        strides: Of time, height and width, as are ``dilations``.
        dilations: Distance between what neighbours in the kernel read.
        pads: Before each of the three axes, then behind each.
    """
    channels, frames, rows, columns = size
    outputs, own, kt, kh, kw = weights.shape
    before, behind = pads[0], pads[3]
    still = pads[1:3] == [0, 0] and pads[4:6] == [0, 0] and strides[1] == strides[2] == 1
    if kt > 1 and kh == kw == 1 and still:
        return Planes(
            starts=[],
            length=0,
            step=1,
            padding=(0, 0),
            view=[-1, frames, rows * columns, channels],
            weights=weights[:, :, :, :, 0],
            strides=[strides[0], 1],
            dilations=[dilations[0], 1],
            pads=[before, 0, behind, 0],
        )
    as_they_lie = kt == 1 and strides[0] == 1 and before == behind == 0
    joined = weights.transpose(0, 2, 1, 3, 4).reshape(outputs, kt * own, kh, kw)
    return Planes(
        starts=[] if as_they_lie else [place * dilations[0] for place in range(kt)],
        length=strides[0] * (frames_out - 1) + 1,
        step=strides[0],
        padding=(before, behind),
        view=[-1, rows, columns, kt * channels],
        weights=joined,
        strides=list(strides[1:]),
        dilations=list(dilations[1:]),
        pads=[*pads[1:3], *pads[4:6]],
    )
