"""Finding out which engine has how much of a prompt's prefix, as far as that goes in time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvbm_schemas.block import BlockHash, pack
from kvbm_schemas.codec import Decoder, Malformed, encode
from kvbm_schemas.requests import Holder, Locate, Placements
from kvbm_schemas.subjects import REGISTRY_NODE, Scope
from kvbm_service.adapters.bus import Bus
from kvbm_service.errors import BusError, EngineLost
from kvbm_service.route.choice import Candidate
from kvbm_service.route.fleet import Engine
from kvbm_service.route.prompts import Asked
from kvbm_service.route.upstream import Upstream
from kvbm_service.route.vllm_names import Adapter, Naming, block_names

MAX_ASKED_BLOCKS = 256
"""Blocks of one prompt that a registry is asked about: of a longer one, so many, evenly spaced."""

_log = logging.getLogger(__name__)

_placements = Decoder(Placements)


class Chain(NamedTuple):
    """A prompt's full blocks as the engines of one scope name them."""

    block_tokens: int
    names: Sequence[BlockHash]


class Found(NamedTuple):
    """Blocks of a prompt's prefix that registries know of."""

    by_node: Mapping[str, int]
    anywhere: int


NOTHING = Found({}, 0)


@dataclass(frozen=True)
class Known:
    """What is known of a prompt."""

    tokens: int
    chains: Mapping[Scope, Chain] = field(default_factory=dict)
    found: Mapping[Scope, Found] = field(default_factory=dict)

    def candidate(self, engine: Engine) -> Candidate:
        """The engine as this prompt sees it."""
        load = Candidate(ahead=engine.ahead, running=engine.running)
        chain = self.chain(engine)
        if chain is None or engine.scope is None:
            return load
        found = self.found.get(engine.scope, NOTHING)
        own = max((found.by_node.get(node, 0) for node in engine.node_names), default=0)
        return load._replace(
            device=engine.recent.prefix(chain.names) * chain.block_tokens,
            own=own * chain.block_tokens,
            others=found.anywhere * chain.block_tokens,
        )

    def chain(self, engine: Engine) -> Chain | None:
        """The prompt's blocks as this engine names them; None: nobody knows."""
        return self.chains.get(engine.scope) if engine.scope is not None else None


class Prefixes:
    """Asks engines for tokens, and registries for holders."""

    def __init__(self, upstream: Upstream, bus: Bus | None, deadline_seconds: float) -> None:
        self._upstream = upstream
        self._bus = bus
        self._deadline_seconds = deadline_seconds
        self._turn = 0
        self._said: set[str] = set()

    async def of(
        self, asked: Asked, engines: Sequence[Engine], headers: Mapping[str, str]
    ) -> Known:
        """What can be known of a prompt within the deadline; never raises for want of it."""
        known = Known(asked.guessed_tokens)
        naming = {engine: naming for engine in engines if (naming := self._naming_of(engine))}
        if not naming or self._deadline_seconds <= 0:
            return known
        try:
            async with asyncio.timeout(self._deadline_seconds):
                tokens = await self._tokens(asked, list(naming), headers)
                if tokens is None:
                    return known
                known = Known(len(tokens), _chains(asked, tokens, naming))
                found = await self._look_up(known.chains)
                return Known(known.tokens, known.chains, found)
        except TimeoutError:
            self._say_once("prefixes are not known in time (KVBM_ROUTE_DEADLINE_MS)")
        except EngineLost as error:
            self._say_once(f"prompts cannot be tokenised: {error}")
        return known

    async def _tokens(
        self, asked: Asked, engines: Sequence[Engine], headers: Mapping[str, str]
    ) -> list[int] | None:
        if asked.tokens is not None or asked.tokenize is None:
            return asked.tokens
        self._turn += 1
        engine = engines[self._turn % len(engines)]
        return await self._upstream.tokenize(engine, asked.tokenize, headers)

    async def _look_up(self, chains: Mapping[Scope, Chain]) -> Mapping[Scope, Found]:
        bus = self._bus
        if bus is None or not bus.connected:
            return {}
        scopes = [scope for scope, chain in chains.items() if chain.names]
        answers = await asyncio.gather(*(self._locate(bus, s, chains[s].names) for s in scopes))
        return dict(zip(scopes, answers, strict=True))

    async def _locate(self, bus: Bus, scope: Scope, names: Sequence[BlockHash]) -> Found:
        positions = spaced(len(names), MAX_ASKED_BLOCKS)
        question = encode(Locate(hashes=pack(names[at] for at in positions)))
        subject = scope.of(REGISTRY_NODE, "locate")
        try:
            answer = await bus.request(subject, question, self._deadline_seconds)
            return prefixes(positions, _placements.decode(answer).holders)
        except (BusError, Malformed) as error:
            self._say_once(f"no registry says where blocks are: {error}")
            return NOTHING

    def _naming_of(self, engine: Engine) -> Naming | None:
        record = engine.record
        naming = Naming.parse(record.names) if record is not None and record.block_tokens else None
        if naming is None:
            self._say_once(f"engine {engine.name} is chosen by load alone: how it names blocks is "
                           "not known")  # fmt: skip
        return naming

    def _say_once(self, what: str) -> None:
        if what not in self._said and len(self._said) < MAX_SAID:
            self._said.add(what)
            _log.warning(what)


MAX_SAID = 256
"""Different reasons for going by load alone that are logged, once each."""


def _chains(
    asked: Asked, tokens: Sequence[int], naming: Mapping[Engine, Naming]
) -> dict[Scope, Chain]:
    chains: dict[Scope, Chain] = {}
    for engine, how in naming.items():
        scope, record = engine.scope, engine.record
        assert scope is not None
        assert record is not None
        if scope in chains:
            continue
        adapter, known = _adapter(engine, asked.model)
        if known:
            names = block_names(how, record.block_tokens, tokens, adapter, asked.salt)
            chains[scope] = Chain(record.block_tokens, names)
    return chains


def _adapter(engine: Engine, model: str) -> tuple[Adapter | None, bool]:
    """The adapter that `model` names, if any; and whether that is known at all."""
    if model in engine.adapters:
        return engine.adapters[model], True
    record = engine.record
    is_base = not model or model in engine.bases or (record is not None and model == record.model)
    return None, is_base


def spaced(count: int, most: int) -> list[int]:
    """Positions in a row of `count`: all of them, or `most` of them, the last one included."""
    if count <= most:
        return list(range(count))
    return [(at + 1) * count // most - 1 for at in range(most)]


def prefixes(positions: Sequence[int], holders: Sequence[Iterable[Holder]]) -> Found:
    """How much of the prefix each node has, and all of them together.

    `holders` are those of the blocks at `positions`. Where one has two neighbours of these, it is
    taken for the holder of what lies between them.
    """
    by_node: dict[str, int] = {}
    anywhere = 0
    going: set[str] | None = None
    for position, there in zip(positions, holders, strict=False):
        nodes = {holder.node for holder in there}
        if not nodes:
            break
        anywhere = position + 1
        going = nodes if going is None else going & nodes
        for node in going:
            by_node[node] = position + 1
    return Found(by_node, anywhere)
