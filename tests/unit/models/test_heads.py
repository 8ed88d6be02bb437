"""Shapes, unit length and slot layout of the heads."""

import torch

from ivdr_deploy.models.heads import ClassifierHead, ClipHead, SeriesHead


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
