"""The leader's half of the TensorRT-LLM connector: requests and blocks in, our calls out.

TensorRT-LLM asks once per request what can be loaded, on the thread that runs the engine, and
takes no "later": so the answer waits for the lookup, within its deadline. It counts no references
for us, either: where `finished` says so, the blocks of a request that ends stay until no copy uses
them any more.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvbm_connectors.trtllm_layout import Identity
from kvbm_connectors.trtllm_names import NameChain, root_of, salt_of
from kvbm_connectors.trtllm_step import Commands, Ready
from kvbm_schemas.step import StepResults
from kvbm_service.errors import LayoutError
from kvbm_service.leader_service import Front, LeaderService
from kvbm_service.network import over_nats
from kvbm_service.settings import Settings

POLL_SECONDS = 0.0005
NO_PRIORITY = 0
"""What DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY takes blocks for that nobody gave one."""


@dataclass(slots=True)
class _Followed:
    """One request: the names of its blocks, and where they are on the device."""

    chain: NameChain
    salted: bool
    told: int = 0
    """Tokens that TensorRT-LLM has told of, step by step."""
    device_blocks: list[int] = field(default_factory=list)
    priorities: list[int] = field(default_factory=list)
    matched_from: int = 0
    """Blocks that TensorRT-LLM had itself when it asked."""
    promised: int = 0
    """Blocks after these that it was promised."""
    offered: int = 0
    """Full blocks that were offered for saving."""


class LeaderSide:
    """Follows the requests of one engine. All calls come from the thread that runs it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._service: LeaderService | None = None
        self._ranks = 0
        self._block_tokens = 1
        self._instance = ""
        self._followed: dict[int, _Followed] = {}
        self._running: set[int] = set()
        """Those requests, and others that are not followed."""
        self._nothing_to_load: list[int] = []
        self._held: dict[int, set[int]] = {}
        """By request: device blocks that are being saved."""
        self._holder: dict[int, int] = {}
        self._loading: dict[int, int] = {}
        """By request: ranks on which its load is under way."""

    # -- life ------------------------------------------------------------------------------

    def open(self, identity: Identity, ranks: int, block_tokens: int) -> None:
        """The engine has a KV pool: begin to meet ranks and other nodes."""
        self._ranks = ranks
        self._block_tokens = block_tokens
        self._instance = identity.instance
        self._service = LeaderService(
            _within_one_deadline(self._settings),
            identity.scope,
            identity.node,
            ranks,
            over_nats(self._settings, f"kvbm leader {identity.node}", identity.node),
            engine="trtllm",
            instance=identity.instance,
            block_tokens=block_tokens,
            front=Front(self._settings.engine_url),
        )
        self._service.start()

    def meet(self, ranks: Iterable[Ready]) -> None:
        """All ranks have their tiers."""
        for rank in ranks:
            assert rank.record is not None
            self.service.attach(rank.record, rank.survivors)

    @property
    def service(self) -> LeaderService:
        """The leader; there once the engine has a KV pool."""
        if self._service is None:
            raise LayoutError(
                "TensorRT-LLM sent a request before its KV pool was registered: this release "
                "calls connectors in another order than those that are known"
            )
        return self._service

    def close(self) -> None:
        """The engine ends."""
        if self._service is not None:
            self._service.close()
            self._service = None

    # -- read path -------------------------------------------------------------------------

    def matched_tokens(self, request: Any, computed_tokens: int) -> int:
        """How many further tokens are promised to be loaded. Waits for the lookup's deadline."""
        number = int(request.request_id)
        self._running.add(number)
        root = root_of(request, self._instance)
        if root is None:
            self._forget(number)
            return 0
        followed = self._followed[number] = _Followed(
            NameChain(root, self._block_tokens), salted=any(salt_of(request))
        )
        tokens = request.get_tokens(0)
        followed.chain.extend(tokens)
        # The last token is always computed: its output is what the request is about.
        loadable = (len(tokens) - 1) // self._block_tokens
        if computed_tokens % self._block_tokens or computed_tokens // self._block_tokens > loadable:
            return 0
        followed.matched_from = computed_tokens // self._block_tokens
        self.service.arrive(str(number), followed.chain.names[:loadable])
        followed.promised = self._match(str(number), followed.matched_from)
        return followed.promised * self._block_tokens

    def _match(self, request: str, computed: int) -> int:
        deadline = time.monotonic() + self._settings.lookup_deadline_seconds
        while (blocks := self.service.match(request, computed)) is None:
            if time.monotonic() > deadline:
                # Only another node's disk takes longer, and the whole engine stands still.
                self.service.finish(request)
                return 0
            time.sleep(POLL_SECONDS)
        return blocks

    def allocated(self, request: Any, block_ids: Sequence[int]) -> None:
        """TensorRT-LLM has blocks for (some of) what was promised."""
        number = int(request.request_id)
        followed = self._followed.get(number)
        if followed is None:
            return
        first, promised = followed.matched_from, followed.promised
        followed.promised = 0
        wanted = list(block_ids[first : first + promised])
        no_page = next((at for at, block in enumerate(wanted) if block < 0), len(wanted))
        self.service.load(str(number), first, wanted[:no_page])
        if no_page:
            self._loading[number] = self._ranks
        elif promised:
            self._nothing_to_load.append(number)

    # -- write path ------------------------------------------------------------------------

    def commands(self, output: Any) -> Commands:
        """Offer the blocks that this step fills, and hand over what the ranks have to do."""
        if output is not None:
            for data in output.new_requests:
                self._begin_over(data)
            for data in (*output.new_requests, *output.cached_requests):
                self._advance(data)
        nothing, self._nothing_to_load = tuple(self._nothing_to_load), []
        return Commands(self.service.take_commands(), nothing)

    def _begin_over(self, data: Any) -> None:
        """All of the request is told from here on: it is new, or was paused and begins again."""
        followed = self._followed.get(data.request_id)
        if followed is None:
            return
        followed.told = 0
        followed.device_blocks.clear()
        followed.priorities.clear()
        if getattr(data, "cache_salt", None) is not None and not followed.salted:
            # Its salt is not in its names: nobody may ever find what they are given to.
            self._forget(data.request_id)

    def _advance(self, data: Any) -> None:
        followed = self._followed.get(data.request_id)
        if followed is None:
            return
        known = max(0, followed.chain.tokens - followed.told)
        followed.chain.extend(data.new_tokens[known:])
        followed.told += len(data.new_tokens)
        followed.device_blocks.extend(data.new_block_ids)
        priorities = getattr(data, "priorities", None)
        if priorities is None:
            priorities = [NO_PRIORITY] * len(data.new_block_ids)
        followed.priorities.extend(priorities)
        self._offer(data.request_id, followed, data.computed_position + data.num_scheduled_tokens)

    def _offer(self, number: int, followed: _Followed, end_token: int) -> None:
        names, first = followed.chain.names, followed.offered
        last = min(end_token // self._block_tokens, len(names), len(followed.device_blocks))
        if last <= first:
            return
        dealt_with, held = self.service.store(
            str(number),
            names[first - 1] if first else None,
            names[first:last],
            followed.device_blocks[first:last],
            followed.priorities[first:last],
        )
        followed.offered = first + dealt_with
        if held:
            self._held.setdefault(number, set()).update(held)
            self._holder.update(dict.fromkeys(held, number))

    def finished(self, request: Any) -> bool:
        """The request is over. Whether some of its blocks are still being read or written."""
        number = int(request.request_id)
        self._running.discard(number)
        self._forget(number)
        return self.uses_blocks_of(number)

    def _forget(self, number: int) -> None:
        self.service.finish(str(number))
        self._followed.pop(number, None)

    def reported(self, results: Sequence[StepResults]) -> tuple[str, ...]:
        """What ranks have finished. Returns requests whose loads were promised in vain."""
        for block in self.service.report(results):
            number = self._holder.pop(block)
            held = self._held[number]
            held.discard(block)
            if not held:
                del self._held[number]
        for result in results:
            for load in result.loads:
                self._loaded_on_one_rank(int(load.request))
        return tuple(load.request for load in self.service.take_lost_loads())

    def _loaded_on_one_rank(self, number: int) -> None:
        left = self._loading.pop(number) - 1
        if left:
            self._loading[number] = left

    @property
    def nothing_but_saves(self) -> bool:
        """Whether no request is left, but saves are."""
        return not self._running and bool(self._held)

    def uses_blocks_of(self, number: int) -> bool:
        """Whether blocks of this request are being saved, or still loaded though it was aborted."""
        return number in self._held or number in self._loading


def _within_one_deadline(settings: Settings) -> Settings:
    """The core may wait twice, for the registry and for an owner; the engine only once."""
    half = settings.lookup_deadline_seconds / 2
    return msgspec.structs.replace(settings, lookup_deadline_seconds=half)
