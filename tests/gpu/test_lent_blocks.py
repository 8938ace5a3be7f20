"""Device blocks that another process reads from CUDA memory to CUDA memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kvbm_schemas.block import Tier
from kvbm_service.adapters.mover import Blocks
from kvbm_service.adapters.nixl_mover import NixlMover
from tests.contracts.mover_owner import OwnerProcess
from tests.contracts.mover_rank import LAYOUTS, MANY_PARTS, POOL, Rank, blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

SECONDS = 30.0
"""A timeout that a pull between healthy ranks never needs, the first one included."""

DEVICE = "cuda:0"


class Pair:
    """A rank, and an owner in another process, with their pools on one device."""

    def __init__(self, layout: str, *, verify: bool = False) -> None:
        self.owner = OwnerProcess(layout, verify=verify, device=DEVICE)
        self.rank = Rank(NixlMover, layout, verify=verify, device=DEVICE)
        self.ops = itertools.count(10, 10)
        self._lane = ThreadPoolExecutor(1)
        """As in a worker, a thread of its own reads. It has done nothing else with the device."""
        self._lane.submit(self.rank.mover.connect, self.owner.as_peer).result()

    def pull(self, wanted: Blocks) -> list[bool]:
        agent = self.owner.as_peer.agent
        pulled = self._lane.submit(self.rank.mover.pull, agent, wanted, SECONDS, Tier.DEVICE)
        return pulled.result().tolist()

    def close(self) -> None:
        self._lane.shutdown()
        self.rank.close()
        self.owner.close()


@pytest.fixture(params=[*LAYOUTS, MANY_PARTS], scope="module")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = Pair(request.param)
    yield pair
    pair.close()


def test_the_pool_that_is_lent_from_is_the_devices(pair: Pair) -> None:
    pool = pair.rank.mover.pool
    assert pool is not None, "device memory could not be registered: see the log"
    assert pool.device == torch.device(DEVICE).index


def test_a_lent_block_is_pulled_from_device_to_device_and_touches_no_other(pair: Pair) -> None:
    rank, owner, op = pair.rank, pair.owner, next(pair.ops)
    owner.fill_pool(5)
    owner.lend([23, 0, 3], op)
    rank.fill_pool(2)
    before = {number: rank.block(number) for number in range(POOL)}
    assert pair.pull(blocks([3, 23, 0], [7, 8, 23], op)) == [True] * 3
    assert [rank.block(number) for number in (7, 8, 23)] == [
        owner.block(number) for number in (3, 23, 0)
    ]
    others = set(range(POOL)) - {7, 8, 23}
    assert all(rank.block(number) == before[number] for number in others)


def test_what_is_not_lent_now_is_refused(pair: Pair) -> None:
    op = next(pair.ops)
    pair.owner.lend([4, 5], op)
    pair.owner.unlend([5], op + 1)
    pair.owner.write(5, 99)
    assert pair.pull(blocks([4, 5, 6], [4, 5, 6], op)) == [True, False, False]


def test_what_is_lent_again_is_pulled_with_its_new_bytes(pair: Pair) -> None:
    for octet in (1, 2, 3):
        op = next(pair.ops)
        pair.owner.write(4, octet)
        pair.owner.lend([4], op)
        assert pair.pull(blocks([4], [0], op)) == [True]
        assert set(pair.rank.block(0)) == {octet}
        pair.owner.unlend([4], op + 1)


def test_a_checksum_taken_when_a_block_is_lent_fits_what_arrives() -> None:
    pair = Pair("heads_first", verify=True)
    try:
        pair.owner.fill_pool(5)
        pair.owner.lend([4, 5], op=10)
        pair.owner.write(5, 99)
        assert pair.pull(blocks([4, 5], [4, 5], fill=10)) == [True, False]
    finally:
        pair.close()
