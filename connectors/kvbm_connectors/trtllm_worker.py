"""The worker's half of the TensorRT-LLM connector: one rank's KV pool in, copies and reads done.

Each step of the engine ends in `finished`, on all ranks at once. There they tell each other what
is done: so the leader, on rank 0, hears of the others with no bus, and a load that failed on one
rank is known to all before any of them goes on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from kvbm_connectors.trtllm_layout import Identity, Pool
from kvbm_connectors.trtllm_leader import LeaderSide
from kvbm_connectors.trtllm_step import Commands, Ready, Report
from kvbm_schemas.step import LoadResult, Moved, Save, StepCommands, StepResults
from kvbm_service.errors import KvbmError, LayoutError, TransferError
from kvbm_service.network import over_nats
from kvbm_service.settings import Settings
from kvbm_service.worker_service import RankId, WorkerService

if TYPE_CHECKING:
    from kvbm_connectors.trtllm_interface import Ranks

LINGER_SECONDS = 0.05
"""How long the last step before the engine rests waits for saves at most."""
POLL_SECONDS = 0.0005
NOT_COMPUTED = "the forward pass that was to compute it did not end"


class WorkerSide:
    """One rank. All calls come from the thread that runs the engine."""

    def __init__(self, settings: Settings, ranks: Ranks) -> None:
        self._settings = settings
        self._ranks = ranks
        self._leader: LeaderSide | None = None
        self._worker: WorkerService | None = None
        self._saves: StepCommands | None = None
        """Of this step, to be begun when its forward pass is under way."""
        self._undone: list[Save] = []
        """Saves of blocks that were never computed."""
        self._begun: set[int] = set()
        """Ops of saves under way."""
        self._leaving: set[int] = set()
        """Requests that have ended, and whose blocks are still in use."""
        self._waiting: set[int] = set()
        """Requests that wait for their loads."""
        self._loaded: set[int] = set()
        """Requests whose loads have ended here, or of which there is nothing to load."""
        self._loading: dict[int, int] = {}
        """By request: ranks on which its load is under way. The same on all ranks."""
        self._aborted: set[int] = set()
        """Those of them that nobody waits for any more."""
        self._unserved: tuple[str, ...] = ()
        self._collected: tuple[StepResults, ...] = ()
        """What was finished before the step's end, where all ranks tell each other."""

    def open(self, pool: Pool, identity: Identity, weights: str, leader: LeaderSide | None) -> None:
        """The engine has a KV pool: allocate the tiers that go with it.

        Raises:
            LayoutError: on all ranks, when one has failed.
        """
        assert self._worker is None, "the KV pool was registered twice"
        self._leader = leader
        ready = self._ranks.gather(self._start(pool, identity, weights))
        if errors := [f"rank {number}: {r.error}" for number, r in enumerate(ready) if r.error]:
            raise LayoutError("; ".join(errors))
        if leader is not None:
            leader.meet(ready)

    def _start(self, pool: Pool, identity: Identity, weights: str) -> Ready:
        from kvbm_service.host_worker import start_worker

        number = self._ranks.number
        scope, node, instance = identity
        rank = RankId(scope, node, number, self._ranks.count, instance, weights)
        connect = over_nats(self._settings, f"kvbm worker {node} rank {number}", node)
        try:
            self._worker = start_worker(
                self._settings, rank, pool.regions, pool.blocks, connect, pool.groups
            )
        except KvbmError as error:
            if self._ranks.count == 1:
                raise
            return Ready(error=str(error))  # the others must not wait for this rank for ever
        return Ready(self._worker.record, self._worker.survivors)

    @property
    def worker(self) -> WorkerService:
        """The worker; there once the engine has a KV pool."""
        assert self._worker is not None, "TensorRT-LLM runs without a KV pool"
        return self._worker

    def start_loads(self, step: Commands) -> None:
        """Begin to fill blocks of waiting requests."""
        self._loaded.update(step.nothing_to_load)
        if step.saves_first:
            self._finish_saves()
        commands = step.commands
        self.worker.submit(msgspec.structs.replace(commands, saves=()))
        if commands.saves:
            self._saves = StepCommands(saves=commands.saves, meant=commands.meant)

    def _finish_saves(self) -> None:
        """Wait: what is being saved is about to be overwritten. A copy always comes to an end."""
        while self._begun:
            collected = self._collect()
            self._collected += collected
            if not collected:
                time.sleep(POLL_SECONDS)

    def start_saves(self) -> None:
        """The forward pass is under way or done: copy the blocks it fills, after it."""
        if self._saves is not None:
            self.worker.submit(self._saves)
            self._begun.update(save.op for save in self._saves.saves)
            self._saves = None

    def _give_up_saves(self) -> None:
        """What the forward pass was to fill holds nothing: say so, and never copy it."""
        if self._saves is not None:
            self._undone.extend(self._saves.saves)
            self._saves = None

    def finished(self, ended: Sequence[int], loading: Sequence[int]) -> tuple[list[int], list[int]]:
        """The requests whose saves, and whose loads, are done. Ends a step, on all ranks at once.

        `ended` and `loading` begin to wait for that.

        Raises:
            TransferError: on all ranks. A block did not arrive, and TensorRT-LLM has no way to be
                told to compute it: the engine must not go on.
        """
        self._give_up_saves()
        self._await(ended, loading)
        own, reports = self._exchange()
        self._note_loads(own, reports)
        if self._leader is None:
            left = set(self._leaving)  # the leader's rank says when, as it knows of all ranks
        else:
            results = [each for report in reports for each in report.results]
            self._unserved = self._leader.reported(results)
            left = {number for number in self._leaving if not self._leader.uses_blocks_of(number)}
        self._leaving -= left
        loaded = self._loaded & self._waiting
        self._loaded -= loaded
        self._waiting -= loaded
        return sorted(left), sorted(loaded)

    def _await(self, ended: Sequence[int], loading: Sequence[int]) -> None:
        self._waiting.update(loading)
        begun = (number for number in loading if number not in self._loaded)
        self._loading.update(dict.fromkeys(begun, self._ranks.count))
        self._leaving.update(ended)
        self._aborted.update(number for number in ended if number in self._loading)

    def _exchange(self) -> tuple[Report, list[Report]]:
        """What this rank has finished, and what all have.

        TensorRT-LLM does not step while it has no request. So that others need not wait for the
        next one to see the blocks of the last, its last step stays until they are saved.
        """
        last = self._leader is not None and self._leader.nothing_but_saves
        early, self._collected = self._collected, ()
        own = Report(early + self._collect(), self._unserved, last)
        reports = self._ranks.gather(own)
        if reports[0].last:
            late = Report(self._collect_saves())
            reports += self._ranks.gather(late)
            own = Report(own.results + late.results)
        return own, reports

    def _note_loads(self, own: Report, reports: Sequence[Report]) -> None:
        """Which loads have ended, here and elsewhere.

        Raises:
            TransferError: with some block missing that somebody waits for.
        """
        for report in reports:
            _refuse_unserved(report)
            for load in (load for results in report.results for load in results.loads):
                number = int(load.request)
                if load.failed_blocks and number not in self._aborted:
                    raise _not_arrived(load)
                self._loading[number] -= 1
                if not self._loading[number]:
                    del self._loading[number]
                    self._aborted.discard(number)
        loads = (load for results in own.results for load in results.loads)
        self._loaded.update(int(load.request) for load in loads)

    def _collect(self) -> tuple[StepResults, ...]:
        """What this rank has finished, and what it never will."""
        results = self.worker.collect()
        undone = tuple(_not_computed(save) for save in self._undone)
        self._undone = []
        if results is None and not undone:
            return ()
        results = results or StepResults(rank=self._ranks.number)
        self._begun.difference_update(moved.op for moved in results.moved)
        return (msgspec.structs.replace(results, moved=results.moved + undone),)

    def _collect_saves(self) -> tuple[StepResults, ...]:
        """What this rank has finished once all its saves are, or that takes too long."""
        collected: tuple[StepResults, ...] = ()
        deadline = time.monotonic() + LINGER_SECONDS
        while self._begun and time.monotonic() < deadline:
            if results := self._collect():
                collected += results
            else:
                time.sleep(POLL_SECONDS)
        return collected

    def close(self) -> None:
        """The engine ends."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _not_computed(save: Save) -> Moved:
    positions = np.arange(len(save.slots) // 4, dtype="<u4")
    return Moved(op=save.op, failed=positions.tobytes(), reason=NOT_COMPUTED)


def _not_arrived(load: LoadResult) -> TransferError:
    return TransferError(
        f"request {load.request}: {len(load.failed_blocks) // 4} block(s) that were promised to it "
        f"did not arrive ({load.reason}); TensorRT-LLM cannot be told to compute them, so this "
        "engine ends rather than answer from wrong bytes"
    )


def _refuse_unserved(report: Report) -> None:
    for request in report.unserved:
        raise TransferError(
            f"request {request}: a rank that held blocks promised to it is gone; this engine ends "
            "rather than answer from wrong bytes"
        )
