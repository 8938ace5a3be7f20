"""Our block events as vLLM's own KV cache events, so that its subscribers see our tiers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from kvbm_connectors.vllm_layout import name_of
from kvbm_schemas.block import BlockHash, Tier, unpack
from kvbm_schemas.events import BlockEvent, Removed, Stored
from kvbm_service.leader_service import LeaderService

if TYPE_CHECKING:
    from vllm.distributed.kv_events import ExternalBlockHash, KVCacheEvent
    from vllm.v1.request import Request

MEDIA = {Tier.HOST: "CPU", Tier.DISK: "STORAGE"}
"""What vLLM calls our tiers."""

MAX_DESCRIBED = 1 << 20
"""Blocks whose description is remembered; beyond, the oldest are forgotten, and their events
are not translated."""


class _Described(NamedTuple):
    """What vLLM's event about a block says besides its name."""

    block_hash: ExternalBlockHash
    parent: ExternalBlockHash | None
    token_ids: tuple[int, ...]
    lora_id: int | None
    lora_name: str | None


class EngineEvents:
    """Translates one leader's events. Costs nothing unless vLLM publishes KV events."""

    def __init__(self, leader: LeaderService, enabled: bool, block_size: int) -> None:
        self._leader = leader
        self._enabled = enabled
        self._block_size = block_size
        self._described: dict[BlockHash, _Described] = {}
        self._stored: dict[Tier, dict[BlockHash, _Described]] = {tier: {} for tier in MEDIA}
        """What vLLM's subscribers have been told is where."""
        self._translated: list[KVCacheEvent] = []

    def offered(self, request: Request, first: int, last: int) -> None:
        """Blocks `first` to `last` of the request may soon be stored: remember what they are."""
        if not self._enabled:
            return
        from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

        self._catch_up()  # lest an earlier removal make us forget what is described here
        lora = request.lora_request
        for index in range(first, last):
            name = name_of(request.block_hashes[index])
            start = index * self._block_size
            self._described[name] = _Described(
                block_hash=maybe_convert_block_hash(request.block_hashes[index]),
                parent=maybe_convert_block_hash(request.block_hashes[index - 1]) if index else None,
                token_ids=tuple(request.all_token_ids[start : start + self._block_size]),
                lora_id=lora.lora_int_id if lora else None,
                lora_name=lora.lora_name if lora else None,
            )
        while len(self._described) > MAX_DESCRIBED:
            del self._described[next(iter(self._described))]

    def take(self) -> list[KVCacheEvent]:
        """The leader's events since the last call."""
        self._catch_up()
        events, self._translated = self._translated, []
        return events

    def _catch_up(self) -> None:
        if self._enabled:
            for event in self._leader.take_engine_events():
                self._translated.extend(self._translate(event))

    def _translate(self, event: BlockEvent) -> Iterator[KVCacheEvent]:
        from vllm.distributed.kv_events import BlockStored

        if isinstance(event, Stored):
            for name in unpack(event.hashes):
                if (block := self._described.get(name)) is not None:
                    self._stored[event.tier][name] = block
                    yield BlockStored(
                        block_hashes=[block.block_hash],
                        parent_block_hash=block.parent,
                        token_ids=list(block.token_ids),
                        block_size=self._block_size,
                        lora_id=block.lora_id,
                        medium=MEDIA[event.tier],
                        lora_name=block.lora_name,
                    )
        elif isinstance(event, Removed):
            yield from self._removed(event.tier, unpack(event.hashes))
        else:
            for tier, stored in self._stored.items():
                yield from self._removed(tier, list(stored))

    def _removed(self, tier: Tier, names: list[BlockHash]) -> Iterator[KVCacheEvent]:
        from vllm.distributed.kv_events import BlockRemoved

        stored = self._stored[tier]
        known = [block for name in names if (block := stored.pop(name, None)) is not None]
        for name in names:
            if not any(name in others for others in self._stored.values()):
                self._described.pop(name, None)
        if known:
            hashes = [block.block_hash for block in known]
            yield BlockRemoved(block_hashes=hashes, medium=MEDIA[tier])
