"""The process that decodes and runs the network for a scoring run: what kills it is a matter of one input.

Started by ``supervisor`` as ``python -P -m ivdr_deploy.scoring.worker CHANNEL LIFE``. It asks for groups of inputs, and
answers with one row for each, in order. After the last of a group it waits for leave to begin the next.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection

from ivdr_deploy.decoding import end_with
from ivdr_deploy.environment import let_threads_sleep
from ivdr_deploy.errors import IvdrError
from ivdr_deploy.scoring.stage import Group, score_groups
from ivdr_deploy.scoring.task import DONE, FAILED, FLUSH, NEXT, READY, ROW, Opened, Task, open_predictor


def serve(task: Task, channel: Connection) -> None:
    """Open the model, and score what comes through the channel until it is closed."""
    with open_predictor(task) as scorer:
        channel.send((READY, Opened(scorer.plan, scorer.manifest, scorer.call_videos)))
        while True:
            for name, item, row, last in score_groups(scorer.predictor, _asked_for(channel), scorer.plan):
                channel.send((ROW, name, item.key, row))
                if last:
                    channel.send((DONE,))
                    channel.recv()  # the shard is committed


def _asked_for(channel: Connection) -> Iterator[Group]:
    while True:
        channel.send((NEXT,))
        group = channel.recv()
        if group is FLUSH:
            return
        yield group


def main() -> None:
    """Run what the supervisor sends first."""
    channel_fd, life_fd = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides what Ctrl-C means
    end_with(life_fd)
    let_threads_sleep()
    channel = Connection(channel_fd)
    try:
        serve(channel.recv(), channel)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the supervisor is done
    except (IvdrError, OSError) as error:
        answer: BaseException = error
    except Exception as error:  # noqa: BLE001  # a defect; the supervisor shows where
        answer = RuntimeError(f"the scoring process failed:\n{''.join(traceback.format_exception(error))}")
    with suppress(BrokenPipeError, ConnectionResetError):
        channel.send((FAILED, answer))


if __name__ == "__main__":
    main()
