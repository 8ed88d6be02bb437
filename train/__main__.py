"""``python -m train pretrain|finetune|evaluate|check|split``: parse, call one function, report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ivdr_deploy._console import console, done, exiting, print_json, say_left_out
from ivdr_deploy._files import at_home
from ivdr_deploy._text import quoted
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.environment import let_threads_sleep
from ivdr_deploy.errors import ConfigError, FolderError
from ivdr_deploy.video.reader import VideoLimits
from train.config import PretrainConfig, RunConfig
from train.config_file import load_config, settings_toml
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
        command.set_defaults(run=run)
    _add_evaluate(add)
    _add_check(add)
    _add_split(add)
    return parser


def _add_evaluate(add: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
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
        help="write page.html, report.json and what was said about each video (videos.csv, videos.jsonl) there",
    )
    command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    command.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    command.set_defaults(run=_evaluate)


def _add_check(add: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    text = "look for what is wrong with lists of videos, and decode every video from end to end"
    command = add("check", text, "train.csv --test test.csv")
    command.add_argument("list", type=at_home, metavar="LIST", help="to train on; any form of list")
    command.add_argument("--test", type=at_home, metavar="LIST", help="to measure on")
    _add_reading(command)
    command.add_argument("--workers", type=int, default=2, help="decode workers (default 2)")
    command.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    command.set_defaults(run=_check)


def _add_split(add: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    text = "part a labelled list into train.csv and test.csv, whole groups at a time"
    command = add("split", text, "clips -o lists")
    command.add_argument("list", type=at_home, metavar="LIST", help="labelled; any form of list")
    command.add_argument(
        "-o", "--out", type=at_home, required=True, metavar="DIR", help="where the two files go"
    )
    command.add_argument(
        "--root", type=at_home, metavar="DIR", help="where relative paths start; else the list's folder"
    )
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
    command.set_defaults(run=_split)


def _add_reading(command: argparse.ArgumentParser) -> None:
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


def _refuse_to_begin(options: argparse.Namespace, config: RunConfig) -> None:
    """With ``--resume``, refuse a run folder that holds nothing to go on from."""
    from train.state import saved_states

    if options.resume and not saved_states(Path(config.out)):
        raise FolderError(
            f"{config.out} holds no training state to go on from", hint="leave --resume out, or correct out="
        )


def _pretrain(options: argparse.Namespace) -> int:
    config = load_config(PretrainConfig, options.config, options.overrides)
    if options.print_config:
        print(settings_toml(config), end="")
        return 0
    if options.dry_run:
        return _dry_run(config)
    _refuse_to_begin(options, config)
    from train.pretrain import pretrain

    path = pretrain(config)
    done(
        f"wrote {path}; its page: {path.with_name('page.html')}",
        next_command=("python", "-m", "train", "finetune", "LIST", f"init={path}", "out=FOLDER"),
    )
    return 0


def _finetune(options: argparse.Namespace) -> int:
    lists = [word for word in options.overrides if "=" not in word or os.path.exists(at_home(word))]
    settings = [word for word in options.overrides if word not in lists]
    if len(lists) > 1:
        raise ConfigError(f"{quoted(lists[1])} is no setting, and {quoted(lists[0])} is the list already")
    if options.config:
        config = load_finetune_config(
            options.config, [*(f"data.train={at_home(one)}" for one in lists), *settings]
        )
    elif lists:
        from train.own import own_config

        config = own_config(at_home(lists[0]), settings)
    else:
        raise ConfigError(
            "neither a list of videos nor --config is given",
            hint="python -m train finetune LIST out=FOLDER, where LIST is a folder of class folders or a list file",
        )
    if options.print_config:
        print(settings_toml(config), end="")
        return 0
    if options.dry_run:
        return _dry_run(config)
    _refuse_to_begin(options, config)
    from train.finetune import finetune

    path = finetune(config)
    best = path.with_name("best.safetensors")
    said = f"; the best on data.validation: {best}" if config.data.validation and best.exists() else ""
    done(
        f"wrote {path}{said}; its page: {path.with_name('page.html')}",
        next_command=("ivdr", "export", path, "-o", path.with_name("bundle")),
    )
    return 0


def _dry_run(config: RunConfig) -> int:
    from train.dry_run import dry_run, say_needs

    needs = dry_run(config)
    say_needs(needs)
    trouble = len(needs.missing) + sum(len(missing) for _, missing in needs.others.values()) + len(needs.bad)
    done(
        f"{'FAIL' if trouble else 'PASS'}: nothing was trained, {trouble} videos are missing or cannot be used"
    )
    return 1 if trouble else 0


def _split(options: argparse.Namespace) -> int:
    from train.split import say_split, split_list, write_split

    videos = read_video_list(options.list, root=options.root)
    say_left_out(videos.left_out)
    split = split_list(videos, test_share=options.test_share, by=options.by, seed=options.seed)
    say_split(split)
    train, test = write_split(split, Path(options.out))
    done(
        f"wrote {train} and {test}",
        next_command=("python", "-m", "train", "check", train, "--test", test),
    )
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from train.evaluate_command import run

    return run(options)


def _check(options: argparse.Namespace) -> int:
    from train.check import check_lists

    report = check_lists(
        options.list,
        options.test,
        root=options.root,
        limits=VideoLimits.allowing(options.allow_container),
        decode=DecodeOptions(workers=options.workers),
    )
    if options.json:
        print_json(report.to_dict())
    for line in report.lines():
        console.print(line, markup=False)
    errors = sum(finding.severity == "error" for finding in report.findings)
    warnings = len(report.findings) - errors
    verdict = "PASS" if report.passed else "FAIL"
    done(f"{verdict}: {report.videos} videos, {errors} kinds of errors, {warnings} kinds of warnings")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
