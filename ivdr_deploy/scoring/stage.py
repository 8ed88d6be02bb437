"""The one stage of a run: shards of inputs in, their rows out. A row depends on the plan and the shard alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

from ivdr_deploy import __version__
from ivdr_deploy._text import as_text
from ivdr_deploy.environment import package_versions
from ivdr_deploy.errors import ConfigError, VideoOpenError
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.records import to_dict
from ivdr_deploy.results import Outcome
from ivdr_deploy.scoring.attempts import Journal
from ivdr_deploy.scoring.inputs import Input
from ivdr_deploy.scoring.plan import RunPlan, ScoreOptions
from ivdr_deploy.scoring.shard import Shard
from ivdr_deploy.video.source import Source

Row = Mapping[str, Any]
Group = tuple[str, tuple[Input, ...]]
"""Name of a shard, and inputs of it: all, or those that are scored by themselves."""


def plan_run(predictor: VideoPredictor, options: ScoreOptions, *, share: str = "") -> RunPlan:
    """Return what decides the rows.

    Raises:
        ConfigError: if the model does not have what the options ask for.
    """
    model = predictor.model
    if absent := [name for name in options.outputs if name not in model.output_names]:
        raise ConfigError(
            f"{model.path} has no output {', '.join(absent)}; it has {', '.join(model.output_names)}",
            hint="leave it out, or export a model that has it",
        )
    if "logits" not in model.output_names and not options.outputs:
        raise ConfigError(
            f"{model.path} has no classifier, so there are no labels to score",
            hint=f"ask for vectors: {' '.join(f'--output {name}' for name in model.output_names)}",
        )
    package = {"pyav": "av", "opencv": "opencv-python-headless"}[predictor.decoder]
    versions = package_versions()
    return RunPlan(
        ivdr_version=__version__,
        model=model.name,
        model_version=model.version,
        model_sha256=model.sha256,
        variant=model.variant,
        runtime=model.runtime.description,
        contract_hash=model.contract_hash,
        view_plan=options.view_plan or model.view_plan,
        top_k=options.top_k,
        outputs=tuple(dict.fromkeys(options.outputs)),
        hash_files=options.hash_files,
        decoder=predictor.decoder,
        limits=to_dict(predictor.limits),
        software={package: versions[package]} if package in versions else {},
        share=share,
    )


def score_groups(
    predictor: VideoPredictor, groups: Iterable[Group], plan: RunPlan
) -> Iterator[tuple[str, Input, Row, bool]]:
    """Yield the row of every input, in order, while the next ones are decoded.

    Of the groups that are read ahead only videos are decoded: the network takes one up when the last row of the group
    before it was taken. So whoever commits a group before asking for more has the work of one group to lose at most.

    Args:
        predictor: The model.
        groups: Read lazily, a few videos ahead. A call of the network never reaches over the edge of a group, so that
            the rows of a shard do not depend on what was scored before.
        plan: What decides the rows.

    Yields:
        The name of the shard, the input, its row, and whether it is the last of its group.
    """
    sent: deque[tuple[str, Input, bool]] = deque()
    held: deque[Future[None]] = deque()
    holds: dict[int, Future[None]] = {}

    def sources() -> Iterator[Source]:
        count = 0
        for name, inputs in groups:
            hold: Future[None] = Future()
            if sent:
                held.append(hold)
            else:
                hold.set_result(None)
            holds.clear()
            holds[count] = hold  # read by `predict_many` with the source that comes now
            for place, item in enumerate(inputs, start=1):
                sent.append((name, item, place == len(inputs)))
                count += 1
                yield item.source

    for outcome in predictor.predict_many(sources(), plan=plan.view_plan, holds=holds):
        name, item, last = sent[0]
        yield name, item, _row(item, outcome, plan), last
        sent.popleft()
        if last and held:
            held.popleft().set_result(None)


class InProcess:
    """Scores shards in this process, with a model that is open."""

    def __init__(self, predictor: VideoPredictor, options: ScoreOptions, *, share: str = "") -> None:
        self.plan = plan_run(predictor, options, share=share)
        self.manifest: Mapping[str, Any] = dict(predictor.model.manifest)
        self.predictor = predictor
        self.call_videos = max(1, predictor.model.runtime.call_clips // self.plan.view_plan.max_views)
        """Videos that share a call of the network."""

    def run(
        self, shards: Iterator[Shard], *, journal: Journal, scored: Callable[[], object]
    ) -> Iterator[tuple[Shard, list[Row]]]:
        """Yield each shard with its rows. What kills this process is not journaled: nobody is left to do it."""
        begun: dict[str, tuple[Shard, list[Row]]] = {}

        def groups() -> Iterator[Group]:
            for shard in shards:
                begun[shard.name] = shard, []
                yield shard.name, shard.inputs

        for name, _, row, _ in score_groups(self.predictor, groups(), self.plan):
            shard, rows = begun[name]
            rows.append(row)
            scored()
            if len(rows) == len(shard.inputs):
                yield begun.pop(name)


def failed_row(item: Input, plan: RunPlan, *, code: str, message: str) -> Row:
    """Return the row of an input without a result."""
    return _start(item, plan) | {"status": "error", "error_code": code, "error_message": as_text(message)}


def _start(item: Input, plan: RunPlan) -> dict[str, Any]:
    return {
        "input_key": item.key,
        "video_id": item.video_id,
        "uri": item.uri,
        "sha256": item.sha256,
        "label": item.label,
        "model": plan.model,
        "model_version": plan.model_version,
        "variant": plan.variant,
        "contract_hash": plan.contract_hash,
        "view_plan": str(plan.view_plan),
        "run_id": plan.run_id,
    }


def _row(item: Input, outcome: Outcome, plan: RunPlan) -> Row:
    result, error = outcome.result, outcome.error
    if item.unreadable is not None:
        result, error = None, error or VideoOpenError(item.unreadable)
    if result is None:
        assert error is not None, "an outcome without a result carries the reason"
        return failed_row(item, plan, code=error.code, message=error.message)
    row = _start(item, plan)
    if result.probabilities is not None:
        top = result.top(plan.top_k)
        row |= {"labels": [label for label, _ in top], "scores": [value for _, value in top]}
    row |= {name: getattr(result, name).tolist() for name in plan.outputs}
    return row | {
        "status": "ok",
        "num_frames": result.info.num_frames,
        "duration_seconds": result.info.duration_seconds,
        "decode_ms": result.decode_ms,
        "preprocess_ms": result.preprocess_ms,
        "infer_ms": result.infer_ms,
    }
