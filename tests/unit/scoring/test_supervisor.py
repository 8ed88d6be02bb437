"""Inputs that end the process that scores them, made by what a decode worker does to the process it belongs to."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hostile_sources import KillsTheScorer, SaysWhoDecodes, with_hostile
from score_tables import INPUTS, MANIFEST, PLAN, TIMINGS, row
from videos import numbered_video

from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.errors import ArtifactError, FolderError, ResourceError, VideoCrashError, VideoTimeoutError
from ivdr_deploy.scoring import read_scores
from ivdr_deploy.scoring.attempts import ALONE_ENDS, UNSEEN_ENDS, Attempts, Journal
from ivdr_deploy.scoring.inputs import Input, InputStream, Selection
from ivdr_deploy.scoring.plan import ScoreOptions
from ivdr_deploy.scoring.process import DIED, Worker
from ivdr_deploy.scoring.scorer import RETRIED, ScoreSummary, score_with
from ivdr_deploy.scoring.shard import make_shard
from ivdr_deploy.scoring.store import FolderStore
from ivdr_deploy.scoring.supervisor import Supervisor
from ivdr_deploy.scoring.task import DONE, FLUSH, NEXT, ROW, Opened, Task
from ivdr_deploy.video.reader import VideoLimits

pytestmark = pytest.mark.usefixtures("workers_find_the_tests")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> VideoList:
    folder = tmp_path_factory.mktemp("videos")
    for index in range(6):
        numbered_video(folder / f"{index}.mp4", num_frames=8 + index, size=(64, 48))
    return read_video_list(folder)


class Counting(Supervisor):
    """Counts the workers that were started."""

    started = 1

    def _restart(self) -> None:
        self.started += 1
        super()._restart()


def run(task: Task, videos: VideoList, out: Path, **given: object) -> tuple[ScoreSummary, int]:
    """Score; returns the summary, and how many workers it took."""
    retry, told = given.pop("retry", ()), []
    with Counting(task, **given) as engine:
        summary = score_with(
            engine,
            InputStream(videos, Selection()),
            out,
            videos_per_shard=4,
            retry=retry,
            progress=lambda done, total: told.append(done),
        )
    assert told == [*range(1, summary.scored + 1)], "each input once, however often it was scored"
    return summary, engine.started


def test_an_input_that_kills_its_process_is_one_row_and_its_neighbours_have_theirs(task, videos, tmp_path):
    run(task, videos, tmp_path / "whole")

    summary, started = run(task, with_hostile(videos, 2, KillsTheScorer()), tmp_path / "out")

    assert summary.scored == summary.videos == 6
    rows = read_scores(tmp_path / "out").to_pylist()
    assert [row["error_code"] for row in rows] == [None, None, "crashed", None, None, None]
    assert rows[2]["error_message"] == "'2.mp4': the process that scored it was ended by signal SIGKILL"
    assert started == 3
    whole = read_scores(tmp_path / "whole").to_pylist()
    for place in (0, 1, 3):
        assert rows[place]["labels"] == whole[place]["labels"]
    assert not list((tmp_path / "out").glob("_attempt*"))


@pytest.mark.exhaustive
def test_an_input_on_which_the_engine_hangs_is_one_row_at_its_deadline(task, videos, tmp_path, monkeypatch):
    monkeypatch.setattr("ivdr_deploy.scoring.supervisor.GRACE_SECONDS", 0.0)
    limits = VideoLimits(max_decode_seconds=4.0)
    slow = Task(artifact=task.artifact, variant=task.variant, limits=limits, num_clips=20)

    _, started = run(
        slow,
        with_hostile(videos, 1, KillsTheScorer(number=signal.SIGSTOP)),
        tmp_path / "out",
        infer_seconds=1.0,
    )

    rows = read_scores(tmp_path / "out").to_pylist()
    assert [row["error_code"] for row in rows] == [None, "too_slow", None, None, None, None]
    assert "may depend on the load of the machine" in rows[1]["error_message"]
    assert started == 3


@pytest.mark.exhaustive
def test_a_death_that_does_not_come_again_costs_no_row(task, videos, tmp_path):
    run(task, videos, tmp_path / "whole")
    once = KillsTheScorer(counter=tmp_path / "count", spared=(2, 3), good=videos.items[2].path)

    run(task, with_hostile(videos, 2, once), tmp_path / "out")

    def rows(name: str) -> list[dict]:
        table = read_scores(tmp_path / name).drop_columns([*TIMINGS, "input_key"])
        return table.to_pylist()

    assert rows("out") == rows("whole"), "to the last digit: the shard was scored together in the end"
    assert (tmp_path / "count").stat().st_size == 3


@pytest.mark.exhaustive
def test_inputs_that_end_it_only_together_keep_what_they_gave_alone(task, videos, tmp_path):
    together = KillsTheScorer(counter=tmp_path / "count", spared=(2,), good=videos.items[2].path)

    summary, started = run(task, with_hostile(videos, 2, together), tmp_path / "out")

    assert summary.scored == 6
    assert read_scores(tmp_path / "out")["status"].to_pylist() == ["ok"] * 6
    assert started == 3


@pytest.mark.exhaustive
def test_what_crashed_is_scored_again_when_that_is_asked_for(task, videos, tmp_path):
    moody = KillsTheScorer(counter=tmp_path / "count", spared=(3, 4), good=videos.items[0].path)
    listed = with_hostile(videos, 0, moody)
    assert run(task, listed, tmp_path / "out")[0].errors == {"crashed": 1}
    assert run(task, listed, tmp_path / "out")[0].scored == 0

    summary, _ = run(task, listed, tmp_path / "out", retry=RETRIED)

    assert (summary.scored, summary.ok, summary.errors) == (1, 6, {})
    assert read_scores(tmp_path / "out").num_rows == 6


def test_an_input_that_took_everything_along_twice_is_not_tried_again(task, videos, tmp_path):
    """As where the system ends all processes of a container at once: nobody saw it."""
    listed = with_hostile(videos, 1, KillsTheScorer())  # it would show if it were tried
    out, selected = tmp_path / "out", list(InputStream(listed, Selection()))
    store = FolderStore(out)
    out.mkdir()
    with Supervisor(task) as engine:
        shard = make_shard(engine.plan.run_id, selected[:4])
        known = {"begun": UNSEEN_ENDS, "alone": {selected[1].key: ALONE_ENDS}}
        score_with(engine, InputStream(VideoList(videos.source, videos.items[5:]), Selection()), out)
        (out / f"_attempt-{shard.name[-24:-8]}.json").write_text(json.dumps(known))
        assert Journal(store).read(shard) == Attempts(**known)
        summary = score_with(engine, InputStream(listed, Selection()), out, videos_per_shard=4)

    assert summary.scored == 5, "the last has its row of before"
    rows = read_scores(out).to_pylist()
    assert [row["error_code"] for row in rows] == [None, "crashed", None, None, None, None]
    assert "nobody saw how" in rows[1]["error_message"]
    assert not list(out.glob("_attempt*"))


def test_an_input_in_which_a_run_ended_once_is_tried_again_when_the_others_have_passed(
    task, videos, tmp_path
):
    """Somebody may end runs at any moment; in which input that falls says something only when it is the same again."""
    watched = videos
    for place, item in enumerate(videos.items):
        watched = with_hostile(watched, place, SaysWhoDecodes(log=tmp_path / "log", good=item.path))
    selected = list(InputStream(watched, Selection()))
    store = FolderStore(tmp_path / "out")
    with store.claim(), Supervisor(task) as engine:
        shard, journal = make_shard(engine.plan.run_id, selected), Journal(store)
        for _ in range(UNSEEN_ENDS):
            journal.begin(shard)
        journal.alone(shard, selected[0].key)
        ((_, rows),) = engine.run(iter([shard]), journal=journal, scored=lambda: None)

    assert [row["status"] for row in rows] == ["ok"] * 6
    tried = [line.split()[1] for line in (tmp_path / "log").read_text().splitlines()]
    names = [f"{index}.mp4" for index in range(6)]
    assert tried[:6] == [*names[1:], names[0]]
    assert sorted(tried[6:]) == names


def test_a_shard_in_which_a_worker_died_before_is_tried_one_by_one_at_once(task, videos, tmp_path):
    """The run ended after its worker had: what is known already costs no death again."""
    watched = videos
    for place, item in enumerate(videos.items):
        watched = with_hostile(watched, place, SaysWhoDecodes(log=tmp_path / "log", good=item.path))
    store = FolderStore(tmp_path / "out")
    with store.claim(), Supervisor(task) as engine:
        shard, journal = make_shard(engine.plan.run_id, [*InputStream(watched, Selection())]), Journal(store)
        journal.died(shard, "signal 9")
        ((_, rows),) = engine.run(iter([shard]), journal=journal, scored=lambda: None)

    assert [row["status"] for row in rows] == ["ok"] * 6
    assert len((tmp_path / "log").read_text().splitlines()) == 12, "each alone, then all together"


def test_workers_that_die_without_work_end_the_run(task, tmp_path, monkeypatch):
    """No input is to blame, and a run must not start processes for ever."""
    deaths = []
    with Supervisor(task) as engine:
        monkeypatch.setattr(engine, "_restart", lambda: deaths.append(1))
        journal = Journal(FolderStore(tmp_path))
        for _ in range(3):
            engine._died(journal, VideoCrashError("killed"))
        with pytest.raises(ResourceError, match="killed, again and again, and nothing was being scored"):
            engine._died(journal, VideoCrashError("killed"))
    assert len(deaths) == 3


class DiesOfSeveral:
    """Speaks as a worker does that scores one input, and that two in one call end; in this process."""

    started = 0

    def __init__(self, task: Task) -> None:
        type(self).started += 1
        assert self.started < 5, "it would be started for ever"
        self.opened, self.pid = Opened(PLAN, MANIFEST, 1), 0
        self._says, self._given = deque([(NEXT,)]), list[tuple[str, Input]]()

    def receive(self, seconds: float) -> tuple:
        return self._says.popleft()

    def tell(self, what: tuple | None) -> None:
        if what is not FLUSH:
            self._given += [(what[0], item) for item in what[1]]
            self._says.append((NEXT,))
        elif len(self._given) > 1:
            self._says.append((DIED, VideoCrashError("killed")))
        elif self._given:
            ((name, item),) = self._given
            self._says += [(ROW, name, item.key, row(item.position)), (DONE,), (NEXT,)]
            self._given = []

    def close(self) -> None:
        pass


def test_inputs_that_only_together_end_the_worker_end_it_twice_and_no_more(tmp_path, monkeypatch):
    """The rows that they had alone are taken then: another try would end as the two before."""
    monkeypatch.setattr("ivdr_deploy.scoring.supervisor.Worker", DiesOfSeveral)
    monkeypatch.setattr(DiesOfSeveral, "started", 0)
    shard, journal = make_shard(PLAN.run_id, INPUTS[:3]), Journal(FolderStore(tmp_path))
    with Supervisor(Task(artifact=tmp_path)) as engine:
        ((_, rows),) = engine.run(iter([shard]), journal=journal, scored=lambda: None)
    assert rows == [row(0), row(1), row(2)]
    assert DiesOfSeveral.started == 3
    assert journal.read(shard).deaths == ("killed",)


def test_a_worker_that_is_silent_is_killed_when_its_time_is_up(task):
    """Stopped, it neither answers nor dies, as one whose engine hangs."""
    worker = Worker(task)
    late = threading.Timer(30, os.kill, [worker.pid, signal.SIGKILL])  # else this would wait for ever
    try:
        assert worker.receive(60) == (NEXT,)
        os.kill(worker.pid, signal.SIGSTOP)
        late.start()
        said, error = worker.receive(0.25)
        assert (said, type(error)) == (DIED, VideoTimeoutError)
        assert "did not answer within 0.25 s and was killed" in error.message
        assert psutil.Process(worker.pid).wait(30) == -signal.SIGKILL
    finally:
        late.cancel()
        worker.close()


def test_the_journal_tells_seen_deaths_from_others(tmp_path):
    items = [Input(i, f"{i}", None, f"v{i}", f"k{i}", f"/{i}") for i in range(2)]
    shard, store = make_shard("run", items), FolderStore(tmp_path)
    for begun in range(3):
        assert Journal(store).begin(shard) == Attempts(begun=begun)
    assert [Journal(store).alone(shard, "k1") for _ in range(3)] == [0, 1, 2]
    assert Journal(store).alone(shard, "k0") == 0
    journal = Journal(store)
    assert journal.alone(shard, "k0") == 1
    journal.answered(shard, "k0")
    assert journal.read(shard).alone == {"k1": 3}
    journal.died(shard, "signal 9")
    assert journal.read(shard) == Attempts(begun=3, deaths=("signal 9",))
    for text in ("", "[]", '{"begun": "x"}', '{"gebun": 1}'):
        next(tmp_path.glob("_attempt*")).write_text(text)
        assert Journal(store).read(shard) == Attempts()
    journal.forget(shard)
    assert not list(tmp_path.iterdir())
    Journal(store).begin(shard)
    journal.clear()
    assert not list(tmp_path.iterdir()), "also what another process noted"


def test_what_keeps_the_worker_from_starting_is_raised_as_it_is(task, tmp_path):
    with pytest.raises(ArtifactError, match="has no variant 'absent'"):
        Supervisor(Task(artifact=task.artifact, variant="absent"))


@pytest.fixture
def engine(task: Task) -> Iterator[Supervisor]:
    with Supervisor(task) as engine:
        yield engine


def test_no_process_is_left_behind(engine, videos, tmp_path):
    score_with(engine, InputStream(videos, Selection()), tmp_path / "out")
    worker = psutil.Process(engine.pid)
    started = [worker, *worker.children(recursive=True)]
    assert len(started) > 1

    engine.close()

    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive


def test_a_kill_has_one_shard_to_lose_at_most(task: Task, videos: VideoList, tmp_path: Path) -> None:
    """While a shard is being committed the next ones are decoded, and no row of them is there or in the journal."""
    store, scored = FolderStore(tmp_path), 0

    def count() -> None:
        nonlocal scored
        scored += 1

    with Supervisor(task) as engine:
        inputs = [*InputStream(videos, Selection())]
        shards = [make_shard(engine.plan.run_id, [item]) for item in inputs]
        journal = Journal(store)
        for done, (shard, rows) in enumerate(
            engine.run(iter(shards), journal=journal, scored=count), start=1
        ):
            begun = [path.name for path in tmp_path.glob("_attempt-*")]
            assert (len(rows), scored, len(begun)) == (1, done, 1)
            journal.forget(shard)
    assert scored == len(inputs)


def test_rows_of_a_model_that_was_exchanged_meanwhile_do_not_come_into_the_table(
    task: Task, videos: VideoList, tmp_path: Path
) -> None:
    """A worker that takes the place of one that died opens what is there now."""
    with Supervisor(task) as engine:
        other = replace(task, options=ScoreOptions(top_k=1))  # opens to another plan, as another bundle does
        engine._task = other
        listed = with_hostile(videos, 2, KillsTheScorer())
        with pytest.raises(FolderError, match=r"was changed while it was scored with \(top_k: 5, not 1\)"):
            score_with(engine, InputStream(listed, Selection()), tmp_path / "out", videos_per_shard=4)
