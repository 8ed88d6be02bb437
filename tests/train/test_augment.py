"""Augmentation: each change does what it says, alike in all frames of a clip."""

import colorsys

import numpy as np
import pytest
import torch
from torch import Tensor

from train.augment import Changes, apply_changes, color_change, draw_changes, gaussian_blur
from train.config import AugmentConfig

OFF = AugmentConfig(jitter_probability=0.0)


def clips(count: int = 3, *, low: int = 0, high: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, high, (count, 4, 10, 12, 3), dtype=torch.uint8, generator=generator)


def jitter(video: Tensor, **changes: float) -> Tensor:
    values = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0} | changes
    color, grey = color_change(**{name: np.full(len(video), value) for name, value in values.items()})
    changes = Changes(torch.from_numpy(color).float(), torch.from_numpy(grey).float(), None, None)
    return apply_changes(video, changes)


def augment(
    video: Tensor, config: AugmentConfig, *, rng: np.random.Generator, plain: np.ndarray | None = None
) -> Tensor:
    return apply_changes(video, draw_changes(config, len(video), rng=rng, plain=plain))


def grey(video: Tensor) -> Tensor:
    return video @ torch.tensor([0.299, 0.587, 0.114])


def test_nothing_switched_on_changes_nothing() -> None:
    video = clips()
    out = augment(video, OFF, rng=np.random.default_rng(0))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, video.float(), atol=1e-3, rtol=0)


def test_brightness_scales_and_is_clamped_to_the_range() -> None:
    video = clips()
    torch.testing.assert_close(jitter(video, brightness=0.5), video * 0.5, atol=1e-3, rtol=0)
    torch.testing.assert_close(jitter(video, brightness=1.8), (video * 1.8).clamp(0, 255), atol=1e-3, rtol=0)


def test_contrast_scales_about_the_clips_mean_grey() -> None:
    video = clips(low=100, high=150).float()
    out = jitter(video, contrast=0.3)
    mean = grey(video).mean(dim=(1, 2, 3))
    torch.testing.assert_close(out, mean.reshape(-1, 1, 1, 1, 1) * 0.7 + video * 0.3, atol=1e-2, rtol=0)


def test_saturation_zero_is_grey_and_keeps_the_luma() -> None:
    video = clips().float()
    out = jitter(video, saturation=0.0)
    torch.testing.assert_close(out, grey(video)[..., None].expand_as(out), atol=2e-2, rtol=0)


def test_hue_turns_colours_keeps_luma_and_comes_back_after_a_full_turn() -> None:
    video = clips(low=100, high=150).float()
    out = jitter(video, hue=0.2)
    torch.testing.assert_close(grey(out), grey(video), atol=2e-2, rtol=0)
    torch.testing.assert_close(jitter(video, hue=1.0), video, atol=1e-2, rtol=0)
    red = torch.tensor([140.0, 110.0, 110.0]).expand(1, 1, 1, 1, 3)
    turned = [
        colorsys.rgb_to_hsv(*(jitter(red, hue=turn).flatten() / 255).tolist())[0] for turn in (-0.1, 0.1)
    ]
    assert {round(hue * 10) % 10 for hue in turned} == {1, 9}  # a tenth of a turn either way, within rounding


def test_changes_together_are_those_one_after_the_other_in_any_order() -> None:
    video = clips(low=100, high=150).float()
    given = {"brightness": 1.2, "contrast": 0.7, "saturation": 0.6, "hue": 0.1}
    for order in (list(given), list(given)[::-1]):
        out = video
        for name in order:
            out = jitter(out, **{name: given[name]})
        torch.testing.assert_close(out, jitter(video, **given), atol=1e-2, rtol=0)


def drawn_factors(**strengths: float) -> dict[str, np.ndarray]:
    """What 2000 clips are changed by, read off their colour matrices; what has no strength given changes nothing."""
    still = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    config = AugmentConfig(jitter_probability=1.0, **(still | strengths))  # type: ignore[arg-type]
    changes = draw_changes(config, 2000, rng=np.random.default_rng(0))
    color, offset = changes.color.double().numpy(), changes.grey.double().numpy()
    to_yiq = np.array(
        [[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]]
    )
    yiq = to_yiq @ color @ np.linalg.inv(to_yiq)
    scale = yiq[:, 0, 0]  # brightness * contrast
    brightness = scale + offset.sum(axis=1)  # the offset is (1 - contrast) * brightness of the mean grey
    chroma = np.hypot(yiq[:, 1, 1], yiq[:, 2, 1])
    return {
        "brightness": brightness,
        "contrast": scale / brightness,
        "saturation": chroma / scale,
        "hue": np.arctan2(yiq[:, 2, 1], yiq[:, 1, 1]) / (2 * np.pi),
    }


@pytest.mark.parametrize(
    ("name", "strength", "low", "high"),
    [
        ("brightness", 0.4, 0.6, 1.4),
        ("contrast", 0.3, 0.7, 1.3),
        ("saturation", 0.5, 0.5, 1.5),
        ("saturation", 1.5, 0.0, 2.5),  # never below 0
        ("hue", 0.2, -0.2, 0.2),
    ],
)
def test_each_strength_is_that_of_its_own_change_both_ways(
    name: str, strength: float, low: float, high: float
) -> None:
    for found, factors in drawn_factors(**{name: strength}).items():
        if found == name:
            near = 0.02 * (high - low)
            assert low - 1e-6 <= factors.min() < low + near
            assert high - near < factors.max() <= high + 1e-6
            assert factors.mean() == pytest.approx((low + high) / 2, abs=near)
        else:
            assert np.abs(factors - (found != "hue")).max() < 1e-5, found


