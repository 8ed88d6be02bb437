"""``python -m train pretrain|finetune|evaluate``: parse, call one function, report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from ivdr_deploy._console import console, done, exiting, print_json
from ivdr_deploy._files import at_home
from ivdr_deploy.environment import let_threads_sleep
from ivdr_deploy.errors import FolderError
from ivdr_deploy.spec import ViewPlan
from ivdr_deploy.video.reader import VideoLimits
from train.config import PretrainConfig, RunConfig
from train.config_file import load_config
from train.init import load_finetune_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    let_threads_sleep()
    with exiting("train"):
        options = _parser().parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = options.run
        return run(options)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train", description="Train and measure video models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str, example: str) -> argparse.ArgumentParser:
        epilog = f"Example:\n  python -m train {name} {example}"
        layout = argparse.RawDescriptionHelpFormatter  # keeps the line
        return commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=layout)

    for name, run, text, example in (
        (
            "pretrain",
            _pretrain,
            "self-supervised pre-training, without labels",
            "--config train/configs/pretrain.toml data.train=videos.csv out=runs/pre",
        ),
        (
            "finetune",
            _finetune,
            "training on labels, from a checkpoint or from scratch",
            "--config train/configs/finetune.toml data.train=train.csv data.test=test.csv out=runs/ft",
        ),
    ):
        command = add(name, text, example)
        command.add_argument(
            "--config", type=at_home, required=True, help="TOML file; train/configs has some"
        )
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=0.01 out=runs/a"
        )
        command.add_argument(
            "--resume",
            action="store_true",
            help="only go on with the run in out=; without it the same command goes on as well, or begins",
        )
        command.set_defaults(run=run)
    text = "accuracy on a labelled list, on the clips that the checkpoint's view plan takes"
    command = add("evaluate", text, "runs/ft/checkpoint.safetensors --videos test.csv --clips 10")
    command.add_argument("checkpoint", type=at_home)
    command.add_argument(
        "--videos",
        "--data",
        type=at_home,
        required=True,
        metavar="LIST",
        help="labelled: class folders, csv or text list",
    )
    command.add_argument(
        "--root", type=at_home, metavar="DIR", help="where relative paths start; else the list's folder"
    )
    command.add_argument(
        "--allow-container",
        action="append",
        default=[],
        metavar="NAME",
        help="also open e.g. asf (.wmv), flv, ogg",
    )
    plans = command.add_mutually_exclusive_group()
    plans.add_argument("--clips", type=int, metavar="N", help="N clips evenly over each video, centre crop")
    plans.add_argument("--protocol", choices=["ten-clip"], help="the test of the papers: the same with 10")
    command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    command.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    command.set_defaults(run=_evaluate)
    return parser


def _refuse_to_begin(options: argparse.Namespace, config: RunConfig) -> None:
    """With ``--resume``, refuse a run folder that holds nothing to go on from."""
    from train.state import saved_states

    if options.resume and not saved_states(Path(config.out)):
        raise FolderError(
            f"{config.out} holds no training state to go on from", hint="leave --resume out, or correct out="
        )


def _pretrain(options: argparse.Namespace) -> int:
    config = load_config(PretrainConfig, options.config, options.overrides)
    _refuse_to_begin(options, config)
    from train.pretrain import pretrain

    path = pretrain(config)
    done(
        f"wrote {path}",
        next_command=("python", "-m", "train", "finetune", "--config", "FILE", f"init={path}"),
    )
    return 0


def _finetune(options: argparse.Namespace) -> int:
    config = load_finetune_config(options.config, options.overrides)
    _refuse_to_begin(options, config)
    from train.finetune import finetune

    path = finetune(config)
    done(f"wrote {path}", next_command=("ivdr", "export", path, "-o", "BUNDLE"))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from train.evaluate import PROTOCOLS, evaluate

    plan, origin = None, "the checkpoint's plan"
    if options.clips is not None:
        plan, origin = ViewPlan(num_clips=options.clips), f"--clips {options.clips}"
    elif options.protocol:
        plan, origin = PROTOCOLS[options.protocol], f"--protocol {options.protocol}"
    report = evaluate(
        options.checkpoint,
        options.videos,
        root=options.root,
        plan=plan,
        limits=VideoLimits.allowing(options.allow_container),
        device=options.device,
    )
    for uri, reason in report.failed:
        console.print(f"failed {uri}: {reason}", style="red", markup=False)
    if options.json:
        print_json(report.to_dict())
    else:
        table = Table("class", "right", "of", "accuracy")
        for label, accuracy in report.per_class.items():
            shown = f"{accuracy.value:.1%}" if accuracy.total else "-"
            table.add_row(label, str(accuracy.correct), str(accuracy.total), shown)
        console.print(table)
    console.print(f"clip accuracy {report.clip_accuracy}", markup=False)
    done(f"video accuracy {report.video_accuracy}, on {report.view_plan} ({origin})")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
