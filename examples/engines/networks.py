"""Networks to measure engines on: random weights, with batch norms and a classifier that were set on real clips.

A network as it is initialised would do neither: its batch norms let values grow or vanish from layer to layer, as no
trained one does, and the classifier's answers are all near ties, so that every engine flips some.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ivdr_deploy.artifacts.checkpoint import save_checkpoint
from ivdr_deploy.datasets.lists import VideoList
from ivdr_deploy.models.network import VideoModel, build_model
from ivdr_deploy.spec import CheckpointInfo, ClipSpec, ModelSpec, Provenance, TrainingState, ViewPlan
from ivdr_deploy.video.clips import load_clips

CLIPS = 48
"""That batch norms and classifier are set on, one each of videos that lie evenly over the list."""

PLAN = ViewPlan(num_clips=1)
_GOLDEN = 4
_CALL = 8
_RIDGE = 0.1
_SHARPNESS = 10.0
"""What the answers of the regression, which are between 0 and 1, are multiplied by, to be logits of some confidence."""

HOW = (
    "Weights are random unless the table says trained. Of random ones the batch norms have the statistics of real"
    " clips, and the classifier is fitted to the features of"
    f" the same clips (ridge regression, at most {CLIPS} clips, one a video), so that answers are not ties. Agreement"
    " is the share of the test videos with torch's label, one clip each; ties count as differing."
)


def write_network(path: Path, backbone: str, videos: VideoList, clip: ClipSpec, *, seed: int = 0) -> Path:
    """Write a checkpoint; the same arguments give the same network.

    Args:
        path: Ends in ``.safetensors``.
        backbone: Its name.
        videos: A list with labels.
        clip: The contract.
        seed: Of the weights.
    """
    items = [videos.items[place] for place in _evenly(len(videos.items), CLIPS)]
    clips = np.stack([load_clips(item.path, clip, PLAN).video[0] for item in items])
    labels = videos.labels
    spec = ModelSpec(backbone=backbone, num_classes=len(labels))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(spec, clip)
    set_batch_norms(model, clips)
    targets = [labels.index(str(item.label)) for item in items]
    fit_classifier(model, clips, targets)
    heads = ("clip_head", "series_head", "classifier")
    info = CheckpointInfo(
        clip=clip,
        view_plan=PLAN,
        model=spec,
        labels=labels,
        training=TrainingState(backbone_step=0, head_steps=dict.fromkeys(heads, 0)),
        provenance=Provenance(seed=seed, data_hash=videos.data_hash, origin={"weights": HOW}),
    )
    save_checkpoint(path, model=model, info=info, golden=clips[:_GOLDEN])
    return path


def set_batch_norms(model: VideoModel, clips: np.ndarray) -> None:
    """Give every batch norm the mean statistics of some clips, uint8 (N, T, H, W, 3), and leave the eval mode on."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all calls
    model.train()
    with torch.no_grad():
        for call in _calls(clips):
            model.encode(call)
    model.eval()


def fit_classifier(model: VideoModel, clips: np.ndarray, targets: Sequence[int]) -> None:
    """Fit the linear classifier to the features of some clips, by ridge regression onto the classes."""
    assert model.classifier is not None
    with torch.inference_mode():
        features = torch.cat([model.encode(call) for call in _calls(clips)]).double().numpy()
    mean, scale = features.mean(axis=0), features.std()
    # One scale for all: a channel that hardly moves must not count as much as others.
    inputs = (features - mean) / scale
    linear = model.classifier.linear
    wanted = np.eye(linear.out_features)[np.asarray(targets)]
    gram = inputs @ inputs.T + _RIDGE * inputs.shape[1] * np.eye(len(inputs))
    weight = _SHARPNESS * (inputs.T @ np.linalg.solve(gram, wanted - wanted.mean(axis=0))).T / scale
    bias = -weight @ mean  # logits are centred, as training leaves them: softmax does not see what all share
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight))
        linear.bias.copy_(torch.from_numpy(bias))


def _evenly(held: int, wanted: int) -> list[int]:
    return [int(place) for place in np.unique(np.linspace(0, held - 1, min(held, wanted)).astype(int))]


def _calls(clips: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(clips[start : start + _CALL]) for start in range(0, len(clips), _CALL)]
