"""A softmax regression on features, brought to its optimum.

Features are brought to mean 0 and variance 1, as by a batch norm, before the fit; the scaling is then folded into the
linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from ivdr_deploy.errors import IvdrError
from ivdr_deploy.evaluation.metrics import Accuracy, video_accuracy
from ivdr_deploy.results import softmax

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
_PENALTY = 1e-2
"""Where nothing can be held out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """A classifier of features."""

    weight: np.ndarray
    """float64 (K, F)."""

    bias: np.ndarray
    """float64 (K,)."""

    def logits(self, feature: np.ndarray) -> np.ndarray:
        """Map (clips, F) to (clips, K)."""
        logits: np.ndarray = feature @ self.weight.T + self.bias
        return logits


def fit(
    features: Sequence[np.ndarray], targets: Sequence[int], *, num_classes: int, penalty: float
) -> Linear:
    """Fit a softmax regression; every video counts alike, however many clips it has.

    The loss is the mean cross-entropy and ``penalty / 2`` times the sum of the squared weights of scaled features.

    Args:
        features: Per video (clips, F).
        targets: Class of every video.
        num_classes: K.
        penalty: Above 0, so that there is one optimum.
    """
    stacked = np.concatenate(features).astype(np.float64)
    mean, variance = stacked.mean(axis=0), stacked.var(axis=0)
    # A feature that hardly ever varies would be scaled up to noise.
    scale = np.sqrt(variance + 1e-4 * variance.mean() + 1e-30)
    # The best weights lie in the span of the inputs, which on few videos has far fewer dimensions than F.
    with _one_thread():
        inputs, basis = _in_span((stacked - mean) / scale)
    counts = np.array([len(feature) for feature in features])
    truth = torch.from_numpy(np.repeat(np.asarray(targets), counts))
    share = torch.from_numpy(np.repeat(1.0 / counts, counts) / len(features))
    weight = torch.zeros(num_classes, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        losses = torch.nn.functional.cross_entropy(inputs @ weight.T + bias, truth, reduction="none")
        total = (share * losses).sum() + 0.5 * penalty * weight.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    with _one_thread():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    scaled = (weight.detach() @ basis).numpy() / scale
    return Linear(weight=scaled, bias=bias.detach().numpy() - scaled @ mean)


def _in_span(inputs: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return coordinates (N, R) of inputs (N, F) and the orthonormal basis (R, F) that they are in."""
    given = torch.from_numpy(inputs)
    if len(given) >= given.shape[1]:
        return given, torch.eye(given.shape[1], dtype=given.dtype)
    basis = torch.linalg.qr(given.T).Q.T
    return given @ basis.T, basis


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: sharing out operators as small as these costs more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def choose_penalty(
    made: Sequence[np.ndarray | IvdrError],
    targets: Sequence[int],
    parts: Sequence[np.ndarray],
    *,
    num_classes: int,
) -> tuple[float, Accuracy]:
    """Return the penalty under which the held-out videos are most probable, and the accuracy on them."""
    if not parts:
        return _PENALTY, Accuracy(0, 0)
    good = {row: one for row, one in enumerate(made) if not isinstance(one, IvdrError)}
    best: tuple[float, float, Accuracy] | None = None
    for penalty in PENALTIES:
        probabilities, truth, failed = [], [], 0
        for part in parts:
            held = set(part.tolist())
            rows = [row for row in good if row not in held]
            linear = fit(
                [good[row] for row in rows],
                [targets[row] for row in rows],
                num_classes=num_classes,
                penalty=penalty,
            )
            shown = sorted(held & good.keys())
            probabilities += [softmax(linear.logits(good[row])).mean(axis=0) for row in shown]
            truth += [targets[row] for row in shown]
            failed += len(held) - len(shown)
        if not truth:  # none of them can be used
            return _PENALTY, Accuracy(0, failed)
        of_truth = [row[target] for row, target in zip(probabilities, truth, strict=True)]
        loss = -float(np.log(np.maximum(of_truth, np.finfo(np.float64).tiny)).mean())
        if best is None or loss < best[0]:
            best = loss, penalty, video_accuracy(probabilities, truth).with_wrong(failed)
    assert best is not None
    return best[1:]
