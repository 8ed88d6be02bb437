"""One line for labelled videos: ``python -m train finetune clips out=runs/mine``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ivdr_deploy._console import print_text, say_left_out
from ivdr_deploy._files import at_home
from ivdr_deploy._text import quoted
from ivdr_deploy.artifacts.checkpoint import read_checkpoint_info
from ivdr_deploy.artifacts.manifest import MANIFEST_FILE
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.errors import ConfigError, IvdrError
from ivdr_deploy.spec import CheckpointInfo
from train.config import FinetuneConfig
from train.config_file import text_of_override
from train.init import checkpoint_of, load_finetune_config
from train.run import CHECKPOINT_NAME
from train.split import say_split, split_list, write_split
from train.state import saved_states

TEST_SHARE = 0.25
"""Of a list that comes without a test list."""

_CONFIGS = Path(__file__).parent / "configs"
RUNS = Path("runs")
"""Where a start is looked for when none is named."""


def own_config(data: str, settings: Sequence[str], *, runs: Path = RUNS) -> FinetuneConfig:
    """Choose settings for a list of labelled videos: its parts, what to start from, and the recipe that goes with it.

    Args:
        data: The list; of one that holds a training and a test part, both are used.
        settings: ``key=value`` each; ``out`` must be among them. What is given is not chosen.
        runs: Folder of earlier runs.

    Raises:
        DataError: if the list is unusable, or nothing of it can be held out.
        ConfigError: if a setting does not fit, or ``out`` is missing.
    """
    given = {key: at_home(text) for key, text in map(text_of_override, settings)}
    if not given.get("out"):
        raise ConfigError("no run folder is named", hint="add out=FOLDER, e.g. out=runs/mine")
    lists = [f"data.train={data}"] if "data.test" in given else _lists(data, given)
    init = given["init"] if "init" in given else _best_start(runs)
    device = "device=cuda" if given.get("device") == "cuda" else "device=cpu"
    recipe, chosen = _recipe(init, cuda=device.endswith("cuda"))
    return load_finetune_config(recipe, [*lists, *chosen, device, *settings])


def _lists(data: str, given: dict[str, str]) -> list[str]:
    """Return training and test list: the parts of the list itself, or what the split of it gives that the run has."""
    root = given.get("data.root") or None
    parts = [read_video_list(data, root=root, part=part) for part in (None, "train")]
    if len(parts[1].items) < len(parts[0].items):
        return [f"data.train={data}", f"data.test={data}"]
    say_left_out(parts[0].left_out)  # what is read from here on are lists that leave nothing out
    out = Path(given["out"])
    if saved_states(out) or (out / CHECKPOINT_NAME).exists():
        # Parted anew, for example with more videos, the test list would hold some that this run has trained on.
        train, test = out / "lists" / "train.csv", out / "lists" / "test.csv"
    else:
        seed = given.get("seed", "0")
        if not seed.isdecimal():
            raise ConfigError(f"seed must be a whole number from 0, found {quoted(seed)}")
        split = split_list(parts[0], test_share=TEST_SHARE, seed=int(seed))
        say_split(split)
        train, test = write_split(split, out / "lists")
    print_text(f"lists: {train}, {test}", style="dim")
    return [f"data.train={train}", f"data.test={test}"]


def _recipe(init: str, *, cuda: bool) -> tuple[Path, list[str]]:
    """Choose the settings file that goes with a start, and what is set on top of it."""
    if not init:
        if cuda:
            return _CONFIGS / "finetune.toml", ["init="]
        return _CONFIGS / "demo_finetune.toml", []
    against = f"against={_CONFIGS / 'demo_finetune.toml'}"
    if _imported(_info(Path(init))):
        return _CONFIGS / "probe.toml", [f"init={init}", against]
    return _CONFIGS / "own.toml", [f"init={init}"]


def _best_start(runs: Path) -> str:
    """Choose what was trained most already: an imported bundle before own pre-training, of several the latest.

    Returns:
        Its path; empty where there is none.
    """
    found: list[tuple[bool, float, Path]] = []
    folders = sorted(runs.iterdir()) if runs.is_dir() else []
    for folder in folders:
        path = folder if (folder / MANIFEST_FILE).is_file() else folder / CHECKPOINT_NAME
        if not path.exists():
            continue
        try:
            info = _info(path)
        except IvdrError as error:
            print_text(f"not a start: {path}: {error}", style="dim")
            continue
        if _imported(info) or (info.training.backbone_step and not info.labels):
            found.append((_imported(info), path.stat().st_mtime, path))
    if not found:
        print_text(
            f"starts from random weights: {runs} holds no imported model and no pre-training. "
            "Few clips need a start: `ivdr import i3d-k400 -o runs/i3d` gets one",
            style="yellow",
        )
        return ""
    best = max(found)[2]
    print_text(
        f"starts from {best}, the latest {'imported model' if max(found)[0] else 'pre-training'} in {runs} "
        f"({len(found)} found); init=PATH takes another, init= none",
    )
    return str(best)


def _info(path: Path) -> CheckpointInfo:
    return read_checkpoint_info(checkpoint_of(path))


def _imported(info: CheckpointInfo) -> bool:
    """Whether a model was trained elsewhere, and not further here."""
    return bool(info.provenance.origin) and not info.provenance.config
