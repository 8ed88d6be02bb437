"""Shapes, unit length and slot layout of the heads."""

import torch

from ivdr_deploy.models.heads import ClassifierHead, ClipHead, SeriesHead, fold_norm


def test_paper_heads_have_328320_parameters_each() -> None:
    for head in (ClipHead(512, clip_dim=128), SeriesHead(512, num_slots=2, slot_dim=64)):
        assert sum(parameter.numel() for parameter in head.parameters()) == 328_320


def test_every_slot_is_a_unit_vector_and_not_the_concatenation() -> None:
    slots = SeriesHead(16, num_slots=3, slot_dim=8)(torch.randn(4, 16))
    assert slots.shape == (4, 3, 8)
    torch.testing.assert_close(slots.norm(dim=-1), torch.ones(4, 3))


def test_slot_s_is_output_channels_of_its_own_block() -> None:
    head = SeriesHead(16, num_slots=3, slot_dim=8)
    feature = torch.randn(2, 16)
    before = head(feature)
    with torch.no_grad():
        head.projection[2].bias[8:16] += 1.0  # the channels of slot 1
    after = head(feature)
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert not torch.allclose(before[:, 1], after[:, 1])


def test_unit_length_survives_half_precision() -> None:
    head = ClipHead(16, clip_dim=8).half()
    embedding = head(torch.randn(4, 16).half() * 1e-3)
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(4))


def test_classifier_starts_near_zero_with_no_bias() -> None:
    torch.manual_seed(0)
    head = ClassifierHead(512, num_classes=10, dropout=0.0)
    assert not head.linear.bias.any()
    assert 0.008 < head.linear.weight.std() < 0.012


def test_dropout_acts_in_training_mode_only() -> None:
    head = ClassifierHead(64, num_classes=4, dropout=0.9)
    feature = torch.ones(1, 64)
    assert torch.equal(head.eval()(feature), head(feature))
    assert not torch.equal(head.train()(feature), head.eval()(feature))


def heads_with_a_norm() -> list[ClipHead | SeriesHead]:
    torch.manual_seed(0)
    return [ClipHead(16, clip_dim=8, norm=True), SeriesHead(16, num_slots=2, slot_dim=8, norm=True)]


def test_a_norm_in_front_takes_away_what_all_clips_share_and_has_no_weights() -> None:
    feature = torch.randn(64, 16)
    for head in heads_with_a_norm():
        assert all(name.startswith("projection.") for name, _ in head.named_parameters())
        torch.testing.assert_close(head(feature + 100.0), head(feature), atol=1e-3, rtol=0)


def test_a_folded_norm_gives_what_it_gave_in_eval_mode() -> None:
    for head in heads_with_a_norm():
        for _ in range(20):
            head(3.0 * torch.randn(8, 16) + torch.arange(16.0))  # moves the statistics
        head.eval()
        feature = 3.0 * torch.randn(4, 16) + torch.arange(16.0)
        before = head(feature)
        fold_norm(head)
        assert isinstance(head.norm, torch.nn.Identity)
        torch.testing.assert_close(head(feature), before, atol=1e-5, rtol=0)
