"""What the default eviction promises, whatever requests come."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from kvbm_schemas.block import BlockHash
from kvbm_service.core.pool import Pool
from tests.core.builders import block

requests = st.lists(
    st.tuples(st.text("xyz", min_size=1, max_size=6), st.floats(0, 1000)), max_size=40
)
capacities = st.integers(1, 12)


def replay(capacity: int, arrivals: list[tuple[str, float]]) -> list[list[BlockHash]]:
    """Store each request's chain; returns what had to go, and checks what stayed."""
    pool, now, gone = Pool(capacity), 0.0, []
    heads: dict[BlockHash, BlockHash] = {}
    for names, pause in arrivals:
        now += pause
        chain = [block(names[:end]) for end in range(1, len(names) + 1)]
        heads.update(zip(chain[1:], chain[:-1], strict=True))
        pool.use(chain, now)
        taken = pool.reserve(chain, fill=1)
        pool.commit(taken.slots)
        pool.check_integrity()
        gone.append(taken.evicted)
        readable = set(pool.blocks())
        assert all(heads[one] in readable for one in readable if one in heads)
    return gone


@given(capacities, requests)
def test_no_block_stays_whose_head_is_gone(
    capacity: int, arrivals: list[tuple[str, float]]
) -> None:
    replay(capacity, arrivals)


@given(capacities, requests)
def test_equal_requests_lead_to_equal_evictions(
    capacity: int, arrivals: list[tuple[str, float]]
) -> None:
    assert replay(capacity, arrivals) == replay(capacity, arrivals)
