from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ivdr_deploy import _files
from ivdr_deploy._files import atomic_directory, atomic_path, sha256_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_only_when_the_block_ends_well(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(target.parent) == ["a.txt"]


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fail() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def replace_folder(target: Path, name: str) -> None:
    with atomic_directory(target) as temporary:
        (temporary / name).touch()


@pytest.fixture(params=["exchange", "rename"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a folder: in one step, and where the system cannot do that."""
    if request.param == "rename":
        monkeypatch.setattr(_files, "_exchange", lambda *paths: False)
    elif sys.platform != "linux":
        pytest.skip("two folders change places in one step on Linux only")
    return str(request.param)


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, swap: str) -> None:
    target = tmp_path / "bundle"
    replace_folder(target, "first")
    replace_folder(target, "second")
    assert names(target) == ["second"]

    def fail() -> None:
        with atomic_directory(target) as temporary:
            (temporary / "third").touch()
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert names(target) == ["second"]
    assert names(tmp_path) == ["bundle"]


def test_an_empty_folder_is_replaced_and_a_file_is_not(tmp_path: Path, swap: str) -> None:
    (tmp_path / "empty").mkdir()
    replace_folder(tmp_path / "empty", "new")
    assert names(tmp_path / "empty") == ["new"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError):
        replace_folder(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "mine"
    assert names(tmp_path) == ["empty", "file"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path, swap: str) -> None:
    replace_folder(tmp_path / "v1", "first")
    (tmp_path / "current").symlink_to("v1")
    replace_folder(tmp_path / "current", "second")
    assert (tmp_path / "current").is_symlink()
    assert names(tmp_path / "v1") == ["second"]
    assert names(tmp_path) == ["current", "v1"]


def test_when_the_second_rename_fails_the_old_folder_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no exchange, two renames are needed, and the second one may fail."""
    target = tmp_path / "bundle"
    replace_folder(target, "old")
    monkeypatch.setattr(_files, "_exchange", lambda *paths: False)
    calls = []

    def rename(self: Path, to: Path) -> None:
        calls.append(to)
        if len(calls) == 3:  # after the try for a free name, and the old folder's own
            raise OSError("no space left")
        os.rename(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="no space left"):
        replace_folder(target, "new")
    monkeypatch.undo()
    assert len(calls) == 4
    assert names(target) == ["old"]
    assert names(tmp_path) == ["bundle"]


@pytest.mark.skipif(sys.platform != "linux", reason="two folders change places in one step on Linux only")
def test_the_name_is_never_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step of the replacement takes the old folder away before the new one is there."""
    target = tmp_path / "bundle"
    replace_folder(target, "old")
    renamed = []

    def rename(self: Path, to: Path) -> None:
        renamed.append(self)
        os.rename(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    replace_folder(target, "new")
    assert target not in renamed
    assert names(target) == ["new"]


KILLED = """
import os, signal, sys
from pathlib import Path
from ivdr_deploy import _files

target, moment = Path(sys.argv[1]), sys.argv[2]

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def die_after(function):
    def both(*arguments):
        function(*arguments)
        die()
    return both

if moment == "before":
    _files._put_in_place = die
elif moment == "between":
    _files._exchange = die
elif moment == "after":
    _files._exchange = die_after(_files._exchange)
elif moment == "while the old one is removed":
    rmtree = _files.shutil.rmtree
    def some(path, **options):
        next(iter(Path(path).iterdir())).unlink()
        die()
    _files.shutil.rmtree = some
with _files.atomic_directory(target) as temporary:
    for name in "abc":
        (temporary / name).write_text("new")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="two folders change places in one step on Linux only")
@pytest.mark.parametrize(
    ("moment", "left"),
    [("before", "old"), ("between", "old"), ("after", "new"), ("while the old one is removed", "new")],
)
def test_a_kill_leaves_the_old_folder_or_the_new_one(tmp_path: Path, moment: str, left: str) -> None:
    target = tmp_path / "bundle"
    with atomic_directory(target) as temporary:
        for name in "abc":
            (temporary / name).write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), moment], check=False)
    assert done.returncode == -signal.SIGKILL
    assert {path.name: path.read_text() for path in target.iterdir()} == dict.fromkeys("abc", left)
    with atomic_directory(target) as temporary:  # what is left over is in nobody's way
        (temporary / "d").touch()
    assert names(target) == ["d"]


def test_threads_at_once_leave_one_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        for _ in range(25):
            with atomic_directory(target) as temporary:
                for name in "ab":
                    (temporary / name).write_text(str(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert names(tmp_path) == ["bundle"]
    first, second = ((target / name).read_text() for name in "ab")
    assert first == second


def test_threads_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        for _ in range(25):
            with atomic_path(target) as temporary:
                temporary.write_text(str(number) * 1000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert target.read_text() in {str(number) * 1000 for number in range(4)}
    assert names(tmp_path) == ["a.txt"]


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
