"""A clip that the backbone cannot take is refused before anything is decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from runs import CLIP, MODEL, finetune_config, pretrain_config

from ivdr_deploy.errors import ConfigError
from train.config import DataConfig, RunConfig
from train.finetune import finetune
from train.pretrain import pretrain


@pytest.mark.parametrize(("make", "run"), [(pretrain_config, pretrain), (finetune_config, finetune)])
def test_training_refuses_it_before_decoding(
    make: Callable[..., RunConfig], run: Callable[[RunConfig], Path], data: DataConfig, tmp_path: Path
) -> None:
    data = replace(data, cache=str(tmp_path / "cache"))
    clip = replace(CLIP, num_frames=16, short_side=20, crop_size=16)
    config = make(tmp_path / "out", data, clip=clip, model=replace(MODEL, backbone="s3d"))
    with pytest.raises(ConfigError, match="s3d needs clips of at least"):
        run(config)
    assert not (tmp_path / "cache").exists()
