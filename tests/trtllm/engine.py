"""A whole engine under test: its ranks in step, and what a test asks of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from tests.connectors.computation import Text
from tests.connectors.gate import Gate
from tests.trtllm.contract import Manager
from tests.trtllm.executor import Executor, Request, same_everywhere
from tests.trtllm.forms import Form
from tests.trtllm.mpi import World
from tests.trtllm.pool import BLOCK_TOKENS, Windows

PATIENCE_SECONDS = 30.0


def arguments(**changed: Any) -> Any:
    """TensorRT-LLM's arguments, as far as a connector may look."""
    cache = {
        "enable_partial_reuse": False,
        "enable_block_reuse": True,
        "host_cache_size": None,
        "max_attention_window": None,
        "tokens_per_block": BLOCK_TOKENS,
        "dtype": "auto",
    } | changed.pop("cache", {})
    plain = {
        "model": "no/model",
        "dtype": "auto",
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "context_parallel_size": 1,
        "enable_attention_dp": False,
        "max_beam_width": 1,
    } | changed
    return SimpleNamespace(kv_cache_config=SimpleNamespace(**cache), **plain)


class Engine:
    """Ranks that make the same steps. Settings come from the environment, as in real life."""

    def __init__(
        self,
        form: Form,
        environment: dict[str, str],
        ranks: int = 1,
        blocks: int = 64,
        windows: Windows = (None,),
        described: dict[str, Any] | None = None,
        **changed: Any,
    ) -> None:
        self._world = World(ranks)
        self._numbers = itertools.count(1)
        self.ranks: list[Executor] = []
        connector = form.connector
        self._made: list[Any] = []
        self._killed = False

        def begin(rank: int) -> Executor:
            args = arguments(tensor_parallel_size=ranks, **changed)
            worker = connector.DynamoKVBMConnectorWorker(args)
            leader = connector.DynamoKVBMConnectorLeader(args) if rank == 0 else None
            self._made.extend(each for each in (leader, worker) if each is not None)
            executor = Executor(form, Manager(form, worker, leader), rank, blocks, windows)
            executor.manager.register(executor.memory, **(described or {}))
            worker_service = worker._side.worker
            worker_service._mover = Gate(worker_service._mover, executor.memory.scribble)
            return executor

        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            try:
                self.ranks = self._world.on_all(begin)
            except BaseException:
                self.kill()
                raise

    @property
    def leader(self) -> Any:
        """Rank 0's leader."""
        return self.ranks[0].manager.leader

    @property
    def service(self) -> Any:
        """The engine-neutral leader behind it."""
        return self.leader._side.service

    def gate(self, rank: int = 0) -> Gate:
        """In front of the rank's transfers."""
        gate = self.ranks[rank].manager.worker._side.worker._mover
        assert isinstance(gate, Gate)
        return gate

    def submit(self, prompt: Sequence[int], max_new: int = 2, **more: Any) -> int:
        """A client sends a prompt."""
        number = next(self._numbers)
        fields = {"request_id": number, "max_new": max_new, **more}
        self._world.on_all(lambda rank: self.ranks[rank].submit(tokens=list(prompt), **fields))
        return number

    def step(self) -> None:
        """All ranks' loops go round once."""
        self._world.on_all(lambda rank: self.ranks[rank].step())

    def step_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "the engine does not get there"
            self.step()
            time.sleep(0.001)

    def abort(self, number: int) -> None:
        """A client goes away."""
        self._world.on_all(lambda rank: self.ranks[rank].end(self.ranks[rank].requests[number]))

    def pause(self, number: int) -> None:
        """The engine takes this request's blocks away; it begins again in the next step."""
        self._world.on_all(lambda rank: self.ranks[rank].pause(self.ranks[rank].requests[number]))

    def request(self, number: int) -> Request:
        return self.ranks[0].requests[number]

    @property
    def at_rest(self) -> bool:
        """Whether nothing runs, waits, or is copied."""
        idle = not any(rank.active or rank.leaving for rank in self.ranks)
        return idle and not self.service.busy

    def run(self, prompt: Sequence[int], max_new: int = 2, **more: Any) -> Request:
        """A prompt from its arrival until all is quiet. Its answer is checked."""
        number = self.submit(prompt, max_new, **more)
        self.step_until(lambda: self.at_rest)
        tokens = same_everywhere([rank.requests[number].generated for rank in self.ranks])
        request = self.request(number)
        salt, lora = str(request.cache_salt_id), str(request.lora_task_id)
        assert tokens == Text(prompt, salt, lora).generated(max_new)
        return request

    def forget_cached(self) -> None:
        """The device has lost all blocks that nobody uses."""
        self._world.on_all(lambda rank: self.ranks[rank].forget_cached())

    def fail_forward(self) -> None:
        """The next forward pass fails, on all ranks."""
        for rank in self.ranks:
            rank.fail_forward = True
        self.step()
        for rank in self.ranks:
            rank.fail_forward = False

    def close(self) -> None:
        """Look for leaks, then end."""
        try:
            self.step_until(lambda: self.at_rest)
            for rank in self.ranks:
                rank.check_at_rest()
        finally:
            self.kill()

    def kill(self) -> None:
        """End, in whatever state. Once more does nothing."""
        if self._killed:
            return
        self._killed = True
        self._world.on_all(lambda _: None)
        for made in self._made:
            made.shutdown()
        self._world.close()
