"""MPI among threads: each is a rank, and what one sends the others is pickled as MPI would."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PATIENCE_SECONDS = 30.0
"""A rank that waits so long for another hangs: the others did not make the same call."""

_here = threading.local()


class World:
    """The ranks of one engine, each on a thread of its own."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=PATIENCE_SECONDS)
        self._said: list[tuple[str, bytes]] = [("", b"")] * size
        self._threads = [
            ThreadPoolExecutor(1, f"rank-{rank}", initializer=self._begin, initargs=(rank,))
            for rank in range(size)
        ]

    def _begin(self, rank: int) -> None:
        _here.world, _here.rank = self, rank

    def on_all(self, call: Callable[[int], Any]) -> list[Any]:
        """`call(rank)` on each rank's thread at once. All must end before the first error tells."""
        futures = [thread.submit(call, rank) for rank, thread in enumerate(self._threads)]
        errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error
        return [future.result() for future in futures]

    def exchange(self, rank: int, what: str, own: Any) -> list[Any]:
        """All ranks' objects, if all make this call."""
        self._said[rank] = (what, pickle.dumps(own))
        self._barrier.wait()
        said = list(self._said)
        self._barrier.wait()
        assert {call for call, _ in said} == {what}, "the ranks make different calls"
        return [pickle.loads(pickled) for _, pickled in said]

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown()


def mpi_rank() -> int:
    return int(_here.rank)


def mpi_world_size() -> int:
    return int(_here.world.size)


def mpi_allgather(obj: Any) -> list[Any]:
    return list(_here.world.exchange(_here.rank, "allgather", obj))


def mpi_broadcast(obj: Any, root: int = 0) -> Any:
    return _here.world.exchange(_here.rank, "broadcast", obj)[root]
