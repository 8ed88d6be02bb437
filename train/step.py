"""One step of training as one module, so that DDP and ``torch.compile`` see all of it: batch in, loss and metrics out.

Everything random is drawn outside, in ``train.data`` and ``train.augment``, and comes in as tensors: nothing in
``forward`` looks at a value, waits for the device, or has a shape that depends on data. B is the number of videos, S of
slots, V of views: 3, or 2 where the shuffle-rank loss does not take part. Where several processes train, B is the share
of one.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ivdr_deploy.models.network import VideoModel
from train.augment import Changes, apply_changes
from train.distributed import gather
from train.dual import (
    LossAndMetrics,
    Queue,
    changed_clips,
    dual_loss,
    encode,
    encode_clips,
    passes,
    query_passes,
)
from train.method import DualConfig


class DualStep(nn.Module):
    """Pre-training: the dual losses, with contrast within the batch.

    Args:
        model: With a clip head and a series head; the weights that the step trains are those that require a gradient.
        config: Which losses, weights and temperatures.
        bf16: Run the backbone in bfloat16.
    """

    def __init__(self, model: VideoModel, config: DualConfig, *, bf16: bool = False) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.bf16 = bf16
        _train_heads(model, config.trained_heads)

    def forward(
        self, views: Tensor, changes: Changes, permutation: Tensor, contrast: Tensor | None = None
    ) -> LossAndMetrics:
        """Compute the losses of a batch.

        Args:
            views: uint8 (V, B, T, H, W, 3) from ``train.data.dual_views``.
            changes: Augmentation of the V * B clips, view by view.
            permutation: int64 (B, S): order of the segments in which the third view is seen once more.
            contrast: Scalar that the losses beside shuffle-rank are multiplied by; None: 1.
        """
        clips = changed_clips(views, changes, permutation)
        outputs = encode_clips(self.model, clips, permutation, passes(self.config), bf16=self.bf16)
        return dual_loss(outputs, permutation, self.config, contrast=contrast)


class MocoStep(nn.Module):
    """Pre-training: the dual losses, with contrast against a queue of earlier keys.

    Keys are what a copy of the network gives for view 1; its weights follow those of the network, its batch norms see
    whole batches. He et al. shuffle the batch over processes instead, which statistics of the whole batch make
    pointless.

    Args:
        model: As for ``DualStep``.
        config: Which losses, weights, temperatures and queue.
        parts: Calls that make one step together: the copy follows once in all of them.
        bf16: Run the backbones in bfloat16.
    """

    clip_queue: Tensor
    slot_queue: Tensor
    queue_videos: Tensor
    queue_next: Tensor

    def __init__(self, model: VideoModel, config: DualConfig, *, parts: int = 1, bf16: bool = False) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.bf16 = bf16
        self._kept = config.momentum ** (1.0 / parts)
        _train_heads(model, config.trained_heads)
        self.key = copy.deepcopy(model).requires_grad_(False)
        length, spec = config.queue_length, model.spec
        slots = F.normalize(torch.randn(length, spec.num_slots, spec.slot_dim), dim=-1)
        self.register_buffer("clip_queue", F.normalize(torch.randn(length, spec.clip_dim), dim=-1))
        # The mean of the slots is all that the contrast of slots needs of a key.
        self.register_buffer("slot_queue", slots.mean(dim=1))
        self.register_buffer("queue_videos", torch.full((length,), -1))
        self.register_buffer("queue_next", torch.zeros((), dtype=torch.long))

    def forward(
        self,
        views: Tensor,
        changes: Changes,
        permutation: Tensor,
        videos: Tensor,
        contrast: Tensor | None = None,
    ) -> LossAndMetrics:
        """Compute the losses of a batch, let the copy follow, and put its keys into the queue.

        Args:
            views: As for ``DualStep``.
            changes: As for ``DualStep``.
            permutation: As for ``DualStep``.
            videos: int64 (B,) rows of the videos in the training list.
            contrast: As for ``DualStep``.
        """
        clips = changed_clips(views, changes, permutation)
        outputs = encode_clips(self.model, clips, permutation, query_passes(self.config), bf16=self.bf16)
        with torch.no_grad():
            for key, query in zip(self.key.parameters(), self.model.parameters(), strict=True):
                key.lerp_(query.detach(), 1.0 - self._kept)
            keys = encode_clips(self.key, clips, permutation, [["second"]], bf16=self.bf16)
        # Copies: the graph holds what is overwritten below.
        queue = Queue(self.clip_queue.clone(), self.slot_queue.clone(), self.queue_videos == videos[:, None])
        result = dual_loss(
            outputs._replace(second=keys.second), permutation, self.config, contrast=contrast, queue=queue
        )
        assert keys.second is not None
        self._enqueue(gather(keys.second.clip), gather(keys.second.slots.mean(dim=1)), gather(videos))
        return result

    @torch.no_grad()
    def _enqueue(self, clips: Tensor, means: Tensor, videos: Tensor) -> None:
        places = (self.queue_next + torch.arange(len(videos), device=videos.device)) % len(self.queue_videos)
        self.clip_queue.index_copy_(0, places, clips)
        self.slot_queue.index_copy_(0, places, means)
        self.queue_videos.index_copy_(0, places, videos)
        self.queue_next.add_(len(videos)).remainder_(len(self.queue_videos))


class LabelStep(nn.Module):
    """Fine-tuning with cross-entropy.

    Heads that it does not train are set to need no gradient.

    Args:
        model: With a classifier.
        bf16: Run the backbone in bfloat16.
    """

    def __init__(self, model: VideoModel, *, bf16: bool = False) -> None:
        super().__init__()
        self.model = model
        self.bf16 = bf16
        _train_heads(model, ())

    def forward(self, views: Tensor, changes: Changes, truth: Tensor) -> LossAndMetrics:
        """Compute the loss of a batch.

        Args:
            views: uint8 (B, T, H, W, 3).
            changes: Augmentation of the B clips.
            truth: int64 (B,) true classes.
        """
        feature = encode(self.model, apply_changes(views, changes), bf16=self.bf16)
        return label_loss(self.model, feature, truth)


class JointStep(nn.Module):
    """Fine-tuning with cross-entropy and the dual losses, so that every head goes along with the backbone.

    Args:
        model: With all heads.
        config: Which dual losses, weights and temperatures; in the form ``simclr``.
        dual_weight: Weight of their sum beside cross-entropy.
        bf16: Run the backbone in bfloat16.
    """

    def __init__(
        self, model: VideoModel, config: DualConfig, *, dual_weight: float, bf16: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.dual_weight = dual_weight
        self.bf16 = bf16
        _train_heads(model, config.trained_heads)

    def forward(
        self,
        views: Tensor,
        changes: Changes,
        permutation: Tensor,
        truth: Tensor,
        contrast: Tensor | None = None,
    ) -> LossAndMetrics:
        """Compute the losses of a batch; every view carries its video's label.

        Args:
            views: As for ``DualStep``.
            changes: As for ``DualStep``.
            permutation: As for ``DualStep``.
            truth: int64 (B,) true classes.
            contrast: As for ``DualStep``.
        """
        clips = changed_clips(views, changes, permutation)
        outputs = encode_clips(self.model, clips, permutation, passes(self.config), bf16=self.bf16)
        shown = [part.feature for part in (outputs.first, outputs.second, outputs.again) if part is not None]
        loss, metrics = label_loss(self.model, torch.cat(shown), truth.repeat(len(shown)))
        dual, dual_metrics = dual_loss(outputs, permutation, self.config, contrast=contrast)
        return loss + self.dual_weight * dual, metrics | dual_metrics


def _train_heads(model: VideoModel, names: Collection[str]) -> None:
    """Let only the dual heads that the losses reach ask for a gradient: processes wait for each that is asked for."""
    for name in ("clip_head", "series_head"):
        head: nn.Module | None = getattr(model, name)
        if head is not None:
            head.requires_grad_(name in names)


def label_loss(model: VideoModel, feature: Tensor, truth: Tensor) -> LossAndMetrics:
    """Return the cross-entropy of features (N, F) against classes (N,), and the share that is right."""
    assert model.classifier is not None
    logits = model.classifier(feature)
    loss = F.cross_entropy(logits, truth)
    correct = (logits.detach().argmax(dim=-1) == truth).float().mean()
    return loss, {"loss_label": loss.detach(), "train_accuracy": correct}
