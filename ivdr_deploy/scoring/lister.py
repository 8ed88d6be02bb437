"""Goes through a list in a thread of its own, and cuts what has no row yet into shards."""

from __future__ import annotations

import pickle
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from itertools import islice

from ivdr_deploy._optional import import_pyarrow
from ivdr_deploy.scoring.index import Index
from ivdr_deploy.scoring.inputs import Input, InputStream
from ivdr_deploy.scoring.shard import Shard, make_shard, shard_videos

_AHEAD_BYTES = 256 << 20
"""Of packed shards that wait to be scored; the listing of a few million inputs ends long before their scoring."""

_LOOK_SECONDS = 0.2
"""How often it is looked whether to stop, while there is no shard."""


class Lister:
    """The shards of a run, while the list is still gone through. A context manager.

    Shards wait packed, 20 to 60 bytes an input, so that the number of inputs is known early and their text is not held.

    Args:
        inputs: The list.
        done: Keys that have a row.
        run_id: Of the run.
        videos_per_shard: Rows per shard; None chooses by the place in the list.
    """

    def __init__(
        self,
        inputs: InputStream,
        done: Collection[str],
        run_id: str,
        *,
        videos_per_shard: int | None = None,
    ) -> None:
        self.index = Index()
        """The inputs so far; the whole list once ``total`` is known."""

        self.pending = 0
        """Inputs without a row, so far."""

        self.total: int | None = None
        """``pending`` when the list has ended."""

        self._inputs, self._done, self._run_id = inputs, done, run_id
        self._size: Callable[[int], int] = (
            shard_videos if videos_per_shard is None else lambda position: videos_per_shard
        )
        self._waiting: deque[tuple[int, bytes]] = deque()
        """Packed shards, each with the bytes it has unpacked."""

        self._bytes = 0
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="list", daemon=True)

    def __enter__(self) -> Lister:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def unscored(self) -> bool:
        """Whether there are shards that nobody asked for, or may be."""
        return self.total is None or bool(self._waiting)

    def shards(self, stopping: Callable[[], bool] = lambda: False) -> Iterator[Shard]:
        """Yield the shards in the order of the list, waiting for the next where it is not there yet.

        Args:
            stopping: When it says so, there are no more.

        Raises:
            DataError: what the list raised, as soon as that is known.
        """
        while True:
            with self._changed:
                while not (self._waiting or self._failure or self.total is not None or stopping()):
                    self._changed.wait(_LOOK_SECONDS)
                if self._failure is not None:
                    raise self._failure
                if not self._waiting or stopping():
                    return
                size, packed = self._waiting.popleft()
                self._bytes -= len(packed)
                self._changed.notify_all()
            unpacked = import_pyarrow().decompress(packed, size, codec="zstd", asbytes=True)
            columns = pickle.loads(unpacked)
            yield make_shard(self._run_id, list(map(Input._make, zip(*columns, strict=True))))

    def _run(self) -> None:
        try:
            gathered: list[Input] = []
            done, inputs, smallest = self._done, iter(self._inputs), self._size(0)
            while found := list(islice(inputs, smallest)):  # a few together: one by one takes a third longer
                if self._stopped:
                    return
                self.index.add(found)
                gathered += [item for item in found if item.key not in done]
                while gathered and len(gathered) >= (size := self._size(gathered[0].position)):
                    self._put(gathered[:size])
                    del gathered[:size]
            if gathered:
                self._put(gathered)
            with self._changed:
                self.total = self.pending
                self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001  # whoever asks for shards gets it
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _put(self, inputs: list[Input]) -> None:
        self.pending += len(inputs)
        plain = pickle.dumps(list(zip(*inputs, strict=True)), protocol=5)  # columns: in half the time of rows
        packed = import_pyarrow().compress(plain, codec="zstd", asbytes=True)
        with self._changed:
            while self._bytes > _AHEAD_BYTES and not self._stopped:
                self._changed.wait()
            self._waiting.append((len(plain), packed))
            self._bytes += len(packed)
            self._changed.notify_all()
