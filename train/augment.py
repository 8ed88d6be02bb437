"""Random changes to clips, on whole batches and on their device; every frame of a clip is changed alike.

Clips are (N, T, H, W, 3) RGB in 0..255. The random crop is taken earlier, in ``train.data``, so that only its
pixels are ever copied.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from train.config import AugmentConfig

_RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
"""Luma and the two chroma axes of NTSC; a turn of the chroma plane is a turn of the hue."""


def augment(
    video: Tensor, config: AugmentConfig, *, rng: np.random.Generator, plain: np.ndarray | None = None
) -> Tensor:
    """Apply colour jitter, blur and mirroring, each to the clips that chance picks.

    Args:
        video: uint8 (N, T, H, W, 3).
        config: Probabilities and strengths.
        rng: Source of all randomness.
        plain: bool (N,), True for clips that stay as they are; None: no such clips.

    Returns:
        float32, same shape, values in 0..255.
    """
    count = len(video)
    free = np.ones(count, dtype=bool) if plain is None else ~plain
    jitter = free & (rng.random(count) < config.jitter_probability)
    blur = free & (rng.random(count) < config.blur_probability)
    flip = free & (rng.random(count) < config.flip_probability)

    def factors(strength: float) -> Tensor:
        drawn = rng.uniform(max(0.0, 1.0 - strength), 1.0 + strength, count)
        return torch.from_numpy(np.where(jitter, drawn, 1.0)).to(video.device, torch.float32)

    hue = np.where(jitter, rng.uniform(-config.hue, config.hue, count), 0.0)
    out = color_jitter(
        video.float(),
        brightness=factors(config.brightness),
        contrast=factors(config.contrast),
        saturation=factors(config.saturation),
        hue=torch.from_numpy(hue).to(video.device, torch.float32),
    )
    sigma = rng.uniform(*config.blur_sigma, count)
    if blur.any():
        rows = torch.from_numpy(np.flatnonzero(blur)).to(video.device)
        out[rows] = gaussian_blur(out[rows], torch.from_numpy(sigma[blur]).to(video.device, torch.float32))
    if flip.any():
        rows = torch.from_numpy(np.flatnonzero(flip)).to(video.device)
        out[rows] = out[rows].flip(3)
    return out


def color_jitter(
    video: Tensor, *, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor
) -> Tensor:
    """Change the colours of every clip by one affine map.

    Brightness scales, contrast scales about the clip's mean grey, saturation scales the chroma plane and hue
    turns it. Values are clamped once, at the end; without clamping in between, the four commute, so their
    order does not matter and all pixels need only one matrix product.

    Args:
        video: float (N, T, H, W, 3) in 0..255.
        brightness: (N,) factor; 1 changes nothing, as for the next two.
        contrast: (N,) factor.
        saturation: (N,) factor.
        hue: (N,) turn in full turns; 0 changes nothing.

    Returns:
        float, same shape, clamped to 0..255.
    """
    to_yiq = torch.tensor(_RGB_TO_YIQ, dtype=torch.float64, device=video.device)
    cosine, sine = (2 * math.pi * hue).cos().double(), (2 * math.pi * hue).sin().double()
    change = torch.zeros(len(video), 3, 3, dtype=torch.float64, device=video.device)
    change[:, 0, 0] = 1.0
    change[:, 1, 1] = change[:, 2, 2] = saturation * cosine
    change[:, 1, 2] = -saturation * sine
    change[:, 2, 1] = saturation * sine
    matrix = (brightness * contrast)[:, None, None] * (to_yiq.inverse() @ change @ to_yiq)
    pixels = video.flatten(1, 3)  # (N, T*H*W, 3)
    mean_grey = pixels.mean(dim=1) @ to_yiq[0].float()  # (N,)
    offset = (1.0 - contrast) * brightness * mean_grey
    out = torch.baddbmm(offset[:, None, None], pixels, matrix.mT.to(video.dtype))
    return out.clamp_(0.0, 255.0).view(video.shape)


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
