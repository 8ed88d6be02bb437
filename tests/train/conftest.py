"""What the tests of training share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from clips import write_set
from runs import pretrain_config

from train.config import DataConfig
from train.pretrain import pretrain


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums then do not depend on how work was shared out, and busy cores slow the tests down less."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("data")
    train, test = write_set(folder / "train", per_class=8), write_set(folder / "test", per_class=3, seed=99)
    return DataConfig(train=str(train), test=str(test), cache=str(folder / "cache"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, data: DataConfig) -> Path:
    return pretrain(pretrain_config(tmp_path_factory.mktemp("pretrain"), data))
