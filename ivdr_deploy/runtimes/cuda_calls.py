"""Calls of a network on a GPU: a stream of its own, pinned buffers that stay, and a CUDA graph per size of batch.

A small network is launched operator by operator more slowly than a GPU computes it. A CUDA graph launches all of them
at once, for one size of batch and always with the same memory, so each size that comes has its own graph and buffers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ivdr_deploy._text import reason_of
from ivdr_deploy.errors import IvdrError

GRAPHS = 8
"""Sizes that get a graph, first come, first served: each keeps the memory of its activations. Others run without."""

_WARM_CALLS = 3
"""Before a capture: cuDNN chooses its algorithms, and libraries allocate what they keep."""

_log = logging.getLogger(__name__)

Network = Callable[[Tensor], Sequence[Tensor]]
"""uint8 (N, T, H, W, 3) on the GPU -> its outputs there, on the current stream, first axis clips."""


@dataclass(slots=True)
class _Size:
    """What one size of batch keeps."""

    pinned: Tensor
    video: Tensor
    graph: torch.cuda.CUDAGraph
    outputs: list[Tensor]
    results: list[Tensor]
    """Pinned, for ``outputs``."""

    network: Network
    """What was captured. The last of all, so that it goes after the graph, which launches what belongs to it."""


class CudaCalls:
    """Runs a network on the current CUDA device. Safe to call from one thread at a time.

    Args:
        network: What to run. It must not wait for the GPU, or a graph of it cannot be captured.
        clip_shape: (T, H, W, 3).
        apart: Makes what is captured for one size, where ``network`` itself must not be: because it holds the state of
            its last call, which a graph goes on using. None: it holds none.
    """

    def __init__(
        self, network: Network, clip_shape: tuple[int, ...], *, apart: Callable[[], Network] | None = None
    ) -> None:
        self._network = network
        self._apart = apart or (lambda: network)
        self._clip_shape = clip_shape
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._sizes: dict[int, _Size] = {}
        self.no_graphs = ""
        """Why no graph is captured any more; empty while they are."""

    @property
    def captured(self) -> tuple[int, ...]:
        """Sizes that have a graph."""
        return tuple(self._sizes)

    def __call__(self, video: np.ndarray) -> list[np.ndarray]:
        """Run one batch.

        Args:
            video: uint8 (N, T, H, W, 3).

        Returns:
            float32 arrays, one per output, which later calls leave alone.
        """
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            size = self._sizes.get(len(video)) or self._capture(len(video))
            if size is None:
                moved = as_tensor(video).to("cuda")
                return [output.float().cpu().numpy() for output in self._network(moved)]
            size.pinned.copy_(as_tensor(video))
            size.video.copy_(size.pinned, non_blocking=True)
            size.graph.replay()
            for result, output in zip(size.results, size.outputs, strict=True):
                result.copy_(output, non_blocking=True)
            self._stream.synchronize()
            return [result.numpy().copy() for result in size.results]

    def _capture(self, clips: int) -> _Size | None:
        """Make buffers and graph for a size; None where there is to be none."""
        if self.no_graphs or len(self._sizes) >= GRAPHS:
            return None
        shape = (clips, *self._clip_shape)
        video = torch.zeros(shape, dtype=torch.uint8, device="cuda")
        try:
            network = self._apart()
        except IvdrError as error:
            self._go_without(error)
            return None
        for _ in range(_WARM_CALLS):
            network(video)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the GPU meanwhile, for example to ask how much memory is free.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                outputs = [output.float() for output in network(video)]
        except (RuntimeError, IvdrError) as error:  # of torch; of a runtime that is not torch's
            self._go_without(error)
            return None
        self._sizes[clips] = _Size(
            pinned=torch.empty(shape, dtype=torch.uint8, pin_memory=True),
            video=video,
            graph=graph,
            outputs=outputs,
            results=[torch.empty(output.shape, dtype=torch.float32, pin_memory=True) for output in outputs],
            network=network,
        )
        return self._sizes[clips]

    def _go_without(self, error: Exception) -> None:
        """Say once why no graph is captured any more."""
        self.no_graphs = reason_of(error)
        _log.warning("no CUDA graph can be captured, each operator is launched: %s", self.no_graphs)


def as_tensor(video: np.ndarray) -> Tensor:
    """View a batch as a tensor; a read-only array is copied, since torch has no read-only tensors."""
    return torch.from_numpy(video if video.flags.writeable else video.copy())
