"""The options of ``python -m train``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from ivdr_deploy._files import at_home

Run = Callable[[argparse.Namespace], int]
"""One command: what it does, and its exit code."""

Add = Callable[[str, str, str], argparse.ArgumentParser]
"""Adds a command: its name, what it is for, and an example."""


def build_parser(commands_run: Mapping[str, Run]) -> argparse.ArgumentParser:
    """Return the parser; what a command is to run stands in ``run`` of what it parses.

    Args:
        commands_run: By the name of the command.
    """
    parser = argparse.ArgumentParser(prog="python -m train", description="Train and measure video models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str, example: str) -> argparse.ArgumentParser:
        epilog = f"Example:\n  python -m train {name} {example}"
        layout = argparse.RawDescriptionHelpFormatter  # keeps the line
        command = commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=layout
        )
        command.set_defaults(run=commands_run[name])
        return command

    _add_training(add)
    _add_evaluate(add)
    _add_check(add)
    _add_split(add)
    return parser


def _add_training(add: Add) -> None:
    for name, text, example in (
        (
            "pretrain",
            "self-supervised pre-training, without labels",
            "--config train/configs/pretrain.toml data.train=videos.csv out=runs/pre",
        ),
        (
            "finetune",
            "training on labels, from a checkpoint, a bundle or from scratch; LIST alone chooses all settings",
            "clips out=runs/mine",
        ),
    ):
        command = add(name, text, example)
        own = name == "finetune"
        command.add_argument(
            "--config", type=at_home, required=not own, help="TOML file; train/configs has some"
        )
        command.add_argument(
            "overrides",
            nargs="*",
            metavar="[LIST] key=value" if own else "key=value",
            help="e.g. optim.lr=0.01 out=runs/a",
        )
        command.add_argument(
            "--print-config", action="store_true", help="print all settings as TOML on stdout, and end"
        )
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="check lists and settings, say what the run would need of time, memory and disk, and end",
        )
        command.add_argument(
            "--resume",
            action="store_true",
            help="only go on with the run in out=; without it the same command goes on as well, or begins",
        )


def _add_evaluate(add: Add) -> None:
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
    _add_reading(command)
    plans = command.add_mutually_exclusive_group()
    plans.add_argument("--clips", type=int, metavar="N", help="N clips evenly over each video, centre crop")
    plans.add_argument(
        "--protocol",
        choices=["ten-clip", "retrieval", "knn", "linear-probe", "order"],
        help="ten-clip: the test of the papers; retrieval (R@1 to R@50), knn, linear-probe: of the backbone as it "
        "is, with --gallery, on 10 clips; order: what is left of it backwards and with shuffled segments",
    )
    command.add_argument(
        "--gallery",
        type=at_home,
        metavar="LIST",
        help="labelled videos that retrieval, knn and linear-probe know",
    )
    command.add_argument(
        "--cache",
        type=at_home,
        default="runs/cache",
        metavar="DIR",
        help="for features (default runs/cache)",
    )
    command.add_argument(
        "--against",
        type=at_home,
        metavar="MODEL",
        help="another model to compare with on the same videos, paired",
    )
    command.add_argument(
        "-o",
        "--out",
        type=at_home,
        metavar="DIR",
        help="write page.html, report.json and what was said about each video (videos.csv, videos.jsonl) there; "
        "of retrieval and order report.json alone",
    )
    command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    command.add_argument("--json", action="store_true", help="print the report as JSON on stdout")


def _add_check(add: Add) -> None:
    text = "look for what is wrong with lists of videos, and decode every video from end to end"
    command = add("check", text, "train.csv --test test.csv")
    command.add_argument("list", type=at_home, metavar="LIST", help="to train on; any form of list")
    command.add_argument("--test", type=at_home, metavar="LIST", help="to measure on")
    _add_reading(command)
    command.add_argument("--workers", type=int, default=2, help="decode workers (default 2)")
    command.add_argument("--json", action="store_true", help="print the report as JSON on stdout")


def _add_split(add: Add) -> None:
    text = "part a labelled list into train.csv and test.csv, whole groups at a time"
    command = add("split", text, "clips -o lists")
    command.add_argument("list", type=at_home, metavar="LIST", help="labelled; any form of list")
    command.add_argument(
        "-o", "--out", type=at_home, required=True, metavar="DIR", help="where the two files go"
    )
    _add_root(command)
    command.add_argument(
        "--test-share",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="of the videos of each class (default 0.25)",
    )
    command.add_argument(
        "--by",
        choices=["group", "video"],
        default="group",
        help="what stays together: groups, by the list's column or the names (default), or only each video",
    )
    command.add_argument("--seed", type=int, default=0, help="decides among groups (default 0)")


def _add_reading(command: argparse.ArgumentParser) -> None:
    _add_root(command)
    command.add_argument(
        "--allow-container",
        action="append",
        default=[],
        metavar="NAME",
        help="also open e.g. asf (.wmv), flv, ogg",
    )


def _add_root(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--root", type=at_home, metavar="DIR", help="where relative paths start; else the list's folder"
    )
