"""The other nodes that one's ranks could read from, as the directory reports them."""

from __future__ import annotations

from kvbm_schemas.records import NodeRecord, RankRecord

SHUN_SECONDS = 5.0
"""How long a node that failed us is not asked again: a dead one stays in the directory for a
while, and every question to it would cost a request its deadline."""


class Peers:
    """Leaders and ranks by node, which agents one's own workers know, and whom to leave alone."""

    def __init__(self, layouts: tuple[str, ...]) -> None:
        self.online = False
        """Whether the registry and the owners can be asked."""
        self._layouts = layouts
        """How one's own ranks arrange a block's bytes, in rank order."""
        self._leaders: dict[str, NodeRecord] = {}
        self._ranks: dict[str, dict[int, RankRecord]] = {}
        self._shunned: dict[str, float] = {}
        self._news: dict[str, RankRecord] = {}
        self._gone: list[str] = []

    def leader_changed(self, node: str, record: NodeRecord | None) -> None:
        """A leader is there (again), or (None) gone."""
        before = self._leaders.pop(node, None)
        if record is not None:
            self._leaders[node] = record
        if before is None or record is None or before.epoch != record.epoch:
            self._shunned.pop(node, None)

    def rank_changed(self, node: str, rank: int, record: RankRecord | None) -> None:
        """A worker is there (again), or (None) gone."""
        ranks = self._ranks.setdefault(node, {})
        before = ranks.pop(rank, None)
        replaced = before is not None and (record is None or record.agent != before.agent)
        if before is not None and replaced and self._news.pop(before.agent, None) is None:
            self._gone.append(before.agent)
        if record is not None:
            ranks[rank] = record
            if before is None or before.agent != record.agent:
                self._news[record.agent] = record
        elif not ranks:
            del self._ranks[node]

    def can_ask(self, node: str, now: float) -> bool:
        """Whether a lease from `node` could be used."""
        leader = self._leaders.get(node)
        if leader is None or self._shunned.get(node, now) > now:
            return False
        ranks = self._ranks.get(node, {})
        return len(ranks) == len(self._layouts) == leader.world_size and all(
            rank in ranks and ranks[rank].slab.layout == layout
            for rank, layout in enumerate(self._layouts)
        )

    def knows(self, node: str, agents: tuple[str, ...], epoch: int) -> bool:
        """Whether `node` lives in `epoch`, and these are the present agents of all its ranks."""
        leader, ranks = self._leaders.get(node), self._ranks.get(node, {})
        if leader is None or leader.epoch != epoch:
            return False
        return len(ranks) == len(agents) and all(
            rank in ranks and ranks[rank].agent == agent for rank, agent in enumerate(agents)
        )

    def shun(self, node: str, now: float) -> None:
        """`node` failed us: leave it alone for a while."""
        if node in self._leaders:
            self._shunned[node] = now + SHUN_SECONDS

    def tell_again(self) -> None:
        """One of our own ranks is a new one, which knows nobody: let all meet everyone anew."""
        known = [record for ranks in self._ranks.values() for record in ranks.values()]
        for record in known:
            if record.agent not in self._news:
                self._gone.append(record.agent)
                self._news[record.agent] = record

    def take_news(self) -> tuple[tuple[RankRecord, ...], tuple[str, ...]]:
        """Ranks that came, and agents that went, since the last call."""
        came, self._news = tuple(self._news.values()), {}
        gone, self._gone = tuple(self._gone), []
        return came, gone
