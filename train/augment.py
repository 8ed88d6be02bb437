"""Random changes to clips: drawn on the host, applied to whole batches on their device.

Clips are (N, T, H, W, 3) RGB in 0..255, and every frame of a clip is changed alike. The random crop is taken earlier,
in ``train.data``, so that only its pixels are ever copied.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.config import AugmentConfig

_RGB_TO_YIQ = np.array(
    ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
)
"""Luma and the two chroma axes of NTSC; a turn of the chroma plane is a turn of the hue."""


class Changes(NamedTuple):
    """What is done to each of N clips. Shapes do not depend on what chance picks."""

    color: Tensor
    """float32 (N, 3, 3): ``color[n] @ rgb`` are the changed colours of a pixel of clip n."""

    grey: Tensor
    """float32 (N, 3): the dot product with the clip's mean colour is added to every channel."""

    blur_sigma: Tensor | None
    """float32 (N,): standard deviation in pixels, 0 for no blur. None: the settings never blur."""

    flip: Tensor | None
    """bool (N,): whether left and right are exchanged. None: the settings never do."""

    def to(self, device: torch.device) -> Changes:
        """Return the same changes on another device."""
        blur, flip = (
            None if part is None else part.to(device, non_blocking=True)
            for part in (self.blur_sigma, self.flip)
        )
        color, grey = (part.to(device, non_blocking=True) for part in (self.color, self.grey))
        return Changes(color, grey, blur, flip)

    def take(self, clips: np.ndarray) -> Changes:
        """Return what is done to some of the clips, int64 (n,)."""
        chosen = torch.from_numpy(clips)
        blur, flip = (None if part is None else part[chosen] for part in (self.blur_sigma, self.flip))
        return Changes(self.color[chosen], self.grey[chosen], blur, flip)


def draw_changes(
    config: AugmentConfig, count: int, *, rng: np.random.Generator, plain: np.ndarray | None = None
) -> Changes:
    """Draw what happens to each clip of a batch.

    Args:
        config: Probabilities and strengths.
        count: Clips (N).
        rng: Source of all randomness.
        plain: bool (N,), True for clips that stay as they are; None: no such clips.

    Returns:
        Tensors on the CPU.
    """
    free = np.ones(count, dtype=bool) if plain is None else ~plain
    jitter = free & (rng.random(count) < config.jitter_probability)
    blur = free & (rng.random(count) < config.blur_probability)
    flip = free & (rng.random(count) < config.flip_probability)

    def factors(strength: float) -> np.ndarray:
        drawn = rng.uniform(max(0.0, 1.0 - strength), 1.0 + strength, count)
        return np.where(jitter, drawn, 1.0)

    hue = np.where(jitter, rng.uniform(-config.hue, config.hue, count), 0.0)
    color, grey = color_change(
        brightness=factors(config.brightness),
        contrast=factors(config.contrast),
        saturation=factors(config.saturation),
        hue=hue,
    )
    sigma = np.where(blur, rng.uniform(*config.blur_sigma, count), 0.0)
    return Changes(
        color=torch.from_numpy(color.astype(np.float32)),
        grey=torch.from_numpy(grey.astype(np.float32)),
        blur_sigma=torch.from_numpy(sigma.astype(np.float32)) if config.blur_probability else None,
        flip=torch.from_numpy(flip) if config.flip_probability else None,
    )


def color_change(
    *, brightness: np.ndarray, contrast: np.ndarray, saturation: np.ndarray, hue: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Put a change of colours into one affine map per clip.

    Brightness scales, contrast scales about the clip's mean grey, saturation scales the chroma plane and hue turns it.
    Without clamping in between the four commute, so their order does not matter and all pixels need one matrix product.

    Args:
        brightness: (N,) factor; 1 changes nothing, as for the next two.
        contrast: (N,) factor.
        saturation: (N,) factor.
        hue: (N,) turn in full turns; 0 changes nothing.

    Returns:
        ``color`` (N, 3, 3) and ``grey`` (N, 3) of ``Changes``, float64.
    """
    cosine, sine = np.cos(2 * np.pi * hue), np.sin(2 * np.pi * hue)
    change = np.zeros((len(hue), 3, 3))
    change[:, 0, 0] = 1.0
    change[:, 1, 1] = change[:, 2, 2] = saturation * cosine
    change[:, 1, 2] = -saturation * sine
    change[:, 2, 1] = saturation * sine
    scale = (brightness * contrast)[:, None, None]
    color = scale * (np.linalg.inv(_RGB_TO_YIQ) @ change @ _RGB_TO_YIQ)
    grey = ((1.0 - contrast) * brightness)[:, None] * _RGB_TO_YIQ[0]
    return color, grey


def apply_changes(video: Tensor, changes: Changes) -> Tensor:
    """Mirror the clips of a batch, change their colours and blur them.

    Args:
        video: uint8 (N, T, H, W, 3).
        changes: For N clips, on the same device.

    Returns:
        float32, same shape, values in 0..255.
    """
    if changes.flip is not None:  # first, while pixels are bytes: neither colours nor blur depend on the side
        video = torch.where(changes.flip[:, None, None, None, None], video.flip(3), video)
    pixels = video.float().flatten(1, 3)  # (N, T*H*W, 3)
    offset = (pixels.mean(dim=1) * changes.grey).sum(dim=-1)  # (N,)
    out = torch.baddbmm(offset[:, None, None], pixels, changes.color.mT).clamp_(0.0, 255.0).view(video.shape)
    if changes.blur_sigma is not None:
        chosen = changes.blur_sigma > 0.0
        blurred = gaussian_blur(out, changes.blur_sigma.where(chosen, 1.0))
        out = torch.where(chosen[:, None, None, None, None], blurred, out)
    return out


def gaussian_blur(video: Tensor, sigma: Tensor) -> Tensor:
    """Blur every frame of every clip; at the border the kernel is cut and renormalised.

    Args:
        video: float (N, T, H, W, 3).
        sigma: (N,) standard deviation in pixels, above 0.

    Returns:
        Same shape.
    """
    rows = _blur_matrix(video.shape[2], sigma) @ video.flatten(3)  # (N, T, H, W*3)
    columns = rows.view(video.shape).transpose(2, 3).flatten(3)  # (N, T, W, H*3)
    blurred = _blur_matrix(video.shape[3], sigma) @ columns
    return blurred.view(*columns.shape[:3], video.shape[2], 3).transpose(2, 3)


def _blur_matrix(size: int, sigma: Tensor) -> Tensor:
    """(N, 1, size, size): row i holds the weights of all pixels in blurred pixel i."""
    places = torch.arange(size, dtype=sigma.dtype, device=sigma.device)
    exponent = -0.5 * ((places[:, None] - places) / sigma[:, None, None]) ** 2
    return torch.softmax(exponent, dim=-1).unsqueeze(1)
