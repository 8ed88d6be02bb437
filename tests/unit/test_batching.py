from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from ivdr_deploy.batching import ClipBatcher
from ivdr_deploy.errors import ClosedError, EngineIncompatibleError, InferenceError, ResourceError

SHAPE = (4, 8, 8, 3)


def clips(*values: int) -> np.ndarray:
    """uint8 (N, 4, 8, 8, 3), every clip of one value."""
    return np.stack([np.full(SHAPE, value, np.uint8) for value in values])


class Network:
    """Answers the value of each clip; holds its first call until released, so that others must gather."""

    def __init__(self, *, held: bool = False) -> None:
        self.calls: list[list[int]] = []
        self.entered, self.released = threading.Event(), threading.Event()
        if not held:
            self.released.set()

    def __call__(self, video: np.ndarray) -> Mapping[str, np.ndarray]:
        values = video[:, 0, 0, 0, 0].astype(np.float32)
        self.calls.append([int(value) for value in values])
        self.entered.set()
        assert self.released.wait(20)
        if 13 in values:
            raise RuntimeError("unlucky \x1b[31m\r" + "x" * 1000)
        if 99 in values:
            raise EngineIncompatibleError("gone")
        return {"logits": np.stack([values, -values], axis=1), "feature": values[:, None] * 2}


def test_a_lone_video_is_not_kept_waiting() -> None:
    network = Network()
    batcher = ClipBatcher(network)
    given = batcher.submit(clips(1, 2)).result(20)
    batcher.close()
    assert given.outputs["logits"].tolist() == [[1, -1], [2, -2]]
    assert given.infer_ms >= 0
    assert given.batch_clips == 2
    assert network.calls == [[1, 2]]


def test_what_gathers_while_the_network_is_busy_goes_together() -> None:
    network = Network(held=True)
    batcher = ClipBatcher(network, max_clips=4)
    futures = [batcher.submit(clips(1))]
    assert network.entered.wait(20)
    futures += [batcher.submit(clips(*values)) for values in ((2,), (3, 4), (5, 6), (7,))]
    network.released.set()
    answers = [future.result(20).outputs["feature"][:, 0].tolist() for future in futures]
    batcher.close()
    assert answers == [[2], [4], [6, 8], [10, 12], [14]]
    assert network.calls == [[1], [2, 3, 4], [5, 6, 7]]  # as many as fit into four clips, in order


def test_what_is_next_passes_what_waits_and_shares_no_call() -> None:
    network = Network(held=True)
    batcher = ClipBatcher(network)
    futures = [batcher.submit(clips(1))]
    assert network.entered.wait(20)
    futures += [batcher.submit(clips(2)), batcher.submit(clips(3)), batcher.submit_next(clips(4))]
    network.released.set()
    for future in futures:
        future.result(20)
    batcher.close()
    assert network.calls == [[1], [4], [2, 3]]


def test_what_is_to_be_one_call_is_joined_by_nobody_and_joins_nobody() -> None:
    """The last digits of a result depend on what else is in a call: a table of scores must not."""
    network = Network(held=True)
    batcher = ClipBatcher(network)
    futures = [batcher.submit(clips(1))]
    assert network.entered.wait(20)
    futures.append(batcher.submit(clips(2)))
    for together in ([clips(3), clips(4)], [clips(5)]):
        futures += batcher.submit_together(together)
    futures += [batcher.submit(clips(6)), batcher.submit(clips(7))]
    network.released.set()
    for future in futures:
        future.result(20)
    batcher.close()
    assert network.calls == [[1], [2], [3, 4], [5], [6, 7]]


def test_the_time_of_a_call_is_shared_out_by_clips() -> None:
    def network(video: np.ndarray) -> Mapping[str, np.ndarray]:
        time.sleep(0.02)
        return {"logits": np.zeros((len(video), 2), np.float32)}

    batcher = ClipBatcher(network)
    one, three = (future.result(20) for future in batcher.submit_together([clips(1), clips(2, 3, 4)]))
    batcher.close()
    assert three.infer_ms == pytest.approx(3 * one.infer_ms)
    assert one.infer_ms + three.infer_ms >= 20
    assert (one.batch_clips, three.batch_clips) == (4, 4)


def test_a_video_with_more_clips_than_a_call_takes_is_cut() -> None:
    network = Network()
    batcher = ClipBatcher(network, max_clips=3)
    given = batcher.submit(clips(*range(1, 9))).result(20)
    batcher.close()
    assert given.outputs["feature"][:, 0].tolist() == [2.0 * value for value in range(1, 9)]
    assert network.calls == [[1, 2, 3], [4, 5, 6], [7, 8]]


def test_a_failing_call_is_run_again_video_by_video(caplog: pytest.LogCaptureFixture) -> None:
    network = Network(held=True)
    batcher = ClipBatcher(network)
    futures = [batcher.submit(clips(1))]
    assert network.entered.wait(20)
    futures += [batcher.submit(clips(value)) for value in (2, 13, 4)]
    network.released.set()
    errors = [future.exception(20) for future in futures]
    batcher.close()
    assert [type(error) for error in errors] == [type(None), type(None), InferenceError, type(None)]
    assert futures[3].result().outputs["feature"].tolist() == [[8.0]]
    assert network.calls == [[1], [2, 13, 4], [2], [13], [4]]
    assert "RuntimeError: unlucky" in str(errors[2])
    assert str(errors[2]).isprintable()
    assert len(str(errors[2])) < 400
    # In the log once, with the place in the program.
    assert [record.message for record in caplog.records if record.exc_info] == ["the network failed"]


