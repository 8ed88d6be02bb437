"""``--dry-run``: what a recipe would need on this machine, from a few videos and a few clips, without training."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ivdr_deploy._console import print_text, say_left_out
from ivdr_deploy.datasets.entries import any_unread, some
from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.decoding import DecodePool
from ivdr_deploy.errors import DataError, VideoError
from ivdr_deploy.models.network import VideoModel, build_model
from ivdr_deploy.video import PathSource, VideoLimits
from train.config import FinetuneConfig, PretrainConfig, RunConfig
from train.data import steps_per_epoch
from train.facts import DecodeCost, decode_cost
from train.finetune import classes_of
from train.init import transfer
from train.run import decode_options

_SAMPLE = 6
"""Videos that are decoded, evenly over the list."""

_PROBED_CLIPS = 2
"""Clips that the network is tried with; batch norm needs company."""

_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a run would need."""

    videos: int
    missing: tuple[str, ...]
    """Videos of the training list whose files are not there."""

    others: dict[str, tuple[int, tuple[str, ...]]]
    """Videos of the test and the validation list, and those of them that are missing."""

    classes: int
    steps: int
    epochs: int
    videos_per_step: int
    clips_per_step: int
    """Clips that a step encodes, forward and backward."""

    bad: tuple[str, ...]
    """Videos of the sample that cannot be used, with the reason."""

    unread: bool
    """Whether a folder of a list could not be read: there may be more videos."""

    cache_bytes: int
    """Of the decoded frames of the training list; 0 where no video of the sample can be used."""

    cache_gib: float
    """That it may take."""

    decode_seconds: float
    """To fill the cache, with the decode workers of the settings."""

    device: str
    """What the clips were tried on."""

    clip_seconds: float
    """Forward and backward of one clip there."""

    activation_bytes: int
    """That a step keeps for its backward pass."""

    state_bytes: int
    """Of weights, gradients and the state of the optimiser; with ``moco`` of the copy of the network too."""

    features: int = 0
    """Clips of all lists whose features a linear probe computes, once each; 0 where training goes by steps. A clip then
    costs a forward pass only, and nothing is said of steps and decoded frames: there are none."""

    against: str = ""
    """Settings of another way to train that is tried as well."""

    @property
    def step_seconds(self) -> float:
        """Expected of a step, its clips in one process."""
        return self.clip_seconds * self.clips_per_step

    @property
    def clips_per_second(self) -> float:
        """Clips that a loader must give so that the network never waits."""
        return 1.0 / self.clip_seconds

    def lines(self) -> list[str]:
        """Say it for people."""
        names = f": {some(self.missing)}" if self.missing else ""
        out = [
            f"training list: {self.videos} videos, {len(self.missing)} missing{names}; {self.classes} classes",
            *(
                f"{name} list: {count} videos, {len(missing)} missing"
                + (f": {some(missing)}" if missing else "")
                for name, (count, missing) in self.others.items()
            ),
            *(f"cannot be used: {one}" for one in self.bad),
            *(self._of_features() if self.features else self._of_steps()),
        ]
        if self.against:
            out.append(f"what {self.against} needs, which is tried as well, is not among this")
        return out

    def _of_features(self) -> list[str]:
        return [
            f"linear probe: the features of {self.features} clips are computed, once each, and kept",
            f"on {self.device}, with torch: {self.clips_per_second:.3g} clips a second, all of them "
            f"{_hours(self.clip_seconds * self.features)}; decoding not counted",
        ]

    def _of_cache(self) -> str:
        if not self.cache_bytes:
            return "cache: unknown, since no video of the sample can be used"
        said = f"cache: {self.cache_bytes / _GIB:.3g} GiB, filled in {_hours(self.decode_seconds)}"
        if self.cache_bytes > self.cache_gib * _GIB:
            said += (
                f"; data.cache_gib is {self.cache_gib:g}: what does not fit is decoded again in every step"
            )
        return said

    def _of_steps(self) -> list[str]:
        return [
            f"{self.epochs} epochs, {self.steps} steps of {self.videos_per_step} videos, "
            f"{self.clips_per_step} clips encoded in a step",
            self._of_cache(),
            f"memory of a step: {self.activation_bytes / _GIB:.3g} GiB kept for the backward pass, "
            f"{self.state_bytes / _GIB:.3g} GiB weights and optimiser; without autocast",
            f"on {self.device}: {self.clips_per_second:.3g} clips a second are needed to keep it busy; a step takes "
            f"{self.step_seconds:.3g} s, all steps {_hours(self.step_seconds * self.steps)}",
        ]


