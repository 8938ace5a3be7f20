"""The leader's half of the TensorRT-LLM connector: requests and blocks in, our calls out.

TensorRT-LLM asks once per request what can be loaded, on the thread that runs the engine, and
takes no "later": so the answer waits for the lookup, within its deadline. It counts no references
for us, either: where `finished` says so, the blocks of a request that ends stay until no copy uses
them any more. Of requests that go on, blocks leave with no word to us, when a window has passed
them or a request is paused: so a step that writes to blocks that are being saved has to wait.

Blocks are rows (`rows.py`) here, be it of one group of layers. We know of them what TensorRT-LLM
has told step by step, and it does not tell when a window has passed one: so of models with
windows, a block is offered in the step that fills it, or never.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvbm_connectors.rows import Row, Rows, whole
from kvbm_connectors.trtllm_layout import Identity, Pool
from kvbm_connectors.trtllm_names import NameChain, root_of, salt_of
from kvbm_connectors.trtllm_step import Commands, Ready
from kvbm_schemas.step import NO_BLOCK, StepResults
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
    tables: list[list[int]] = field(default_factory=list)
    """By group of layers. A page that a window has passed since stays in here."""
    priorities: list[int] = field(default_factory=list)
    matched_from: int = 0
    """Blocks that TensorRT-LLM had itself when it asked."""
    promised: int = 0
    """Blocks after these that it was promised."""
    offered: int = 0
    """Full blocks that were offered for saving."""

    def rows(self, first: int, last: int) -> list[Row]:
        """Blocks `first` to `last`; fewer if not all groups have got that far."""
        return _rows(self.tables, first, last)


class LeaderSide:
    """Follows the requests of one engine. All calls come from the thread that runs it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._service: LeaderService | None = None
        self._ranks = 0
        self._block_tokens = 1
        self._windowed = False
        self._rows = Rows()
        self._starts: tuple[int, ...] = (0,)
        """By group of layers, what its pages' numbers begin with."""
        self._instance = ""
        self._followed: dict[int, _Followed] = {}
        self._running: set[int] = set()
        """Those requests, and others that are not followed."""
        self._nothing_to_load: list[int] = []
        self._held: Counter[int] = Counter()
        """By request: blocks that are being saved."""
        self._holders: dict[int, deque[int]] = {}
        """By block: the requests of its saves under way, oldest first."""
        self._being_saved: Counter[int] = Counter()
        """Pages of all groups."""
        self._saves_first = False
        self._loading: dict[int, int] = {}
        """By request: ranks on which its load is under way."""

    # -- life ------------------------------------------------------------------------------

    def open(self, identity: Identity, ranks: int, pool: Pool) -> None:
        """The engine has a KV pool: begin to meet ranks and other nodes."""
        self._ranks = ranks
        self._block_tokens = pool.block_tokens
        self._windowed = pool.windowed
        self._starts = tuple(sum(pool.blocks[:group]) for group in range(len(pool.blocks)))
        self._rows = Rows(self._starts)
        self._instance = identity.instance
        self._service = LeaderService(
            _within_one_deadline(self._settings),
            identity.scope,
            identity.node,
            ranks,
            over_nats(self._settings, f"kvbm leader {identity.node}", identity.node),
            engine="trtllm",
            instance=identity.instance,
            block_tokens=pool.block_tokens,
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
        if number in self._loading:
            return 0  # it begins again while its last load is under way: one at a time
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

    def allocated(self, request: Any, tables: Sequence[Sequence[int]]) -> None:
        """TensorRT-LLM has blocks for (some of) what was promised, by group of layers.

        Whatever has a page is loaded: TensorRT-LLM may take it for computed.
        """
        number = int(request.request_id)
        followed = self._followed.get(number)
        if followed is None:
            return
        self._check_groups(tables)
        first, promised = followed.matched_from, followed.promised
        followed.promised = 0
        wanted = _with_a_page(_rows(tables, first, first + promised))
        self._note_written(wanted)
        self.service.load(str(number), first, self._rows.name(wanted))
        if wanted:
            self._loading[number] = self._ranks
        elif promised:
            self._nothing_to_load.append(number)

    def _check_groups(self, tables: Sequence[Sequence[int]]) -> None:
        if len(tables) != len(self._starts):
            raise LayoutError(
                f"a request has blocks in {len(tables)} groups of layers, where the KV pool has "
                f"{len(self._starts)}: this release calls connectors in another way than those "
                "that are known"
            )

    def _note_written(self, rows: Iterable[Row]) -> None:
        """The coming step writes to these. If it must not yet, they belonged to somebody else."""
        if self._being_saved:
            numbers = (number for row in rows for number in self._rows.numbers(row))
            self._saves_first |= any(number in self._being_saved for number in numbers)

    # -- write path ------------------------------------------------------------------------

    def commands(self, output: Any) -> Commands:
        """Offer the blocks that this step fills, and hand over what the ranks have to do."""
        if output is not None:
            for data in output.new_requests:
                self._begin_over(data)
            told = (*output.new_requests, *output.cached_requests)
            for data in told:
                self._note_pages(data)
            for data in told:
                self._advance(data)
        nothing, self._nothing_to_load = tuple(self._nothing_to_load), []
        saves_first, self._saves_first = self._saves_first, False
        return Commands(self._rows.spell_out(self.service.take_commands()), nothing, saves_first)

    def _begin_over(self, data: Any) -> None:
        """All of the request is told from here on: it is new, or was paused and begins again."""
        followed = self._followed.get(data.request_id)
        if followed is None:
            return
        followed.told = 0
        followed.tables.clear()
        followed.priorities.clear()
        followed.offered = 0
        if getattr(data, "cache_salt", None) is not None and not followed.salted:
            # Its salt is not in its names: nobody may ever find what they are given to.
            self._forget(data.request_id)

    def _note_pages(self, data: Any) -> None:
        """Pages that are a request's from this step on, and that somebody else may have had."""
        new = _tables_of(data)
        self._check_groups(new)
        followed = self._followed.get(data.request_id)
        if followed is None:
            self._note_written(_rows(new, 0, max(map(len, new))))
            return
        followed.tables = followed.tables or [[] for _ in new]
        known = len(followed.tables[0])
        for table, pages in zip(followed.tables, new, strict=True):
            table.extend(pages)
        computed = data.computed_position // self._block_tokens
        self._note_written(followed.rows(max(known, computed), len(followed.tables[0])))

    def _advance(self, data: Any) -> None:
        followed = self._followed.get(data.request_id)
        if followed is None:
            return
        known = max(0, followed.chain.tokens - followed.told)
        followed.chain.extend(data.new_tokens[known:])
        followed.told += len(data.new_tokens)
        priorities = getattr(data, "priorities", None)
        if priorities is None:
            priorities = [NO_PRIORITY] * len(_tables_of(data)[0])
        followed.priorities.extend(priorities)
        if self._windowed:
            computed = data.computed_position // self._block_tokens
            followed.offered = max(followed.offered, computed)
        self._offer(data.request_id, followed, data.computed_position + data.num_scheduled_tokens)

    def _offer(self, number: int, followed: _Followed, end_token: int) -> None:
        last = min(end_token // self._block_tokens, len(followed.chain.names))
        rows = followed.rows(followed.offered, last)
        followed.offered, rows = whole(rows, followed.offered)
        if rows:
            self._store(number, followed, rows)

    def _store(self, number: int, followed: _Followed, rows: list[Row]) -> None:
        """Offer these rows, from the first that was not offered on."""
        names, first = followed.chain.names, followed.offered
        last = first + len(rows)
        dealt_with, held = self.service.store(
            str(number),
            names[first - 1] if first else None,
            names[first:last],
            self._rows.name(rows),
            followed.priorities[first:last],
        )
        followed.offered = first + dealt_with
        for block in held:
            self._holders.setdefault(block, deque()).append(number)
        if held:
            self._held[number] += len(held)
            self._being_saved.update(self._rows.hold(held))

    def finished(self, request: Any) -> bool:
        """The request is over. Whether some of its blocks are still being read or written."""
        number = int(request.request_id)
        self._running.discard(number)
        self._forget(number)
        return self.uses_blocks_of(number)

    def reset(self, request: Any) -> None:
        """The request's blocks are taken away, and it will begin again as if it were new."""
        self._forget(int(request.request_id))

    def _forget(self, number: int) -> None:
        self.service.finish(str(number))
        self._followed.pop(number, None)

    def reported(self, results: Sequence[StepResults]) -> tuple[str, ...]:
        """What ranks have finished. Returns requests whose loads were promised in vain."""
        self._let_go(self.service.report(results))
        for result in results:
            for load in result.loads:
                self._loaded_on_one_rank(int(load.request))
        return tuple(load.request for load in self.service.take_lost_loads())

    def _let_go(self, blocks: Sequence[int]) -> None:
        if not blocks:
            return
        for block in blocks:
            holders = self._holders[block]
            self._held[holders.popleft()] -= 1
            if not holders:
                del self._holders[block]
        self._held = +self._held
        self._being_saved -= Counter(self._rows.let_go(blocks))

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


def _tables_of(data: Any) -> Sequence[Sequence[int]]:
    """A request's new blocks, by group of layers; older releases know one group."""
    return getattr(data, "new_block_ids_by_layer_group", None) or [data.new_block_ids]


def _rows(tables: Sequence[Sequence[int]], first: int, last: int) -> list[Row]:
    """Blocks `first` to `last` of these tables, in which a negative number is no page."""
    parts = ([NO_BLOCK if page < 0 else page for page in table[first:last]] for table in tables)
    return list(zip(*parts, strict=False))


def _with_a_page(rows: list[Row]) -> list[Row]:
    """The rows up to the last one that has a page in some group."""
    last = (at for at in range(len(rows), 0, -1) if set(rows[at - 1]) != {NO_BLOCK})
    return rows[: next(last, 0)]


def _within_one_deadline(settings: Settings) -> Settings:
    """The core may wait twice, for the registry and for an owner; the engine only once."""
    half = settings.lookup_deadline_seconds / 2
    return msgspec.structs.replace(settings, lookup_deadline_seconds=half)
