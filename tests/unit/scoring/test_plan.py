from __future__ import annotations

from dataclasses import replace

import pytest

from ivdr_deploy.errors import ConfigError
from ivdr_deploy.scoring.plan import RunPlan, ScoreOptions, shard_videos, video_id
from ivdr_deploy.spec import ViewPlan

PLAN = RunPlan(
    ivdr_version="0.1.0",
    videos=10,
    videos_sha256="aa",
    model="tiny",
    model_version="1.0",
    model_sha256="bb",
    variant="onnx-fp32",
    runtime="onnxruntime 1.32.0, CPUExecutionProvider, fp32",
    contract_hash="cc",
    view_plan=ViewPlan(num_clips=2),
    top_k=5,
    hash_files=False,
    decoder="pyav",
    limits={"max_bytes": 100},
    shard_videos=4,
)


def test_equal_plans_have_the_same_run_id_and_shard_names():
    again = replace(PLAN)

    assert again.run_id == PLAN.run_id
    assert again.shards == PLAN.shards


@pytest.mark.parametrize(
    "change",
    [
        {"ivdr_version": "0.2.0"},
        {"videos_sha256": "ab"},
        {"model_sha256": "bc"},
        {"runtime": "torch 2.14"},
        {"variant": "torch-fp32"},
        {"contract_hash": "cd"},
        {"top_k": 4},
        {"outputs": ("inter",)},
        {"view_plan": ViewPlan(num_clips=3)},
        {"hash_files": True},
        {"decoder": "opencv"},
        {"limits": {"max_bytes": 99}},
        {"shard_videos": 5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_rows_changes_the_run_id_and_is_named(change):
    other = replace(PLAN, **change)

    assert other.run_id != PLAN.run_id
    assert not {shard.name for shard in other.shards} & {shard.name for shard in PLAN.shards}
    (name,) = PLAN.differences(other)
    assert name.split(".")[0] == next(iter(change))


def test_a_difference_is_short_and_names_the_setting():
    long = replace(PLAN, model_sha256="b" * 64, runtime="x" * 1000, limits={"max_bytes": 99})

    assert PLAN.differences(long) == {
        "model_sha256": "bb, not bbbbbbbbbbbb",
        "runtime": f"{PLAN.runtime}, not {'x' * 60}...",
        "limits.max_bytes": "100, not 99",
    }


@pytest.mark.parametrize(("videos", "sizes"), [(1, [1]), (4, [4]), (5, [4, 1]), (10, [4, 4, 2])])
def test_shards_hold_every_input_exactly_once(videos, sizes):
    shards = replace(PLAN, videos=videos).shards

    assert [shard.size for shard in shards] == sizes
    covered = [position for shard in shards for position in range(shard.start, shard.stop)]
    assert covered == list(range(videos))
    assert len({shard.name for shard in shards}) == len(shards)
    assert sorted(shard.name for shard in shards) == [shard.name for shard in shards]


@pytest.mark.parametrize(("videos", "size"), [(1, 32), (32_000, 32), (32_001, 33), (1_000_000, 1000)])
def test_a_kill_loses_32_videos_or_a_thousandth(videos, size):
    assert shard_videos(videos) == size


def test_video_id_depends_on_the_uri_alone():
    assert video_id("walk/a.mp4") == "d6bd5402b1bedf46"
    assert video_id("walk/a.mp4") != video_id("walk/b.mp4")


def test_options_refuse_what_is_no_output():
    with pytest.raises(ConfigError, match="unknown output 'logits'; expected any of feature, inter, intra"):
        ScoreOptions(outputs=("logits",))
    with pytest.raises(ConfigError, match="top_k must be at least 1, found 0"):
        ScoreOptions(top_k=0)
