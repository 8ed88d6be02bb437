"""What README and docs tell a reader to type exists, and what they show of settings is read."""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

import ivdr_deploy
from ivdr_deploy.cli import app
from ivdr_deploy.serving.core.settings import read_settings
from ivdr_deploy.serving.http.settings import HttpSettings
from ivdr_deploy.serving.torchserve.settings import EndpointSettings
from train.__main__ import RUNS
from train.config import FinetuneConfig, PretrainConfig
from train.config_file import load_config
from train.options import build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(language: str) -> list[tuple[Path, str]]:
    """The fenced blocks of a language in all pages."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(page, text) for page in PAGES for text in pattern.findall(page.read_text(encoding="utf-8"))]


def console_lines() -> list[str]:
    return [line for _, text in blocks("console") for line in text.splitlines() if line.startswith("$ ")]


def help_lines() -> list[str]:
    """The examples at the end of each command's help."""
    texts = [command.epilog for command in COMMANDS.values()]
    for name in ("pretrain", "finetune", "evaluate", "check", "split"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            build_parser(RUNS).parse_args([name, "-h"])
        texts.append(printed.getvalue())
    found = [re.findall(r"^  ((?:ivdr|python -m train) .*)$", text, re.MULTILINE) for text in texts]
    assert all(found), "every help ends with an example"
    return [line for lines in found for line in lines]


def check(words: list[str]) -> None:
    """Parse a command line with what would parse it, without running it."""
    match words:
        case ["ivdr", name, *rest]:
            COMMANDS[name].make_context(name, rest)
        case ["python", "-m", "train", *rest] | ["torchrun", "--nproc-per-node", _, "-m", "train", *rest]:
            options = build_parser(RUNS).parse_args(rest)
            if rest[0] in ("pretrain", "finetune") and options.config:
                kind = PretrainConfig if rest[0] == "pretrain" else FinetuneConfig
                load_config(kind, ROOT / options.config, options.overrides)
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
        case ["pip", "install", package]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            name, _, extras = package.rstrip("]").partition("[")
            assert name == project["name"]
            assert set(extras.split(",")) - {""} <= set(project["optional-dependencies"])
        case _:
            pytest.fail(f"nothing here knows how to check {shlex.join(words)}")


@pytest.mark.parametrize("line", [*console_lines(), *help_lines()])
def test_a_line_to_type_is_one_that_the_program_takes(line: str) -> None:
    check(shlex.split(line.removeprefix("$ "), comments=True))


def test_the_readme_shows_every_command() -> None:
    shown = {
        words[1] for words in map(shlex.split, (line[2:] for line in console_lines())) if words[0] == "ivdr"
    }
    assert shown == set(COMMANDS)


def mentions() -> list[tuple[str, str, str]]:
    """Where pages and messages name a command in passing: place, command, and the words after it."""
    found = []
    sources = [
        path for folder in ("ivdr_deploy", "train", "handlers") for path in (ROOT / folder).rglob("*.py")
    ]
    for path in [*PAGES, *sorted(sources)]:
        for command, rest in re.findall(r"`ivdr ([a-z]+)([^`]*)`", path.read_text(encoding="utf-8")):
            found.append((str(path.relative_to(ROOT)), command, rest))
    return found


@pytest.mark.parametrize(("place", "command", "rest"), mentions())
def test_a_command_named_in_passing_exists_with_its_options(place: str, command: str, rest: str) -> None:
    known = {option for parameter in COMMANDS[command].params for option in parameter.opts}
    named = {word for word in rest.split() if word.startswith("-")}
    assert named <= known | {"--help"}


FOREIGN = {"--force-reinstall", "--no-deps", "--group", "--nproc-per-node", "--v"}
"""Of pip and torchrun, in hints that say how to install and start; ``--v`` is a variable of a style sheet."""


def texts() -> list[tuple[str, str]]:
    """Every string of more than one word in what is run: messages, hints, help and docstrings, with its place."""
    found = []
    for path in sorted(path for folder in ("ivdr_deploy", "train") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node.value))
    return found


def options_of_train() -> set[str]:
    commands = build_parser(RUNS)._subparsers._group_actions[0]  # type: ignore[union-attr]
    assert isinstance(commands, argparse._SubParsersAction)
    return {option for command in commands.choices.values() for option in command._option_string_actions}


def test_every_option_that_a_message_names_is_one_of_some_command() -> None:
    known = {option for command in COMMANDS.values() for each in command.params for option in each.opts}
    known |= options_of_train() | FOREIGN
    named = [
        (place, option)
        for place, text in texts()
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)
    ]
    assert len(named) > 100
    assert not [(place, option) for place, option in named if option not in known]


def test_no_help_sends_a_reader_to_a_page_that_is_not_installed() -> None:
    shown = {(name, each.name): each.help or "" for name, one in COMMANDS.items() for each in one.params}
    shown |= {(name, ""): command.help or "" for name, command in COMMANDS.items()}
    assert not [place for place, text in shown.items() if "docs/" in text]


def test_an_exception_that_the_pages_for_users_name_is_public() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {
        name for page in pages for name in re.findall(r"`(?:ivdr\.)?(\w+Error)\b", page.read_text("utf-8"))
    }
    assert len(named) > 3
    assert named <= set(ivdr_deploy.__all__)


@pytest.mark.parametrize("text", [text for _, text in blocks("toml")])
def test_settings_that_are_shown_are_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(text, encoding="utf-8")
    read_settings(path, HttpSettings if "max_requests" in text else EndpointSettings)
