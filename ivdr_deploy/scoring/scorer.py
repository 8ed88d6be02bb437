"""List of videos -> predictor -> rows -> shards, with one row per input whatever happens to it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ivdr_deploy import __version__
from ivdr_deploy._console import Track, untracked
from ivdr_deploy._files import sha256_file
from ivdr_deploy._text import as_text, quoted
from ivdr_deploy.datasets.lists import VideoItem, VideoList
from ivdr_deploy.errors import ConfigError, FolderError, VideoOpenError
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.records import to_dict
from ivdr_deploy.results import Outcome
from ivdr_deploy.scoring.plan import RunPlan, ScoreOptions, shard_videos, video_id
from ivdr_deploy.scoring.sink import ScoreSink, open_sink

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSummary:
    """What is in the folder after a run, and what the run did."""

    folder: Path
    run_id: str
    videos: int
    """Rows in the table."""

    ok: int
    failed: int
    errors: dict[str, int]
    """Failed videos by error code, the most frequent first."""

    scored: int
    """Rows that this run added; 0 when the table was complete already."""

    seconds: float
    """That this run took, the loading of the model left out."""


def score(
    predictor: VideoPredictor,
    videos: VideoList,
    folder: str | Path,
    *,
    options: ScoreOptions | None = None,
    videos_per_shard: int | None = None,
    track: Track = untracked,
) -> ScoreSummary:
    """Score every video of a list into a folder, going on where an earlier call stopped.

    A video that cannot be used becomes a row with the reason. Any other exception is a defect, or the end of the run,
    and is raised; the shards written before it stay.

    Args:
        predictor: The model, with its decoder and limits.
        videos: The list.
        folder: Where the table goes; see ``scoring.sink``.
        options: What a row holds.
        videos_per_shard: Rows per file, what a kill can lose; None chooses by the length of the list.
        track: Shows progress.

    Raises:
        ConfigError: if the model does not have what the options ask for.
        FolderError: if the folder belongs to something else, another process writes to it, or a file whose digest is
            in the table is another one now.
        DataError: if the table in the folder is damaged.
    """
    started = time.perf_counter()
    plan, manifest = plan_run(
        predictor, videos, options=options or ScoreOptions(), videos_per_shard=videos_per_shard
    )
    with open_sink(Path(folder), plan, manifest=manifest) as sink:
        if plan.hash_files:
            _refuse_replaced(videos, sink, track)
        positions = [position for shard in sink.pending for position in range(shard.start, shard.stop)]
        rows: Iterable[Row] = _rows(predictor, videos, positions, plan=plan)
        source = iter(track(rows, len(positions), "scoring") if positions else rows)
        for shard in sink.pending:
            sink.write(shard, list(islice(source, shard.size)))
        counts = sink.outcomes()
    ok = counts.pop("ok", 0)
    return ScoreSummary(
        folder=Path(folder),
        run_id=plan.run_id,
        videos=plan.videos,
        ok=ok,
        failed=counts.total(),
        errors=dict(counts.most_common()),
        scored=len(positions),
        seconds=time.perf_counter() - started,
    )


def plan_run(
    predictor: VideoPredictor,
    videos: VideoList,
    *,
    options: ScoreOptions,
    videos_per_shard: int | None = None,
) -> tuple[RunPlan, dict[str, Any]]:
    """Return the identity of a run, and what the model says about itself.

    Raises:
        ConfigError: if the model does not have what the options ask for.
    """
    model = predictor.model
    if videos_per_shard is not None and videos_per_shard < 1:
        raise ConfigError(f"videos_per_shard must be at least 1, found {videos_per_shard}")
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
    plan = RunPlan(
        ivdr_version=__version__,
        videos=len(videos.items),
        videos_sha256=videos.data_hash,
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
        shard_videos=videos_per_shard or shard_videos(len(videos.items)),
    )
    return plan, dict(model.manifest)


def _rows(
    predictor: VideoPredictor,
    videos: VideoList,
    positions: list[int],
    *,
    plan: RunPlan,
) -> Iterator[Row]:
    starts = {shard.start for shard in plan.shards}
    outcomes = predictor.predict_many(
        (videos.items[position].source for position in positions),
        plan=plan.view_plan,
        # A call never reaches over the edge of a shard: the rows of a shard do not depend on what was scored before.
        call_starts={place for place, position in enumerate(positions) if position in starts},
    )
    constants = {
        "model": plan.model,
        "model_version": plan.model_version,
        "variant": plan.variant,
        "contract_hash": plan.contract_hash,
        "view_plan": str(plan.view_plan),
        "run_id": plan.run_id,
    }
    for position, outcome in zip(positions, outcomes, strict=True):
        yield {"position": position, **_row(videos.items[position], outcome, plan=plan), **constants}


def _refuse_replaced(videos: VideoList, sink: ScoreSink, track: Track) -> None:
    """Hold the digests of the rows that are there against the files."""
    digests = list(sink.digests())
    for position, scored in track(digests, len(digests), "checking the files that were scored"):
        item = videos.items[position]
        found = _hash(item)
        if isinstance(found, str) and found != scored:
            raise FolderError(
                f"{as_text(item.uri)} is another file than the one scored into {sink.folder} (its SHA-256 begins "
                f"{found[:12]}, not {scored[:12]})",
                hint="score into another folder with -o, or delete the shard with its row: it is made again",
            )


def _hash(item: VideoItem) -> str | VideoOpenError | None:
    """Return the SHA-256 of a file, or why it cannot be read; None where there is no file."""
    try:
        return sha256_file(item.path) if item.path.is_file() else None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        return VideoOpenError(f"{quoted(item.uri)} cannot be read for its SHA-256: {reason}")


def _row(item: VideoItem, outcome: Outcome, *, plan: RunPlan) -> Row:
    row: dict[str, Any] = {"video_id": video_id(item.uri), "uri": as_text(item.uri), "label": item.label}
    result, error = outcome.result, outcome.error
    if plan.hash_files:
        digest = _hash(item)
        if isinstance(digest, VideoOpenError):
            result, error = None, error or digest
        else:
            row["sha256"] = digest
    if result is None:
        assert error is not None, "an outcome without a result carries the reason"
        return row | {"status": "error", "error_code": error.code, "error_message": as_text(error.message)}
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
