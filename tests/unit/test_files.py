from __future__ import annotations

import errno
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
from ivdr_deploy._files import atomic_directory, atomic_path, remove_left_over, sha256_file


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


def test_a_folder_is_flushed_with_all_that_is_in_it_before_it_appears(
    tmp_path: Path, swap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = set()
    target, flush = tmp_path / "bundle", os.fsync

    def noted(descriptor: int) -> None:
        if not (target / "new").exists():
            flushed.add(os.fstat(descriptor).st_ino)
        flush(descriptor)

    replace_folder(target, "first")
    monkeypatch.setattr(os, "fsync", noted)
    with atomic_directory(target) as temporary:
        (temporary / "new").write_text("new")
        (temporary / "deep" / "er").mkdir(parents=True)
        (temporary / "deep" / "er" / "file").write_text("file")
        (temporary / "link").symlink_to("nowhere")
    found = [path for path in (target, *target.rglob("*")) if not path.is_symlink()]
    assert len(found) == 5
    assert {path.stat().st_ino for path in found} <= flushed


@pytest.mark.parametrize("write", [atomic_path, atomic_directory])
def test_what_is_new_is_flushed_before_it_has_its_name_and_the_folder_around_it_after(  # type: ignore[no-untyped-def]
    tmp_path: Path, swap: str, write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a machine that loses its power may keep the new name without the content, or neither of the two."""
    target, flush = tmp_path / "it", os.fsync
    replace_folder(target, "old") if write is atomic_directory else target.write_text("old")
    flushed = []

    def noted(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_ino, target.stat().st_ino))
        flush(descriptor)

    old = target.stat().st_ino
    with write(target) as temporary:
        if write is atomic_path:
            temporary.write_text("new")
        new = temporary.stat().st_ino
        monkeypatch.setattr(os, "fsync", noted)
    assert flushed == [(new, old), (tmp_path.stat().st_ino, new)]


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


HELD = """
import sys
from pathlib import Path
from ivdr_deploy._files import atomic_directory, atomic_path
with (atomic_path if sys.argv[2] == "file" else atomic_directory)(Path(sys.argv[1])) as temporary:
    print("begun", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_killed_runs_left_over_goes_and_what_is_in_use_stays(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "it"
    (tmp_path / ".other.0123456789abcdef.tmp").mkdir()  # of another target
    (tmp_path / ".it.swp").touch()  # nobody's business
    killed, alive = (
        subprocess.Popen(
            [sys.executable, "-c", HELD, str(target), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    )
    for process in (killed, alive):
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
    assert len(names(tmp_path)) == 4
    killed.kill()
    killed.communicate()
    if kind == "file":
        with atomic_path(target) as temporary:
            temporary.write_text("new")
    else:
        replace_folder(target, "new")
    assert [name for name in names(tmp_path) if name.startswith(".it.") and name.endswith(".tmp")] != []
    assert len(names(tmp_path)) == 4  # the other target's, the file, the live one's, and the result
    alive.kill()
    alive.communicate()
    remove_left_over(tmp_path)
    assert names(tmp_path) == [".it.swp", "it"]


def test_a_kill_between_two_renames_is_mended_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two folders cannot change places, the old one is all there is for a moment."""
    target = tmp_path / "bundle"
    replace_folder(target, "old")
    target.rename(tmp_path / ".bundle.0123456789abcdef.old")
    monkeypatch.setattr(_files, "_exchange", lambda *paths: False)

    def fail() -> None:
        with atomic_directory(target):
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert names(target) == ["old"]
    assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_file_has_the_mode_that_the_umask_says(tmp_path: Path, umask: int) -> None:
    """Whatever the writer makes of it."""
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "a") as temporary:
            temporary.touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask


def full(path: Path) -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.mark.parametrize("write", [atomic_path, atomic_directory])
def test_a_full_disk_names_the_folder_that_is_full(tmp_path: Path, write) -> None:  # type: ignore[no-untyped-def]
    target, elsewhere = tmp_path / "out" / "it", tmp_path / "elsewhere"

    def fail(make) -> OSError:  # type: ignore[no-untyped-def]
        with pytest.raises(OSError, match="No space left") as caught, write(target) as temporary:
            raise make(temporary)
        return caught.value

    nameless = fail(lambda temporary: OSError(errno.ENOSPC, "No space left on device"))  # of a failed write
    inside = fail(lambda temporary: full(temporary / "file"))
    copied = fail(
        lambda temporary: OSError(
            errno.ENOSPC, "No space left on device", str(elsewhere), None, str(temporary / "a")
        )
    )
    for error in (nameless, inside, copied):
        assert (error.errno, error.filename) == (errno.ENOSPC, str(tmp_path / "out"))
    assert fail(lambda temporary: full(elsewhere)).filename == str(elsewhere)
    assert names(tmp_path / "out") == []