def test_errors_of_ours_keep_their_kind() -> None:
    batcher = ClipBatcher(Network())
    with pytest.raises(EngineIncompatibleError):
        batcher.submit(clips(99)).result(20)
    assert batcher.submit(clips(1)).exception(20) is None  # it goes on
    batcher.close()


def test_a_lone_video_runs_in_the_thread_that_waits_for_it() -> None:
    threads = []

    def network(video: np.ndarray) -> Mapping[str, np.ndarray]:
        threads.append(threading.current_thread())
        if video[0, 0, 0, 0, 0] == 13:
            raise RuntimeError("unlucky")
        return {"logits": video[:, 0, 0, 0, :1].astype(np.float32)}

    batcher = ClipBatcher(network)
    assert batcher.run(clips(1, 2)).outputs["logits"].tolist() == [[1], [2]]
    with pytest.raises(InferenceError, match="unlucky"):
        batcher.run(clips(13))
    assert batcher.run(clips(3)).outputs["logits"].tolist() == [[3]]
    assert set(threads) == {threading.current_thread()}
    batcher.close()
    with pytest.raises(ClosedError):
        batcher.run(clips(1))


def test_a_lone_video_takes_its_turn_when_the_network_is_busy() -> None:
    network = Network(held=True)
    batcher = ClipBatcher(network)
    first = batcher.submit(clips(1))
    assert network.entered.wait(20)
    found: list[list[list[float]]] = []
    waiting = threading.Thread(target=lambda: found.append(batcher.run(clips(2)).outputs["feature"].tolist()))
    waiting.start()
    network.released.set()
    waiting.join(20)
    batcher.close()
    assert (first.result(0).outputs["feature"].tolist(), found) == ([[2]], [[[4]]])


def test_closing_finishes_what_was_submitted() -> None:
    network = Network(held=True)
    batcher = ClipBatcher(network)
    futures = [batcher.submit(clips(value)) for value in (1, 2, 3)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    network.released.set()
    closing.join(20)
    assert [future.result(0).outputs["feature"].tolist() for future in futures] == [[[2]], [[4]], [[6]]]
    with pytest.raises(ClosedError):
        batcher.submit(clips(1))
    batcher.close()


def test_a_batcher_that_cannot_start_its_thread_says_so_and_works_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    batcher = ClipBatcher(Network())
    with monkeypatch.context() as short:
        short.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ResourceError, match="thread of the network"):
            batcher.submit(clips(1))
    assert batcher.submit(clips(2)).result(20).outputs["logits"][0, 0] == 2
    batcher.close()


def test_of_two_videos_that_fail_together_the_sound_one_is_answered() -> None:
    batcher = ClipBatcher(Network())
    lucky, unlucky = batcher.submit_together([clips(1), clips(13)])
    assert lucky.result(20).outputs["feature"].tolist() == [[2.0]]
    with pytest.raises(InferenceError):
        unlucky.result(20)
    batcher.close()


HUGE = np.broadcast_to(np.uint8(7), (1, 1, 1 << 23, 1 << 23, 3))
"""A clip of 2^46 pixels, which take no memory until they are copied: two of them go into no address space."""


@pytest.mark.parametrize(
    ("videos", "expected"),
    [
        pytest.param([HUGE, HUGE], [[7], [7]], id="no memory for them together"),
        pytest.param(
            [clips(1), HUGE, clips(2, 3)], [[1], [7], [2, 3]], id="no memory for all of them together"
        ),
        pytest.param([clips(1), clips(2)[:, :, :4]], [[1], [2]], id="frames of two sizes"),
    ],
)
@pytest.mark.parametrize("gathered", [False, True])
def test_clips_that_cannot_be_put_together_are_run_video_by_video(
    videos: list[np.ndarray], expected: list[list[int]], gathered: bool
) -> None:
    network = Network(held=gathered)
    batcher = ClipBatcher(network)
    if gathered:
        batcher.submit(clips(4))
        assert network.entered.wait(20)
        futures = [batcher.submit(video) for video in videos]
        network.released.set()
    else:
        futures = batcher.submit_together(videos)
    assert [future.result(20).outputs["logits"][:, 0].tolist() for future in futures] == expected
    assert batcher.submit(clips(5)).result(20).outputs["logits"][0, 0] == 5  # it goes on
    batcher.close()


@pytest.mark.parametrize("given", [{"logits": np.float32(1)}, {"logits": None}, None])
def test_what_a_network_gives_that_cannot_be_taken_apart_fails_its_videos(given: Any) -> None:
    batcher = ClipBatcher(lambda video: given)
    for future in [*batcher.submit_together([clips(1), clips(2)]), batcher.submit(clips(3))]:
        assert isinstance(future.exception(20), InferenceError)
    assert batcher.submit_together([]) == []
    assert isinstance(batcher.submit(clips(4)).exception(20), InferenceError)  # it goes on
    batcher.close()
