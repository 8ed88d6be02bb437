"""Alarms come when there is trouble, by name, and not before; kNN accuracy is what it says."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from runs import CLIP, MODEL, equal, pretrain_config

from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.errors import TrainingError
from ivdr_deploy.models.network import build_model
from train.cache import cache_videos
from train.config import DataConfig
from train.health import ALARMS_NAME, FeatureCheck, Watch, knn_accuracy
from train.method import DualConfig
from train.pretrain import pretrain
from train.state import saved_states

GOOD = {
    "loss": 5.0, "uniformity": -2.0, "order_score": 0.9, "slot_cosine": 0.2, "clamped_share": 0.0,
    "swapped_accuracy_same": 0.9,
}  # fmt: skip


@dataclass
class Run:
    """As much of a training state as is looked at."""

    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    averages: dict[str, float] = field(default_factory=dict)
    alarms: list[dict[str, str]] = field(default_factory=list)


def watched(
    folder: Path, lines: list[dict[str, float]], *, stops: bool = False, total: int = 400, warmup: int = 0
) -> Run:
    run = Run()
    watch = Watch(run, folder, total_steps=total, stops=stops, warmup=warmup)  # type: ignore[arg-type]
    for line in lines:
        run.step += 10
        run.metrics = GOOD | line
        if error := watch.look():
            raise error
    return run


def test_a_run_in_health_raises_no_alarm(tmp_path: Path) -> None:
    assert watched(tmp_path, [{}] * 40).alarms == []
    assert not (tmp_path / ALARMS_NAME).exists()


BLIND = {"order_score": 0.01, "swapped_accuracy_same": 0.01}


@pytest.mark.parametrize(
    ("line", "name", "hint"),
    [
        (BLIND | {"slot_cosine": -0.2, "clamped_share": 0.5}, "order plateau", "set dual.rank_clamp=0"),
        (BLIND | {"slot_cosine": 0.97}, "order plateau", "set model.head_norm=series"),
        (BLIND | {"slot_cosine": 0.5}, "order plateau", "raise dual.rank_weight"),
        ({"uniformity": -0.01}, "collapse", "lower optim.lr"),
    ],
)
def test_what_stays_at_the_start_is_named_after_a_flat_start_has_had_its_time(
    tmp_path: Path, line: dict[str, float], name: str, hint: str
) -> None:
    assert watched(tmp_path, [line] * 9).alarms == []  # 90 steps
    run = watched(tmp_path, [line] * 40)
    (alarm,) = run.alarms  # once
    assert (alarm["name"], alarm["step"]) == (name, "100")
    assert hint in alarm["hint"]
    assert json.loads((tmp_path / ALARMS_NAME).read_text()) == [alarm]
    longer = watched(tmp_path, [line] * 40, total=1000)
    assert longer.alarms[0]["step"] == "250"  # a quarter of the run


def test_order_that_is_learned_late_raises_nothing(tmp_path: Path) -> None:
    assert watched(tmp_path, [BLIND] * 5 + [{}] * 35).alarms == []


def test_a_loss_that_grows_is_a_divergence_at_once(tmp_path: Path) -> None:
    (alarm,) = watched(tmp_path, [{}, {"loss": 30.0}]).alarms
    assert alarm["name"] == "divergence"
    assert watched(tmp_path, [{}, {"loss": 15.0}]).alarms == []


def test_losses_that_join_after_a_warm_up_are_no_divergence(tmp_path: Path) -> None:
    lines = [{"loss": 1.0}] * 3 + [{"loss": 12.0}] * 3
    assert watched(tmp_path, lines, warmup=25).alarms == []  # the third line holds steps of both
    (alarm,) = watched(tmp_path, [*lines, {"loss": 60.0}], warmup=25).alarms
    assert "was 12 at the start" in alarm["message"]
    assert watched(tmp_path, lines).alarms[0]["name"] == "divergence"


def test_an_alarm_ends_the_run_where_that_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="order plateau at step 100: order score"):
        watched(tmp_path, [BLIND] * 40, stops=True)
    (alarm,) = json.loads((tmp_path / ALARMS_NAME).read_text())
    assert alarm["name"] == "order plateau"


def test_a_run_that_an_alarm_ends_is_saved_and_goes_on_when_told_to(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.health.FIRST_STEPS", 3)
    dead = DualConfig(rank_weight=1.0, rank_clamp=5.0)
    config = pretrain_config(tmp_path, data, dual=dead, on_alarm="stop")
    monkeypatch.setattr("train.health._MEMORY", 1.0)  # the first line is that of a network that sees no order
    for _ in range(2):  # the same command meets it again
        with pytest.raises(TrainingError, match="order plateau"):
            pretrain(config)
    page = (tmp_path / "page.html").read_text()
    assert "could not go on: order plateau" in page
    assert "order plateau at step" in page.split('class="alarm"')[1]
    assert saved_states(tmp_path)[0].name in ("state-00000003.pt", "state-00000004.pt")
    assert pretrain(replace(config, on_alarm="warn")).exists()


@pytest.mark.parametrize("training", [True, False])
def test_features_are_measured_without_a_trace(data: DataConfig, training: bool) -> None:
    """Batch statistics too: a network that is measured learns what one that is not does."""
    model = build_model(MODEL, CLIP).train(training)
    check = FeatureCheck(model, cache_videos(read_video_list(data.train), CLIP, Path(data.cache)), CLIP)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = check()
    assert equal(before, model.state_dict())
    assert all(part.training == training for part in model.modules())
    model.eval()
    assert check() == found  # of the network as it is used later


def test_a_process_that_has_no_video_to_encode_waits_for_the_others(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(MODEL, CLIP)
    cached = cache_videos(read_video_list(data.train), CLIP, Path(data.cache))
    check = FeatureCheck(model, cached, CLIP)
    found = check()
    gathered = []

    def gather(own: torch.Tensor, *, count: int) -> torch.Tensor:
        gathered.append(own)
        return torch.eye(count)

    monkeypatch.setattr("train.health.shard", lambda count: range(0))
    monkeypatch.setattr("train.health.gather_rows", gather)
    assert check().keys() == found.keys()
    assert gathered[0].shape == (0, model.feature_dim)


def test_knn_accuracy_counts_classes_of_near_ones() -> None:
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [-1.0, 0.0], [-1.0, 0.1], [-1.0, -0.1]])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    queries = torch.tensor([[2.0, 0.0], [-2.0, 0.1], [3.0, 0.1]])
    assert knn_accuracy(queries, torch.tensor([0, 1, 1]), gallery, labels) == pytest.approx(2 / 3)
    assert knn_accuracy(gallery, labels, gallery, labels, leave_one_out=True) == 1.0
    far = torch.tensor([100.0, 0.0])  # what all share says nothing
    assert knn_accuracy(gallery + far, labels, gallery + far, labels) == 1.0
    pairs, mixed = (
        torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]]),
        torch.tensor([0, 1, 0, 1]),
    )
    assert knn_accuracy(pairs, mixed, pairs, mixed, leave_one_out=True) == 0.0  # none is its own neighbour
    alone = torch.tensor([0, 1, 1, 0, 0, 0])  # the first is the only one of its class on its side
    assert knn_accuracy(gallery, alone, gallery, alone, leave_one_out=True) < 1.0