def dry_run(config: RunConfig) -> Needs:
    """Read the lists, decode a few videos, and try the network on a few clips.

    Time is measured on the device of the settings; where that is not there, on the CPU, and said so.

    Raises:
        DataError: if a list is unusable, or none of its files is there.
        ConfigError: if the settings do not fit together.
        CheckpointError: if ``init`` does not fit.
    """
    videos = read_video_list(config.data.train, root=config.data.root or None, part="train")
    say_left_out(videos.left_out)
    others = _other_lists(config, videos)
    present = [item for item in videos.items if os.path.isfile(item.path)]
    if not present:
        raise DataError(
            f"{videos.source}: none of its {len(videos.items)} videos is there; "
            f"the first would be {videos.items[0].path}",
            hint="set data.root to the folder where the paths of the list start",
        )
    costs, bad = _sample(config, [present[row].path for row in _evenly(len(present))])
    probe = isinstance(config, FinetuneConfig) and config.linear_probe
    device, seconds, activation, state = _try_network(config, videos, forward_only=probe)
    per_video = config.dual.clips_per_video if _is_dual(config) else 1
    in_step = min(config.optim.batch_size, len(present))
    mean = [
        sum(values) / max(1, len(costs))
        for values in ([c.seconds for c in costs], [c.cache_bytes for c in costs])
    ]
    return Needs(
        videos=len(videos.items),
        missing=_missing(videos),
        others={name: (len(one.items), _missing(one)) for name, one in others.items()},
        classes=len(videos.labels),
        steps=steps_per_epoch(len(present), batch_size=config.optim.batch_size) * config.optim.epochs,
        epochs=config.optim.epochs,
        videos_per_step=in_step,
        clips_per_step=in_step * per_video,
        bad=tuple(bad),
        unread=any(any_unread(one.left_out) for one in (videos, *others.values())),
        cache_bytes=int(mean[1] * len(present)),
        cache_gib=config.data.cache_gib,
        decode_seconds=mean[0] * len(present) / config.data.decode_workers,
        device=device,
        clip_seconds=seconds,
        activation_bytes=activation * in_step * per_video,
        state_bytes=state,
        features=probe
        * config.view_plan.max_views
        * sum(len(one.items) for one in (videos, *others.values())),
        against=config.against if isinstance(config, FinetuneConfig) else "",
    )


def say_needs(needs: Needs) -> None:
    """Print what a run would need."""
    for line in needs.lines():
        print_text(line)  # names may hold line ends


def _is_dual(config: RunConfig) -> bool:
    return isinstance(config, PretrainConfig) or (
        isinstance(config, FinetuneConfig) and config.dual_weight > 0
    )


def _other_lists(config: RunConfig, videos: VideoList) -> dict[str, VideoList]:
    """Read the lists that are measured on, and see that their classes are those of training."""
    if isinstance(config, FinetuneConfig):
        classes_of(videos)
    found = {}
    for name, source in (("test", config.data.test), ("validation", config.data.validation)):
        if source:
            found[name] = read_video_list(source, root=config.data.root or None, part="test")
            say_left_out(found[name].left_out)
            found[name].targets(videos.labels)
    return found


def _missing(videos: VideoList) -> tuple[str, ...]:
    return tuple(item.uri for item in videos.items if not os.path.isfile(item.path))


def _evenly(count: int) -> list[int]:
    return sorted({int(place) for place in np.linspace(0, count - 1, min(_SAMPLE, count))})


def _sample(config: RunConfig, paths: list[Path]) -> tuple[list[DecodeCost], list[str]]:
    """Decode some videos; return what they cost, and which cannot be used."""
    limits = VideoLimits.allowing(config.data.allow_containers)
    costs: list[DecodeCost] = []
    bad: list[str] = []
    with DecodePool(decode_options(config)) as pool:
        form = config.data.cache_form
        for one in pool.each(
            decode_cost, ((PathSource(path), config.clip, form) for path in paths), limits=limits
        ):
            if isinstance(one, VideoError):
                bad.append(str(one))
            else:
                costs.append(one)
    return costs, bad


def _try_network(config: RunConfig, videos: VideoList, *, forward_only: bool) -> tuple[str, float, int, int]:
    """Run two clips forward and backward, or only forward, as for features.

    Returns:
        The device for people, seconds of one clip, bytes that one clip keeps for the backward pass, and bytes of
        weights, gradients and optimiser.
    """
    model = _network(config, videos)
    there = config.device == "cpu" or torch.cuda.is_available()
    device = torch.device(config.device if there else "cpu")
    model = model.to(device).train()
    clips = torch.randint(0, 256, (_PROBED_CLIPS, *config.clip.clip_shape), dtype=torch.uint8, device=device)
    said = config.device if there else f"the CPU (there is no {config.device} here)"
    if forward_only:
        model.eval().requires_grad_(False)
        _timed(lambda: model(clips), device)
        return said, min(_timed(lambda: model(clips), device) for _ in range(2)) / _PROBED_CLIPS, 0, 0
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    def once() -> None:
        total = torch.stack([value.square().mean() for value in model(clips).values()]).sum()
        torch.autograd.backward([total])

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        once()
    seconds = min(_timed(once, device) for _ in range(2)) / _PROBED_CLIPS
    weights = sum(value.numel() * value.element_size() for value in model.parameters() if value.requires_grad)
    of_weights = sum(kept.get(value.untyped_storage().data_ptr(), 0) for value in model.parameters())
    copies = 4 if config.optim.name == "adamw" else 3
    copies += isinstance(config, PretrainConfig) and config.dual.form == "moco"
    return said, seconds, (sum(kept.values()) - of_weights) // _PROBED_CLIPS, copies * weights


def _network(config: RunConfig, videos: VideoList) -> VideoModel:
    if not isinstance(config, FinetuneConfig):
        return build_model(config.model, config.clip)
    spec = replace(config.model, num_classes=len(videos.labels))
    if config.init and Path(config.init).exists():
        return transfer(Path(config.init), spec, config.clip, labels=videos.labels)[0]
    if config.init:
        print_text(f"init is not there yet: {config.init}", style="yellow")
    return build_model(spec, config.clip)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
