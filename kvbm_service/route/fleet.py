"""The engines there are: what each is for, how it is, what it has been sent. Pure."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from kvbm_schemas.records import NodeRecord
from kvbm_schemas.subjects import Scope
from kvbm_service.route.recent import Recent
from kvbm_service.route.vllm_names import Adapter

MAX_ENGINES = 1_024
"""Engines known at a time; further ones that membership lists are left alone."""


class Role(enum.StrEnum):
    """What an engine is for."""

    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


ANSWERING = frozenset({Role.BOTH, Role.DECODE})
PREFILLING = frozenset({Role.PREFILL})


@dataclass(eq=False)
class Engine:
    """One engine, known by its URL."""

    url: str
    role: Role
    fixed: bool = False
    """Named by the operator: it stays whatever membership says."""
    nodes: dict[str, tuple[Scope, NodeRecord]] = field(default_factory=dict)
    """Its nodes by their keys in the directory; several where it has data-parallel ranks."""
    healthy: bool = False
    ahead: int = 0
    """Tokens that it has still to compute for requests it was sent."""
    running: int = 0
    """Requests that it was sent and has not finished."""
    bases: frozenset[str] = frozenset()
    """Models that it serves; empty while that is not known."""
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    recent: Recent = field(default_factory=Recent)

    @property
    def name(self) -> str:
        """What it is called before clients."""
        parts = urlsplit(self.url)
        return next((record.node for _, record in self.nodes.values()), parts.netloc)

    @property
    def listed(self) -> bool:
        """Whether it takes part; otherwise it only ends what it has begun."""
        return self.fixed or bool(self.nodes)

    @property
    def scope(self) -> Scope | None:
        """In which its blocks are known; None: none of its nodes is."""
        return next((scope for scope, _ in self.nodes.values()), None)

    @property
    def record(self) -> NodeRecord | None:
        """What one of its nodes says of itself; all say the same of their engine."""
        return next((record for _, record in self.nodes.values()), None)

    @property
    def node_names(self) -> frozenset[str]:
        """Its nodes, as registries call them."""
        return frozenset(record.node for _, record in self.nodes.values())

    def serves(self, model: str) -> bool:
        """Whether it may know this model; empty: any."""
        return not model or not self.bases or model in self.bases or model in self.adapters

    def __str__(self) -> str:
        return f"{self.url} ({self.role})"


class Fleet:
    """All engines."""

    def __init__(self) -> None:
        self._engines: dict[str, Engine] = {}
        self._turns: Counter[frozenset[Role]] = Counter()

    def __iter__(self) -> Iterator[Engine]:
        return iter(list(self._engines.values()))

    def fix(self, url: str, role: Role) -> Engine:
        """The operator names an engine."""
        engine = self._engines[url] = Engine(url, role, fixed=True)
        return engine

    def listed(self, key: str, scope: Scope, record: NodeRecord, url: str) -> Engine | None:
        """The directory lists a node, whose engine is at `url`. Returns an engine that is new.

        An engine that came back as another process has nothing on its device any more.
        """
        for other in self:
            if other.url != url:
                other.nodes.pop(key, None)
        role = Role(record.role)
        engine = self._engines.get(url)
        if engine is None:
            if len(self._engines) >= MAX_ENGINES:
                return None
            engine = self._engines[url] = Engine(url, role, nodes={key: (scope, record)})
            return engine
        before = engine.record
        if before is not None and before.instance != record.instance:
            engine.recent.forget()
        engine.nodes[key] = (scope, record)
        if not engine.fixed:
            engine.role = role
        return None

    def unlisted(self, key: str) -> Engine | None:
        """A node has left. Returns its engine, if that takes part no more."""
        for engine in self:
            if engine.nodes.pop(key, None) is not None and not engine.listed:
                return engine
        return None

    def remove(self, engine: Engine) -> None:
        """An engine that takes part no more is forgotten."""
        del self._engines[engine.url]

    def usable(self, roles: frozenset[Role], model: str = "") -> list[Engine]:
        """The engines for a new request.

        Those that have left are asked only where nobody else can be: the directory may have
        failed rather than they. A model that nobody serves is for any engine to refuse.
        """
        healthy = [engine for engine in self if engine.healthy and engine.role in roles]
        there = [engine for engine in healthy if engine.listed] or healthy
        return [engine for engine in there if engine.serves(model)] or there

    def turn(self, roles: frozenset[Role]) -> int:
        """The number of the next choice among engines of these roles."""
        self._turns[roles] += 1
        return self._turns[roles]
