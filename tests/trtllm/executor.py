"""A stand-in for TensorRT-LLM's executor: one rank's loop, in the published order of calls.

A step: requests are scheduled; new ones get blocks (match, allocate); the leader builds the step's
metadata; loads begin; requests that wait for one are parked; the others run through the layers;
saves begin; what has ended is finished; and the connector is asked what is done.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.connectors.computation import VOCABULARY, Text
from tests.trtllm.contract import Manager
from tests.trtllm.forms import Form
from tests.trtllm.pool import (
    BLOCK_TOKENS,
    LAYERS,
    NO_PAGE,
    Blocks,
    KvMemory,
    Prefix,
    Windows,
)

MAX_BATCH_TOKENS = 24
"""Prompts longer than this are computed in chunks."""


class State(enum.Enum):
    NEW = enum.auto()
    PARKED = enum.auto()
    CONTEXT = enum.auto()
    GENERATION = enum.auto()
    DONE = enum.auto()


@dataclass
class Request:
    """One rank's copy of a request: what connectors may read, and what the executor knows."""

    request_id: int
    tokens: list[int]
    max_new: int
    cache_salt_id: int | None = None
    lora_task_id: int | None = None
    multimodal_hashes: list[list[int]] | None = None
    priority: int | None = None
    state: State = State.NEW
    tables: list[list[int]] = field(default_factory=list)
    """By group of layers."""
    computed: int = 0
    matched: int = 0
    reused: int = 0
    told_tokens: int = 0
    told_blocks: int = 0
    failed: bool = False

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)
        self.text = Text(self.tokens, str(self.cache_salt_id), str(self.lora_task_id))

    def get_tokens(self, beam: int) -> list[int]:
        assert beam == 0
        return list(self.tokens)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    def prefixes(self, length: int) -> list[Prefix]:
        owner = (self.cache_salt_id, self.lora_task_id)
        return [
            (owner, *self.tokens[: (block + 1) * BLOCK_TOKENS])
            for block in range(length // BLOCK_TOKENS)
        ]


class Executor:
    """One rank. Every call comes from its own thread."""

    def __init__(
        self, form: Form, manager: Manager, rank: int, blocks: int, windows: Windows = (None,)
    ) -> None:
        self.manager = manager
        self.memory = KvMemory(blocks, rank, windows)
        self.pools = [Blocks(count) for count in self.memory.counts]
        self.requests: dict[int, Request] = {}
        self.leaving: set[int] = set()
        """Requests that have ended, and whose blocks stay."""
        self.fail_forward = False
        self._taken: list[tuple[int, list[int]]] = []
        """By group, blocks that the coming step may write to."""
        self.reserve_blocks: int | None = None
        """So many blocks, and no more, are told of when a request is allocated."""
        self._form = form

    def submit(self, **request: Any) -> None:
        made = Request(**request)
        self.requests[made.request_id] = made

    @property
    def active(self) -> list[Request]:
        return [r for r in self.requests.values() if r.state is not State.DONE]

    def step(self) -> None:
        batch = [r for r in self.active if r.state is not State.PARKED]
        if batch:
            for request in batch:
                if request.state is not State.NEW:
                    self._pass_windows(request)
            for request in batch:
                if request.state is State.NEW:
                    self._add(request)
            running = [r for r in batch if r.state is not State.PARKED]
            chunks = {r.request_id: self._chunk(r) for r in running}
            self.manager.output = self._output(running, chunks)
            self.manager.start()
            for group, blocks in self._taken:
                self.memory.scribble_in(group, blocks)
            self._taken.clear()
            if running:
                self._forward(running, chunks)
        self._take_finished()

    def _add(self, request: Request) -> None:
        reusable = request.prefixes(len(request.tokens) - 1)
        found = [pool.find(reusable) for pool in self.pools]
        blocks = min(map(len, found))
        request.reused = blocks * BLOCK_TOKENS
        request.matched = self.manager.matched(request, request.reused)
        honoured = request.matched
        if self.reserve_blocks is not None:
            room = self.reserve_blocks * BLOCK_TOKENS - request.reused
            honoured = min(honoured, max(0, room))
        request.computed = request.reused + honoured
        end = -(-(request.prompt_len + request.max_new) // BLOCK_TOKENS)
        request.tables, taken = [], []
        for group, pool in enumerate(self.pools):
            needed = min(self.memory.needed(group, request.computed), end)
            kept = found[group][needed:blocks]
            pool.use(kept)
            fresh = pool.take(end - needed - len(kept))
            taken.append((group, fresh))
            request.tables.append([NO_PAGE] * needed + kept + fresh)
        told = [table[: self.reserve_blocks] for table in request.tables]
        self.manager.allocated(request, told)
        if self.manager.is_parked(request):
            request.state = State.PARKED
        else:
            request.state = State.CONTEXT
            self._taken += taken

    def _pass_windows(self, request: Request) -> None:
        """What no window needs any more goes back, with no word to the connector."""
        for group, table in enumerate(request.tables):
            needed = self.memory.needed(group, request.computed)
            gone, table[:needed] = table[:needed], [NO_PAGE] * len(table[:needed])
            self.pools[group].leave(gone)

    def pause(self, request: Request) -> None:
        """There is no room for this request: its blocks go, and it begins again later.

        As when a window passes a block, bytes stay until a step that begins later writes there.
        """
        for pool, table in zip(self.pools, request.tables, strict=True):
            pool.leave(table)
        self.manager.reset(request)
        request.state, request.told_tokens, request.told_blocks = State.NEW, 0, 0
        request.computed = 0

    def _chunk(self, request: Request) -> int:
        if request.state is State.GENERATION:
            return 1
        return min(MAX_BATCH_TOKENS, len(request.tokens) - request.computed)

    def _output(self, running: list[Request], chunks: dict[int, int]) -> Any:
        output = self._form.interface.SchedulerOutput()
        for request in running:
            is_new = request.told_tokens == 0
            told = request.told_blocks
            tables = [table[told:] for table in request.tables]
            blocks = tables[0] if len(tables) == 1 else []
            fields: dict[str, Any] = {}
            if self._form.by_group:
                salt = request.cache_salt_id
                fields["cache_salt"] = None if salt is None else str(salt)
                fields["new_block_ids_by_layer_group"] = tables
                fields["block_hashes"] = []
            if request.priority is not None:
                fields["priorities"] = [request.priority] * len(blocks)
            data = self._form.interface.RequestData(
                request_id=request.request_id,
                new_tokens=request.tokens[request.told_tokens :],
                new_block_ids=blocks,
                computed_position=request.computed,
                num_scheduled_tokens=chunks[request.request_id],
                **fields,
            )
            request.told_tokens, request.told_blocks = len(request.tokens), len(request.tables[0])
            (output.new_requests if is_new else output.cached_requests).append(data)
        return output

    def _forward(self, running: list[Request], chunks: dict[int, int]) -> None:
        for request in running:
            before = request.text.digests(request.computed)
            self.memory.check(request.tables, before, f"request {request.request_id}")
        for layer in range(LAYERS):
            self.manager.before_layer(layer)
            if self.fail_forward:
                return self._handle_errors()
            for request in running:
                end = request.computed + chunks[request.request_id]
                digests = request.text.digests(end)[request.computed :]
                self.memory.write_layer(layer, request.tables, request.computed, digests)
            self.manager.after_layer(layer)
        self.manager.computed()
        for request in running:
            self._advance(request, chunks[request.request_id])
        return None

    def _advance(self, request: Request, chunk: int) -> None:
        request.computed += chunk
        if request.computed < len(request.tokens):
            return
        request.state = State.GENERATION
        for pool, table in zip(self.pools, request.tables, strict=True):
            pool.keep(request.prefixes(request.computed), table)
        token = self.memory.last(request.tables, request.computed) % VOCABULARY
        request.tokens.append(token)
        if len(request.generated) == request.max_new:
            self.end(request)

    def _handle_errors(self) -> None:
        """The forward pass has failed: so have all requests."""
        for request in self.active:
            request.failed = True
            self.end(request)

    def end(self, request: Request) -> None:
        """The request is over, or aborted: tell the connector, and let its blocks go."""
        request.state = State.DONE
        if self.manager.finished(request, [list(table) for table in request.tables]):
            self.leaving.add(request.request_id)
        else:
            self._free(request)

    def _free(self, request: Request) -> None:
        for group, (pool, table) in enumerate(zip(self.pools, request.tables, strict=True)):
            self.memory.scribble_in(group, pool.leave(table))
        request.tables = []

    def _take_finished(self) -> None:
        saved, loaded = self.manager.take_finished()
        for request in saved:
            self.leaving.discard(request.request_id)
            self._free(request)
        for number in loaded:
            if self.requests[number].state is State.PARKED:
                self.requests[number].state = State.CONTEXT

    def forget_cached(self) -> None:
        """The device has no room for what nobody uses."""
        for group, pool in enumerate(self.pools):
            self.memory.scribble_in(group, pool.forget())

    def check_at_rest(self) -> None:
        """With no request left, every block is free or cached, and nobody uses any."""
        assert not self.active
        assert not self.leaving
        for pool, count in zip(self.pools, self.memory.counts, strict=True):
            pool.forget()
            assert pool.free == count, "blocks were lost"


def same_everywhere(values: list[Any]) -> Any:
    """What all ranks have alike."""
    assert all(np.array_equal(value, values[0]) for value in values), "the ranks disagree"
    return values[0]
