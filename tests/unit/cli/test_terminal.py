"""What a shell and a terminal see: closed pipes, results beside the progress bar, lines to copy."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from videos import numbered_video

ROOT = Path(__file__).resolve().parents[3]
IVDR = (sys.executable, "-P", "-c", "from ivdr_deploy.cli import main; main()")
TRAIN = (sys.executable, "-m", "train")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("my videos")
    for index in range(3):
        numbered_video(folder / f"{index}.mp4", num_frames=10, size=(64, 48))
    (folder / "bad.mp4").write_bytes(b"no video")
    (folder / "test.csv").write_text("path,label\n0.mp4,bow\n1.mp4,jump\n2.mp4,sit\n")
    return folder


@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout and stderr"])
@pytest.mark.parametrize(
    "words",
    [
        (*IVDR, "--help"),
        (*IVDR, "verify", "--help"),
        (*IVDR, "show", "BUNDLE"),
        (*IVDR, "show", "BUNDLE", "--json"),
        (*IVDR, "predict", "BUNDLE", "VIDEOS"),
        (*IVDR, "predict", "BUNDLE", "VIDEOS", "--json"),
        (*TRAIN, "evaluate", "--help"),
    ],
    ids=lambda words: " ".join(words[2:]).replace(IVDR[3], "ivdr"),
)
def test_a_reader_that_has_gone_is_no_failure_of_an_input(
    words: tuple[str, ...], both: bool, tiny_bundle: Path, videos: Path
) -> None:
    given = [{"BUNDLE": str(tiny_bundle), "VIDEOS": str(videos)}.get(word, word) for word in words]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(
            given, cwd=ROOT, stdout=writing, stderr=writing if both else subprocess.PIPE, check=False
        )
    finally:
        os.close(writing)
    assert ended.returncode in (0, 141)  # 0: it was written before the pipe closed, or argparse let it be
    assert both or b"rror" not in ended.stderr


def in_terminal(*words: str, stdout: Path | None = None) -> str:
    """Run a command with its output, or its stderr alone, on a terminal; return what the terminal got."""
    master, slave = pty.openpty()
    with open(stdout or os.devnull, "wb") as file:
        process = subprocess.Popen(
            words, cwd=ROOT, stdin=slave, stdout=file if stdout else slave, stderr=slave,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "80"},
        )  # fmt: skip
    os.close(slave)
    seen = b""
    try:
        while part := os.read(master, 65536):
            seen += part
    except OSError:  # EIO: nobody holds the other end any more
        pass
    os.close(master)
    process.wait()
    return seen.decode()


def test_results_on_a_terminal_stand_on_lines_of_their_own(tiny_bundle: Path, videos: Path) -> None:
    seen = in_terminal(*IVDR, "predict", str(tiny_bundle), str(videos))
    assert "predict" in seen  # the bar
    starts = re.compile(
        r"(?:[\r\n]|\x1b\[2K)([^\r\n\x1b]*\.mp4): (?:[a-z]+ 0\.\d|error unreadable)[^\r\n]*\r\n"
    )
    assert [Path(name).name for name in starts.findall(seen)] == ["0.mp4", "1.mp4", "2.mp4", "bad.mp4"]


def test_results_go_to_the_file_while_the_bar_is_on_the_terminal(
    tiny_bundle: Path, videos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    seen = in_terminal(*IVDR, "predict", str(tiny_bundle), str(videos), "--json", stdout=out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [Path(line["uri"]).name for line in lines] == ["0.mp4", "1.mp4", "2.mp4", "bad.mp4"]
    assert '"uri"' not in seen


def test_a_pipe_gets_a_value_a_line_and_a_terminal_a_table(ivdr, tiny_bundle: Path) -> None:
    code, stdout, _ = ivdr("show", tiny_bundle)
    lines = stdout.splitlines()
    assert code == 0
    assert [line for line in lines if line != line.rstrip()] == []
    (labels,) = (line for line in lines if line.startswith("labels "))
    assert labels.split(maxsplit=1)[1] == "bow, jump, sit, stand, turn, wave"
    seen = in_terminal(*IVDR, "show", str(tiny_bundle))
    assert re.search(r"^labels +bow, jump, sit, stand, turn, wave *\r$", seen, re.MULTILINE), seen


def test_what_is_next_can_be_copied_whatever_the_names(
    ivdr, tiny_bundle_copy: Path, videos: Path, tmp_path: Path
) -> None:
    bundle, out = tmp_path / "my run" / "b 1", tmp_path / "the scores"
    bundle.parent.mkdir()
    bundle.symlink_to(tiny_bundle_copy)
    listed, store = videos / "test.csv", tmp_path / "my store"
    for words, following in (
        (("show", bundle), ["ivdr", "verify", str(bundle), "--videos", "test.csv"]),
        (("verify", bundle), ["ivdr", "archive", str(bundle)]),
        (
            ("bench", bundle, "--videos", listed, "--rounds", 1, "-o", tmp_path / "r.json"),
            ["ivdr", "show", str(bundle)],
        ),
        (("archive", bundle, "--model-store", store), ["ivdr", "serve", str(store / "tiny.mar")]),
        (("score", bundle, listed, "-o", out), ["python", "-c"]),
    ):
        code, _, stderr = ivdr(*words)
        assert code == 0, stderr
        (line,) = (line for line in stderr.splitlines() if line.startswith("next: "))
        assert shlex.split(line)[1 : 1 + len(following)] == following
    reading = shlex.split(line)[3]
    assert "3 rows" in reading or str(out) in reading
