"""``python -m train pretrain|finetune|evaluate``: parse, call one function, report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from rich.table import Table

from ivdr_deploy._console import console, done, exiting, print_json
from train.config import FinetuneConfig, PretrainConfig, load_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    with exiting("train"):
        run: Callable[[argparse.Namespace], int] = options.run
        return run(options)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train", description="Train and measure video models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("pretrain", _pretrain, "self-supervised pre-training, without labels"),
        ("finetune", _finetune, "training on labels, from a checkpoint or from scratch"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", required=True, help="TOML file; train/configs has some")
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=0.01 out=runs/a"
        )
        command.set_defaults(run=run)
    command = commands.add_parser("evaluate", help="accuracy on a labelled list")
    command.add_argument("checkpoint")
    command.add_argument("--data", required=True, help="labelled list: class folders, csv or text")
    command.add_argument("--protocol", choices=["ten-clip"], default="ten-clip")
    command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    command.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    command.set_defaults(run=_evaluate)
    return parser


def _pretrain(options: argparse.Namespace) -> int:
    config = load_config(PretrainConfig, options.config, options.overrides)
    from train.pretrain import pretrain

    path = pretrain(config)
    done(f"wrote {path}", next_command=f"python -m train finetune --config FILE init={path}")
    return 0


def _finetune(options: argparse.Namespace) -> int:
    config = load_config(FinetuneConfig, options.config, options.overrides)
    from train.finetune import finetune

    path = finetune(config)
    done(f"wrote {path}", next_command=f"ivdr export {path} -o BUNDLE")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from train.evaluate import evaluate

    report = evaluate(options.checkpoint, options.data, device=options.device)
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
    done(f"video accuracy {report.video_accuracy}, {report.num_clips} clips a video")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
