"""``python -m train pretrain|finetune|evaluate|check|split``: parse, call one function, report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ivdr_deploy._console import done, exiting, print_json, print_text, say_left_out
from ivdr_deploy._files import at_home
from ivdr_deploy._text import quoted
from ivdr_deploy.datasets.entries import any_unread
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.environment import let_threads_sleep
from ivdr_deploy.errors import ConfigError, FolderError
from ivdr_deploy.video.reader import VideoLimits
from train.config import PretrainConfig, RunConfig
from train.config_file import load_config, settings_toml
from train.init import load_finetune_config
from train.options import Run, build_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    let_threads_sleep()
    with exiting("train"):
        options = build_parser(RUNS).parse_args(arguments)
        run: Run = options.run
        return run(options)
    return 1


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
            options.config,
            [*(f"data.train={at_home(one)}" for one in lists), *settings],
            trying=options.dry_run,
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
    passed = not trouble and not needs.unread
    done(
        f"{'PASS' if passed else 'FAIL'}: nothing was trained, {trouble} videos are missing or cannot be used"
        + ("; a folder of a list could not be read" if needs.unread else "")
    )
    return 0 if passed else 1


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
    return 1 if any_unread(videos.left_out) else 0


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
        print_text(line)
    errors = sum(finding.severity == "error" for finding in report.findings)
    warnings = len(report.findings) - errors
    verdict = "PASS" if report.passed else "FAIL"
    done(f"{verdict}: {report.videos} videos, {errors} kinds of errors, {warnings} kinds of warnings")
    return 0 if report.passed else 1


RUNS: dict[str, Run] = {
    "pretrain": _pretrain,
    "finetune": _finetune,
    "evaluate": _evaluate,
    "check": _check,
    "split": _split,
}


if __name__ == "__main__":
    sys.exit(main())
