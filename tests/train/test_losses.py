"""The losses against hand-worked values and against slow loops."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from train import losses

TOLERANCE = {"atol": 1e-5, "rtol": 0.0}


def angles(*degrees: float) -> Tensor:
    """Unit vectors in the plane, (len(degrees), 2)."""
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1).float()


def basis(*axes: int, dim: int = 4) -> Tensor:
    return torch.eye(dim)[list(axes)]


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


def assert_close(value: Tensor, expected: float) -> None:
    torch.testing.assert_close(value, torch.tensor(expected), **TOLERANCE)


# --- contrast


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.551445), (0.5, 0.239545)])
def test_nt_xent_of_orthogonal_videos(temperature: float, expected: float) -> None:
    views = basis(0, 1)
    assert_close(losses.nt_xent(losses.rows(views, views), temperature=temperature), expected)


@pytest.mark.parametrize("count", [2, 5])
def test_nt_xent_of_equal_vectors_is_the_log_of_the_candidates(count: int) -> None:
    same = basis(0).expand(count, -1)
    assert_close(losses.nt_xent(losses.rows(same, same), temperature=0.3), math.log(2 * count - 1))


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.632443), (0.5, 0.361123)])
def test_nt_xent_of_vectors_at_angles(temperature: float, expected: float) -> None:
    assert_close(
        losses.nt_xent(losses.rows(angles(0, 90), angles(30, 120)), temperature=temperature), expected
    )


def test_nt_xent_equals_a_loop_over_rows() -> None:
    a0, a1, temperature = unit(5, 8, seed=1), unit(5, 8, seed=2), 0.2
    rows = torch.cat([a0, a1])
    total = 0.0
    for i in range(10):
        exponents = [math.exp(float(rows[i] @ rows[j]) / temperature) for j in range(10) if j != i]
        total -= math.log(math.exp(float(rows[i] @ rows[(i + 5) % 10]) / temperature) / sum(exponents))
    assert_close(losses.nt_xent(losses.rows(a0, a1), temperature=temperature), total / 10)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.551445), (0.5, 0.239545)])
def test_info_nce_queue_of_orthogonal_entries(temperature: float, expected: float) -> None:
    loss, _ = losses.info_nce_queue(basis(0), basis(0), basis(1, 2), temperature=temperature)
    assert_close(loss, expected)  # ln(1 + 2 exp(-1 / temperature))


def test_ignored_queue_entries_are_no_negatives() -> None:
    q, k, queue = unit(3, 8, seed=1), unit(3, 8, seed=2), unit(6, 8, seed=3)
    ignore = torch.zeros(3, 6, dtype=torch.bool)
    ignore[:, 4:] = True
    masked, _ = losses.info_nce_queue(q, k, queue, temperature=0.1, ignore=ignore)
    assert_close(masked, float(losses.info_nce_queue(q, k, queue[:4], temperature=0.1)[0]))


def test_queue_top1_counts_queries_whose_key_is_nearest() -> None:
    far = -basis(1)
    for queue in (torch.cat([basis(1), far]), torch.cat([far, basis(1)])):  # nearest to the second query
        _, top1 = losses.info_nce_queue(basis(0, 1), basis(0, 2), queue, temperature=1.0)
        assert top1 == 0.5


def coherence(slots0: Tensor, slots1: Tensor, *, temperature: float) -> Tensor:
    """The contrast of slot means, which is that of the mean over all slot pairs."""
    return losses.nt_xent(losses.rows(slots0.mean(dim=1), slots1.mean(dim=1)), temperature=temperature)


@pytest.mark.parametrize(("temperature", "expected"), [(0.5, 0.551445), (0.07, 0.0015797)])
def test_temporal_coherence_of_orthogonal_slots(temperature: float, expected: float) -> None:
    slots = torch.stack([basis(0, 1), basis(2, 3)])
    assert_close(coherence(slots, slots, temperature=temperature), expected)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.390494), (0.5, 0.108102)])
def test_temporal_coherence_of_slots_at_angles(temperature: float, expected: float) -> None:
    first = torch.stack([angles(0, 60), angles(180, 240)])
    second = torch.stack([angles(20, 80), angles(200, 260)])
    assert_close(coherence(first, second, temperature=temperature), expected)


def test_mean_over_slot_pairs_is_the_product_of_slot_means() -> None:
    a, b = unit(4, 3, 8, seed=1), unit(4, 3, 8, seed=2)
    pairs = torch.einsum("isd,jtd->ij", a, b) / 9
    torch.testing.assert_close(pairs, a.mean(dim=1) @ b.mean(dim=1).T, **TOLERANCE)


# --- shuffle and rank


def sr(q: Tensor, p: Tensor, *, theta: float, clamp: float | None = None) -> Tensor:
    return losses.shuffle_rank(q[None], p[None], theta=theta, clamp=clamp)


def test_rank_loss_of_a_perfect_pair() -> None:
    assert_close(sr(basis(0, 1), basis(0, 1), theta=0.5), 0.126928)


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_rank_loss_of_collapsed_slots_is_ln_2(slots: int) -> None:
    same = basis(0).expand(slots, -1)
    assert_close(sr(same, same, theta=0.05, clamp=5.0), math.log(2))


@pytest.mark.parametrize(
    ("theta", "clamp", "expected"), [(0.5, None, 1.410038), (0.05, 5.0, 2.849931), (0.05, None, 10.346574)]
)
def test_rank_loss_of_swapped_slots(theta: float, clamp: float | None, expected: float) -> None:
    assert_close(sr(basis(0, 1), basis(1, 0), theta=theta, clamp=clamp), expected)


@pytest.mark.parametrize(("theta", "expected"), [(1.0, 0.404323), (0.5, 0.228209)])
def test_rank_loss_of_slots_at_angles(theta: float, expected: float) -> None:
    assert_close(sr(angles(0, 90), angles(20, 80), theta=theta), expected)


@pytest.mark.parametrize(
    ("theta", "clamp", "expected"),
    [(1.0, None, 0.902441), (0.5, None, 1.174753), (0.05, 5.0, 3.533296), (0.05, None, 8.264323)],
)
def test_rank_loss_of_misranked_slots(theta: float, clamp: float | None, expected: float) -> None:
    assert_close(sr(angles(0, 90), angles(70, 10), theta=theta, clamp=clamp), expected)


@pytest.mark.parametrize(("theta", "expected"), [(1.0, 0.417480), (0.5, 0.267705)])
def test_rank_loss_of_three_slots(theta: float, expected: float) -> None:
    assert_close(sr(angles(0, 60, 120), angles(10, 70, 110), theta=theta), expected)


@pytest.mark.parametrize("clamp", [None, 5.0])
@pytest.mark.parametrize("slots", [2, 3, 4])
def test_rank_loss_equals_a_loop_over_comparisons(slots: int, clamp: float | None) -> None:
    q, p, theta = unit(3, slots, 8, seed=1), unit(3, slots, 8, seed=2), 0.1
    total = 0.0
    for video in range(3):
        u = torch.cat([q[video], p[video]])
        for r in range(2 * slots):
            partner = (r + slots) % (2 * slots)
            for s in set(range(2 * slots)) - {r, partner}:
                margin = float(u[r] @ u[s] - u[r] @ u[partner]) / theta
                total += math.log1p(math.exp(min(margin, clamp) if clamp else margin))
    expected = total / (3 * 2 * slots * (2 * slots - 2))
    assert_close(losses.shuffle_rank(q, p, theta=theta, clamp=clamp), expected)


def test_comparisons_beyond_the_clamp_have_no_gradient() -> None:
    q, p = basis(0, 1)[None].requires_grad_(), basis(1, 0)[None]
    losses.shuffle_rank(q, p, theta=0.05, clamp=5.0).backward()
    beyond = losses.clamped_fraction(q, p, theta=0.05, clamp=5.0)
    assert beyond == 0.5  # the swapped partner of each anchor; its other negative ties with the positive
    unclamped = basis(0, 1)[None].requires_grad_()
    losses.shuffle_rank(unclamped, p, theta=0.05, clamp=None).backward()
    assert unclamped.grad is not None
    assert q.grad is not None
    assert q.grad.norm() < 0.1 * unclamped.grad.norm()


def test_gradient_reaches_both_clips_of_a_pair() -> None:
    q, p = unit(2, 3, 8, seed=1).requires_grad_(), unit(2, 3, 8, seed=2).requires_grad_()
    losses.shuffle_rank(q, p, theta=1.0, clamp=None).backward()
    assert q.grad is not None
    assert p.grad is not None
    assert q.grad.norm() > 0
    assert p.grad.norm() > 0


def test_segments_are_reordered_and_calibrated_back() -> None:
    video = torch.arange(6).reshape(1, 6, 1)  # three segments of two frames
    permutation = torch.tensor([[1, 2, 0]])
    shuffled = losses.shuffle_segments(video, permutation)
    assert shuffled.flatten().tolist() == [2, 3, 4, 5, 0, 1]
    slots = shuffled[:, ::2]  # one value per segment stands for its slot
    assert losses.calibrate(slots, permutation).flatten().tolist() == [0, 2, 4]


def test_gathering_with_the_permutation_again_does_not_calibrate() -> None:
    permutation = torch.tensor([[1, 2, 0]])
    slots = torch.tensor([1, 2, 0]).reshape(1, 3, 1)
    wrong = slots[0, permutation[0]].flatten().tolist()
    assert wrong != losses.calibrate(slots, permutation).flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_an_encoder_that_follows_segments_gives_equal_slots_for_every_permutation(slots: int) -> None:
    video = torch.randn(1, 12, 5, 5, 3, generator=torch.Generator().manual_seed(0))

    def segment_means(clips: Tensor) -> Tensor:
        return clips.reshape(len(clips), slots, -1, 5 * 5 * 3).mean(dim=2)

    for order in itertools.permutations(range(slots)):
        permutation = torch.tensor([order])
        back = losses.calibrate(segment_means(losses.shuffle_segments(video, permutation)), permutation)
        assert torch.equal(back, segment_means(video))


def test_each_video_has_its_own_permutation() -> None:
    video = torch.arange(4).reshape(1, 4).repeat(2, 1)
    shuffled = losses.shuffle_segments(video, torch.tensor([[0, 1], [1, 0]]))
    assert shuffled.tolist() == [[0, 1, 2, 3], [2, 3, 0, 1]]


def test_shuffling_works_on_channels_last_memory() -> None:
    video = torch.randn(2, 3, 4, 5, 5).to(memory_format=torch.channels_last_3d).permute(0, 2, 3, 4, 1)
    permutation = torch.tensor([[1, 0], [0, 1]])
    shuffled = losses.shuffle_segments(video, permutation)
    assert torch.equal(shuffled[0], video[0, [2, 3, 0, 1]])
    assert torch.equal(shuffled[1], video[1])


# --- metrics


def test_ranking_accuracy_is_1_when_perfect_and_half_when_collapsed() -> None:
    perfect, collapsed = basis(0, 1)[None], basis(0, 0)[None]
    assert losses.ranking_accuracy(perfect, perfect) == 1.0
    assert losses.ranking_accuracy(collapsed, collapsed) == 0.5


def test_ranking_accuracy_of_an_order_blind_encoder_is_chance() -> None:
    q = unit(2, 2, 8)
    p = torch.stack([q[0], q[1].flip(0)])  # one video came back in place, the other swapped
    assert losses.ranking_accuracy(q[1:], p[1:]) == 0.0
    assert losses.ranking_accuracy(q, p).tolist() == [1.0, 0.0]


def test_contrast_top1_counts_rows_that_find_their_video() -> None:
    assert losses.contrast_top1(losses.rows(basis(0, 1), basis(0, 1))) == 1.0
    assert losses.contrast_top1(losses.rows(basis(0, 1), basis(1, 0))) == 0.0


def test_no_row_finds_its_video_where_all_fall_together() -> None:
    together = basis(0, 0, 0)
    assert losses.contrast_top1(losses.rows(together, together)) == 0.0
    assert losses.info_nce_queue(together, together, together, temperature=0.07)[1] == 0.0


def test_alignment_and_uniformity_of_vectors_at_right_angles() -> None:
    assert_close(losses.alignment(basis(0, 1), basis(0, 2)), 1.0)  # squared distances 0 and 2
    assert_close(losses.uniformity(basis(0, 1, 2)), -4.0)
    assert_close(losses.uniformity(basis(0, 0)), 0.0)


def test_effective_rank_counts_directions_of_equal_spread() -> None:
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))
    assert_close(losses.effective_rank(corners + torch.tensor([5.0, -1.0, 2.0])), 3.0)
    assert_close(losses.effective_rank(corners * torch.tensor([1.0, 0.0, 0.0])), 1.0)
    assert_close(losses.effective_rank(torch.ones(4, 3)), 0.0)


def test_shares_of_two_processes_make_the_contrast_of_the_whole_batch() -> None:
    a0, a1 = unit(6, 8, seed=1), unit(6, 8, seed=2)
    every = torch.stack([a0, a1])
    parts = [losses.Rows(every[:, start : start + 3], every, start) for start in (0, 3)]
    shares = [losses.nt_xent(part, temperature=0.2) for part in parts]
    assert_close(sum(shares) / 2, float(losses.nt_xent(losses.rows(a0, a1), temperature=0.2)))