def test_the_changes_of_a_clip_say_nothing_about_each_other() -> None:
    factors = drawn_factors(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    assert np.abs(np.corrcoef(list(factors.values())) - np.eye(4)).max() < 0.1


def test_blur_is_drawn_between_its_bounds() -> None:
    config = AugmentConfig(blur_probability=1.0, blur_sigma=(0.5, 1.5))
    sigma = draw_changes(config, 2000, rng=np.random.default_rng(0)).blur_sigma
    assert sigma is not None
    assert 0.5 <= float(sigma.min()) < 0.52
    assert 1.48 < float(sigma.max()) <= 1.5
    assert float(sigma.mean()) == pytest.approx(1.0, abs=0.02)


def test_every_frame_of_a_clip_changes_alike_and_clips_differ() -> None:
    video = clips(1).repeat(8, 1, 1, 1, 1)
    video[:, 1:] = video[:, :1]  # all frames of all clips are the same picture
    config = AugmentConfig(jitter_probability=1.0, blur_probability=0.5)
    out = augment(video, config, rng=np.random.default_rng(1))
    torch.testing.assert_close(out, out[:, :1].expand_as(out), atol=1e-3, rtol=0)
    assert len({round(float(clip.sum()), 1) for clip in out}) == 8


def test_blur_keeps_constant_pictures_and_spreads_a_point_like_a_gaussian() -> None:
    flat = torch.full((1, 1, 20, 24, 3), 77.0)
    torch.testing.assert_close(gaussian_blur(flat, torch.tensor([1.5])), flat)
    point = torch.zeros(1, 1, 21, 25, 3)
    point[0, 0, 10, 12] = 100.0
    out = gaussian_blur(point, torch.tensor([1.5]))[0, 0, :, :, 0]
    assert float(out.sum()) == pytest.approx(100.0, rel=1e-4)
    assert float(out[10, 14] / out[10, 12]) == pytest.approx(np.exp(-(2**2) / (2 * 1.5**2)), rel=1e-4)
    assert float(out[13, 12] / out[10, 12]) == pytest.approx(np.exp(-(3**2) / (2 * 1.5**2)), rel=1e-4)


def test_each_clip_has_its_own_blur() -> None:
    point = torch.zeros(2, 1, 15, 15, 3)
    point[:, 0, 7, 7] = 100.0
    out = gaussian_blur(point, torch.tensor([0.5, 2.0]))
    assert out[0, 0, 7, 7, 0] > 3 * out[1, 0, 7, 7, 0]


def test_flip_mirrors_left_and_right_of_about_the_asked_share() -> None:
    video = clips(200)
    out = augment(
        video, AugmentConfig(jitter_probability=0.0, flip_probability=0.3), rng=np.random.default_rng(0)
    )
    mirrored = [bool((o - v.flip(2)).abs().max() < 0.1) for o, v in zip(out, video.float(), strict=True)]
    kept = [bool((o - v).abs().max() < 0.1) for o, v in zip(out, video.float(), strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert 40 <= sum(mirrored) <= 80


def test_plain_clips_stay_as_they_are() -> None:
    config = AugmentConfig(jitter_probability=1.0, blur_probability=1.0, flip_probability=1.0)
    plain = np.array([True, False, True])
    video = clips()
    out = augment(video, config, rng=np.random.default_rng(0), plain=plain)
    changed = [(o - v).abs().max() > 1 for o, v in zip(out, video.float(), strict=True)]
    assert changed == [False, True, False]


def test_what_the_settings_never_do_is_not_computed_and_the_rest_has_fixed_shapes() -> None:
    never = draw_changes(OFF, 5, rng=np.random.default_rng(0))
    assert (never.blur_sigma, never.flip) == (None, None)
    config = AugmentConfig(blur_probability=0.5, flip_probability=0.5)
    drawn = draw_changes(config, 40, rng=np.random.default_rng(0))
    assert [tuple(part.shape) for part in drawn if part is not None] == [(40, 3, 3), (40, 3), (40,), (40,)]
    assert drawn.blur_sigma is not None
    assert 8 <= int((drawn.blur_sigma == 0).sum()) <= 32


def test_clips_that_chance_leaves_sharp_keep_every_pixel() -> None:
    config = AugmentConfig(jitter_probability=0.0, blur_probability=0.5, blur_sigma=(1.0, 2.0))
    video = clips(20)
    changes = draw_changes(config, 20, rng=np.random.default_rng(0))
    assert changes.blur_sigma is not None
    difference = (apply_changes(video, changes) - video.float()).abs().amax(dim=(1, 2, 3, 4))
    assert torch.equal(difference < 0.1, changes.blur_sigma == 0.0)


def test_every_clip_throws_its_own_dice_for_every_change() -> None:
    config = AugmentConfig(jitter_probability=0.2, blur_probability=0.5, flip_probability=0.8)
    drawn = draw_changes(config, 400, rng=np.random.default_rng(0))
    assert drawn.blur_sigma is not None
    assert drawn.flip is not None
    jittered = (drawn.color - torch.eye(3)).abs().amax(dim=(1, 2)) > 1e-4
    for chosen, count in ((jittered, 80), (drawn.blur_sigma > 0, 200), (drawn.flip, 320)):
        assert abs(int(chosen.sum()) - count) < 40
    together = int((jittered & (drawn.blur_sigma > 0)).sum())
    assert abs(together - 40) < 20  # one says nothing about the other


def test_same_generator_state_gives_the_same_pixels() -> None:
    config = AugmentConfig(blur_probability=0.5, flip_probability=0.5)
    one, two = (augment(clips(), config, rng=np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(one, two)


def test_values_stay_in_range() -> None:
    out = augment(clips(32), AugmentConfig(blur_probability=0.5), rng=np.random.default_rng(0))
    assert out.min() >= 0
    assert out.max() <= 255
