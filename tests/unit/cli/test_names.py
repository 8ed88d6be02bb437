"""Names that are not UTF-8, in everything that the commands print, under locales as they are found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from bundles import make_tiny_checkpoint
from videos import numbered_video

ROOT = Path(__file__).resolve().parents[3]

IN_TURN = r"""
import json, os, sys
from ivdr_deploy.cli import main as ivdr
from train.__main__ import main as train
for words in json.loads(sys.argv[1]):
    words = [os.fsdecode(word.encode("latin-1")) for word in words]
    try:
        code = {"ivdr": ivdr, "train": train}[words[0]](words[1:])
    except SystemExit as ended:
        code = ended.code
    sys.stdout.flush()
    os.write(1, b"\0")
    os.write(2, f"{code or 0}\0".encode())
"""


@dataclass(frozen=True, slots=True)
class Ended:
    code: int
    stdout: bytes
    stderr: bytes


@pytest.fixture(scope="module")
def latin_1(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a locale that few systems still have, so that it is made here."""
    program, folder = shutil.which("localedef"), tmp_path_factory.mktemp("locales")
    if program is None or not Path("/usr/share/i18n/charmaps/ISO-8859-1.gz").exists():
        pytest.skip("this system cannot make an ISO-8859-1 locale")
    made = folder / "en_US.ISO-8859-1"
    subprocess.run([program, "-f", "ISO-8859-1", "-i", "en_US", str(made)], check=True, capture_output=True)
    return {"LOCPATH": str(folder), "LC_ALL": made.name}


@pytest.fixture(
    params=[
        "ascii",
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("utf-8", "iso-8859-1")),
    ]
)
def locale(request: pytest.FixtureRequest) -> tuple[str, dict[str, str]]:
    """Encoding of a locale, and its variables."""
    if request.param == "iso-8859-1":
        return request.param, request.getfixturevalue("latin_1")
    if request.param == "utf-8":
        return request.param, {"LC_ALL": "C.UTF-8"}
    return request.param, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def run(folder: Path, variables: dict[str, str], *commands: tuple[bytes | str, ...]) -> list[Ended]:
    kept = {key: value for key, value in os.environ.items() if key != "LANG" and not key.startswith("LC_")}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [[os.fsencode(word).decode("latin-1") for word in command] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, json.dumps(words)],
        cwd=folder,
        env=kept | variables | {"PYTHONPATH": paths},
        capture_output=True,
        check=False,
    )
    said, told = done.stdout.split(b"\0"), done.stderr.split(b"\0")
    assert len(said) == len(commands) + 1, done.stderr.decode(errors="replace")
    lines = [text.rpartition(b"\n") for text in told[:-1]]
    return [Ended(int(code), out, err) for out, (err, _, code) in zip(said[:-1], lines, strict=True)]


VIDEOS, LIST, OUT = b"v\xe9", b"l\xe9.csv", b"out\xe9"


@pytest.fixture
def odd(tmp_path: Path, tiny_bundle_copy: Path) -> Path:
    """A folder in which no name but that of a bundle and a checkpoint is UTF-8."""
    here = os.fsencode(tmp_path)
    os.makedirs(here + b"/v\xe9/d\xe9")
    video = numbered_video(tmp_path / "a.mp4", num_frames=20, size=(64, 48))
    os.rename(video, here + b"/v\xe9/d\xe9/caf\xe9.mp4")
    for name in (b"bad\xe9.mp4", b"note\xe9.txt"):
        Path(os.fsdecode(here + b"/v\xe9/d\xe9/" + name)).write_bytes(b"no video")
    rows = b"path,label\nv\xe9/d\xe9/caf\xe9.mp4,bow\nv\xe9/d\xe9/bad\xe9.mp4,bow\n"
    Path(os.fsdecode(here + b"/" + LIST)).write_bytes(rows)
    make_tiny_checkpoint(tmp_path / "tiny.safetensors")
    for target, link in (
        (tiny_bundle_copy, b"/bundl\xe9"),
        (tmp_path / "tiny.safetensors", b"/tin\xe9.safetensors"),
    ):
        os.symlink(os.fsencode(target), here + link)
    return tmp_path


def test_commands_say_the_names_in_every_locale(odd: Path, locale: tuple[str, dict[str, str]]) -> None:
    encoding, variables = locale
    commands: list[tuple[bytes | str, ...]] = [
        ("ivdr", "predict", "bundle", VIDEOS),
        ("ivdr", "predict", "bundle", VIDEOS, "--json"),
        ("ivdr", "score", "bundle", VIDEOS, "-o", OUT),
        ("ivdr", "score", "bundle", VIDEOS, "-o", OUT, "--json"),
        ("ivdr", "show", OUT),
        ("ivdr", "verify", "bundle", "--videos", LIST),
        ("ivdr", "verify", "bundle", "--videos", LIST, "--json"),
        ("ivdr", "bench", "bundle", "--videos", LIST, "--rounds", "1", "-o", OUT + b".json"),
        ("ivdr", "bench", "bundle", "--videos", LIST, "--rounds", "1", "-o", OUT + b".json", "--json"),
        ("train", "evaluate", "tiny.safetensors", "--protocol", "ten-clip", "--data", LIST, "--json"),
    ]
    ended = run(odd, variables, *commands)
    for words, end in zip(commands, ended, strict=True):
        assert end.code == (0 if words[1] == "show" else 1), (words, end.stderr)
        for text in (end.stdout, end.stderr):
            shown = text.decode("utf-8" if "--json" in words and text is end.stdout else encoding)
            assert "Traceback" not in shown
            said = shown.partition("next: python -c")[0]  # in what follows, Python code, it is right
            assert "\\udc" not in said, words  # spelled by the byte: \xe9
    predicted = {json.loads(line)["uri"] for line in ended[1].stdout.splitlines()}
    assert predicted == {r"v\xe9/d\xe9/caf\xe9.mp4", r"v\xe9/d\xe9/bad\xe9.mp4"}
    for place, name in ((0, rb"v\xe9/d\xe9/caf\xe9.mp4: "), (5, rb"not used: v\xe9/d\xe9/bad\xe9.mp4")):
        assert name in ended[place].stdout + ended[place].stderr
    assert [bad["uri"] for bad in json.loads(ended[6].stdout)["bad_videos"]] == [r"v\xe9/d\xe9/bad\xe9.mp4"]
    assert rb"not timed: v\xe9/d\xe9/bad\xe9.mp4 (unreadable)" in ended[7].stderr
    json.loads(ended[3].stdout), json.loads(ended[8].stdout), json.loads(ended[9].stdout)


def test_what_a_library_cannot_open_is_refused_by_its_name(
    odd: Path, locale: tuple[str, dict[str, str]]
) -> None:
    encoding, variables = locale
    ended = run(
        odd,
        variables,
        ("ivdr", "predict", b"bundl\xe9", VIDEOS),
        ("ivdr", "predict", b"tin\xe9.safetensors", VIDEOS),
        ("ivdr", "verify", b"bundl\xe9", "--videos", LIST),
        ("ivdr", "archive", "bundle", "--model-store", OUT),
        ("ivdr", "serve", OUT + b"/tiny.mar", "--run-dir", "run"),
        ("ivdr", "serve", "bundle", "--run-dir", OUT + b"r"),
    )
    assert [end.code for end in ended] == [5, 5, 5, 0, 2, 2]
    for end in (*ended[:3], *ended[4:]):
        last = end.stderr.decode(encoding).splitlines()[-1]
        assert "is not UTF-8 in this locale" in last, last
        assert "\\udc" not in last
