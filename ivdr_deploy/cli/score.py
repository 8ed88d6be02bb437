"""``ivdr score``: a collection of videos into a table of Parquet files."""

from __future__ import annotations

import sys
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ivdr_deploy._console import Meter, console, done, print_json, print_text, say_left_out, stopping_softly
from ivdr_deploy._files import at_home
from ivdr_deploy._text import QUOTED, cut, few, quoted
from ivdr_deploy.cli._options import (
    VIDEOS_HELP,
    AllowContainerOption,
    DecoderOption,
    DeviceOption,
    IsolationOption,
    JsonOption,
    NumClipsOption,
    RootOption,
    VariantOption,
    WorkersOption,
    any_unread,
    decode_options,
    video_limits,
)

if TYPE_CHECKING:
    from ivdr_deploy.scoring.scorer import Engine, ScoreSummary
    from ivdr_deploy.scoring.task import Task


def score(
    artifact: Annotated[
        Path,
        typer.Argument(
            metavar="ARTIFACT", help="A bundle, an archive (.mar), a checkpoint or an .onnx file."
        ),
    ],
    videos: Annotated[
        str,
        typer.Argument(
            metavar="VIDEOS", help=f"Videos to score: {VIDEOS_HELP} Or s3://BUCKET/PREFIX, or gs://."
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            help="Folder, s3:// or gs:// place for the table; continued if it is of this model.",
        ),
    ],
    top_k: Annotated[int, typer.Option(help="Labels and scores per video.")] = 5,
    output: Annotated[
        list[str] | None, typer.Option(help="Also store feature, inter or intra; may be repeated.")
    ] = None,
    num_clips: NumClipsOption = None,
    hash_files: Annotated[
        bool,
        typer.Option("--hash", help="Tell files apart by their SHA-256, not by size and time, and store it."),
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option(help="Score again what was too slow, crashed or could not be read."),
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many videos.")] = None,
    since: Annotated[
        str | None, typer.Option(metavar="DATE", help="Only files that were changed then or later, ISO 8601.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Only the I-th of N shares, each into a folder of its own."),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="ray: actors on the cluster of RAY_ADDRESS, or of this machine."),
    ] = "local",
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="I,J",
            help="GPUs by number, an engine for each; one named twice gets two. Implies --device cuda.",
        ),
    ] = None,
    variant: VariantOption = None,
    device: DeviceOption = None,
    decoder: DecoderOption = "pyav",
    decode_workers: WorkersOption = None,
    isolation: IsolationOption = "process",
    root: RootOption = None,
    url_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST", help="Fetch https:// and http:// videos of the list from it; may be repeated."
        ),
    ] = None,
    allow_container: AllowContainerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score every video of a collection: one row per input, a bad video being a row with its reason.

    Stop it whenever you like: the same command goes on where it stopped. The list may have changed since: what is new
    or was replaced is scored, and the rest stays. Exit code 1: some videos failed, or a folder of the list could not be
    read; 130 or 143: stopped by Ctrl-C or SIGTERM, after the shard in work.
    """
    from ivdr_deploy.datasets.lists import VideoStream
    from ivdr_deploy.datasets.remote import UrlStream
    from ivdr_deploy.errors import ConfigError
    from ivdr_deploy.scoring.inputs import InputStream, Selection, parse_share, parse_since
    from ivdr_deploy.scoring.plan import ScoreOptions
    from ivdr_deploy.scoring.scorer import RETRIED, score_with
    from ivdr_deploy.scoring.task import Task, parse_devices
    from ivdr_deploy.video.remote import is_url, is_web

    out = out if is_url(out) else at_home(out)
    share = None if shard is None else parse_share(shard)
    selection = Selection(limit=limit, since=None if since is None else parse_since(since), share=share)
    if is_web(videos):
        raise ConfigError(
            f"{quoted(videos)} is a place of the web, from which no list is fetched",
            hint="fetch it first; a list may name https:// videos, see --url-host",
        )
    if is_url(videos) and root is not None:
        raise ConfigError(f"{quoted(videos)} is a place of videos; the root {root} is for list files")
    listed = UrlStream(videos) if is_url(videos) else VideoStream(at_home(videos), root=root)
    inputs = InputStream(listed, selection, hash_files=hash_files, hosts=tuple(url_host or ()))
    inputs.require_any()
    gpus = () if devices is None else parse_devices(devices)
    if gpus and (engine == "ray" or isolation != "process" or device == "cpu"):
        raise ConfigError(
            "--devices goes with neither --engine ray, --isolation nor --device cpu",
            hint="leave one out; with Ray each actor gets its GPU from the cluster",
        )
    task = Task(
        artifact=artifact,
        variant=variant,
        device="cuda" if gpus else device,
        decoder=decoder,
        limits=video_limits(allow_container),
        decode=decode_options(decode_workers, isolation, engines=len(gpus) or 1),
        options=ScoreOptions(top_k=top_k, outputs=tuple(output or ()), hash_files=hash_files),
        num_clips=num_clips,
        share="" if share is None else f"{share[0]}/{share[1]}",
    )
    with ExitStack() as stack:
        opened = _open(engine, [replace(task, gpu=gpu) for gpu in gpus] or [task], out, stack)
        stopping = stack.enter_context(stopping_softly("stopping when the shard in work is scored"))
        meter = stack.enter_context(Meter("scoring"))
        try:
            summary = score_with(
                opened,
                inputs,
                out,
                retry=RETRIED if retry_failed else (),
                progress=meter,
                stopping=stopping,
            )
        except KeyboardInterrupt:
            _say_stopped(out)
            raise
        if summary.stopped:
            say_left_out(summary.left_out)
            _say_stopped(out)
            return  # `stopping_softly` ends the program
    _report(summary, as_json=as_json)


def _open(engine: str, tasks: list[Task], out: str, stack: ExitStack) -> Engine:
    """Open the model in a process of its own for each task, or in this one where decoding is to be in it too."""
    task = tasks[0]
    if engine == "ray":
        from ivdr_deploy.scoring.ray_engine import RayEngine

        stack.enter_context(redirect_stdout(sys.stderr))  # what Ray says when an actor died
        return stack.enter_context(RayEngine(task, out))
    from ivdr_deploy.scoring.supervisor import Supervisor

    if len(tasks) > 1:
        from ivdr_deploy.scoring.several import Several

        return stack.enter_context(Several(tasks))
    if task.decode.isolation == "process":
        return stack.enter_context(Supervisor(task))
    from ivdr_deploy.scoring.task import open_predictor

    return stack.enter_context(open_predictor(task))


def _say_stopped(out: str) -> None:
    print_text(f"stopped: the rows that are in {out} stay, and the same command goes on from there")


def _report(summary: ScoreSummary, *, as_json: bool) -> None:
    say_left_out(summary.left_out)
    if as_json:
        print_json({**asdict(summary), "videos_per_s": summary.scored / summary.seconds})
    else:
        reasons = few([f"{cut(code, QUOTED)} {count}" for code, count in summary.errors.items()], most=20)
        print_text(f"{summary.ok} ok, {summary.failed} failed{f' ({reasons})' if summary.errors else ''}")
        if summary.dropped:
            console.print(f"dropped {summary.dropped} rows that the list does not ask for any more")
        if not summary.scored:
            did = f"nothing to do: {_nothing(summary)}"
        else:
            rate = summary.scored / summary.seconds
            did = (
                f"scored {summary.scored} of {summary.videos} in {summary.seconds:.1f} s, {rate:.1f} videos/s"
            )
        read = f"from ivdr_deploy.scoring import read_scores; print(read_scores({str(summary.folder)!r}))"
        done(f"{did} -> {summary.folder}", next_command=("python", "-c", read))
    if summary.failed or any_unread(summary.left_out):
        raise typer.Exit(1)


def _nothing(summary: ScoreSummary) -> str:
    if summary.partial:
        return "no video of this part of the list is without a row"
    return "the table is complete" if summary.videos else "no video of the list is in this share"
