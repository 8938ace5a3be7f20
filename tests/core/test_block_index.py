"""The block index: what it answers, and what happens at its limits."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from kvbm_schemas.block import Tier, pack
from kvbm_service.core import block_index
from kvbm_service.core.block_index import BlockIndex, Run

SEED = 20_26


def names(count: int, chain: str = "a") -> list[bytes]:
    return [hashlib.md5(f"{chain}{number}".encode()).digest() for number in range(count)]


def nodes(index: BlockIndex, count: int) -> list[int]:
    found = [index.add_node() for _ in range(count)]
    return [node for node in found if node is not None]


@pytest.fixture
def index() -> BlockIndex:
    return BlockIndex(SEED)


def test_what_was_stored_is_found_and_nothing_else(index: BlockIndex) -> None:
    (a,) = nodes(index, 1)
    chain = names(5)
    index.store(a, Tier.HOST, pack(chain[:3]))
    assert index.lookup(pack(chain)) == [Run(a, Tier.HOST, 0, 3)]
    assert index.lookup(pack(names(5, "b"))) == []
    assert index.lookup(b"") == []
    assert len(index) == 3
    index.check_integrity()


def test_storing_twice_is_storing_once(index: BlockIndex) -> None:
    (a,) = nodes(index, 1)
    index.store(a, Tier.HOST, pack(names(3) + names(3)))
    index.store(a, Tier.HOST, pack(names(3)))
    assert (len(index), index.copies(a)) == (3, 3)
    index.remove(a, Tier.HOST, pack(names(3)))
    index.remove(a, Tier.HOST, pack(names(3)))
    assert (len(index), index.copies(a)) == (0, 0)
    index.check_integrity()


def test_a_gap_inside_a_chain_ends_the_answer(index: BlockIndex) -> None:
    (a,) = nodes(index, 1)
    chain = names(512)
    index.store(a, Tier.HOST, pack(chain))
    for gap in (511, 300, 65, 64, 63, 1, 0):
        index.remove(a, Tier.HOST, chain[gap])
        assert sum(run.blocks for run in index.lookup(pack(chain))) == gap


def test_the_longest_run_wins_over_the_better_tier(index: BlockIndex) -> None:
    a, b = nodes(index, 2)
    chain = names(6)
    index.store(a, Tier.HOST, pack(chain[:2]))
    index.store(b, Tier.DISK, pack(chain[:5]))
    assert index.lookup(pack(chain)) == [Run(b, Tier.DISK, 0, 5)]


def test_of_equally_long_runs_host_is_taken_before_disk_before_device(index: BlockIndex) -> None:
    a, b, c = nodes(index, 3)
    chain = names(4)
    index.store(a, Tier.DEVICE, pack(chain))
    assert index.lookup(pack(chain)) == [Run(a, Tier.DEVICE, 0, 4)]
    index.store(b, Tier.DISK, pack(chain))
    assert index.lookup(pack(chain)) == [Run(b, Tier.DISK, 0, 4)]
    index.store(c, Tier.HOST, pack(chain))
    assert index.lookup(pack(chain)) == [Run(c, Tier.HOST, 0, 4)]


def test_segments_follow_each_other_over_all_holders(index: BlockIndex) -> None:
    a, b = nodes(index, 2)
    chain = names(9)
    index.store(a, Tier.HOST, pack(chain[:4]))
    index.store(b, Tier.HOST, pack(chain[2:7]))
    index.store(a, Tier.DISK, pack(chain[6:8]))
    assert index.lookup(pack(chain)) == [
        Run(a, Tier.HOST, 0, 4),
        Run(b, Tier.HOST, 4, 3),
        Run(a, Tier.DISK, 7, 1),
    ]


def test_the_asker_is_not_sent_to_itself(index: BlockIndex) -> None:
    a, b = nodes(index, 2)
    chain = names(4)
    index.store(a, Tier.HOST, pack(chain))
    index.store(a, Tier.DISK, pack(chain))
    index.store(b, Tier.DISK, pack(chain[:2]))
    assert index.lookup(pack(chain), asker=a) == [Run(b, Tier.DISK, 0, 2)]
    assert index.lookup(pack(chain), asker=b) == [Run(a, Tier.HOST, 0, 4)]


def test_readers_of_different_chains_spread_over_equal_holders(index: BlockIndex) -> None:
    holders = nodes(index, 4)
    heads = names(200)
    for node in holders:
        index.store(node, Tier.HOST, pack(heads))
    chosen = [index.lookup(head)[0].node for head in heads]
    assert min(chosen.count(node) for node in holders) > 20
    assert chosen == [index.lookup(head)[0].node for head in heads]


def test_every_holder_of_every_block_is_located(index: BlockIndex) -> None:
    a, b = nodes(index, 2)
    chain = names(3)
    index.store(b, Tier.DISK, pack(chain[:2]))
    index.store(a, Tier.HOST, pack(chain[:1]))
    index.store(b, Tier.DEVICE, pack(chain[:1]))
    assert index.locate(pack(chain)) == [
        ((a, Tier.HOST), (b, Tier.DISK), (b, Tier.DEVICE)),
        ((b, Tier.DISK),),
        (),
    ]


def test_a_dropped_node_is_gone_at_once_and_swept_out_later(index: BlockIndex) -> None:
    a, b = nodes(index, 2)
    chain = names(4)
    index.store(a, Tier.HOST, pack(chain))
    index.store(b, Tier.DISK, pack(chain[:2]))
    index.drop_node(a)
    assert index.lookup(pack(chain)) == [Run(b, Tier.DISK, 0, 2)]
    assert index.locate(chain[0]) == [((b, Tier.DISK),)]
    assert index.all_copies == 2
    index.check_integrity()
    index.sweep()
    assert len(index) == 2
    index.check_integrity()
    assert index.add_node() == a
    assert index.lookup(pack(chain)) == [Run(b, Tier.DISK, 0, 2)]


def test_dropped_copies_are_swept_out_before_they_are_many(index: BlockIndex) -> None:
    a, b = nodes(index, 2)
    index.store(a, Tier.HOST, pack(names(6_000, "a")))
    index.store(b, Tier.HOST, pack(names(6_000, "b")))
    index.drop_node(a)
    assert len(index) == 6_000
    index.check_integrity()


@pytest.mark.parametrize("half", [slice(0, 8), slice(8, 16)])
def test_names_that_share_a_half_are_told_apart(index: BlockIndex, half: slice) -> None:
    (a,) = nodes(index, 1)
    alike = []
    for name in names(650):
        twin = bytearray(name)
        twin[half] = bytes(8)
        alike.append(bytes(twin))
    for name in alike[:600]:
        index.store(a, Tier.HOST, name)
    assert len(index) == 600
    assert index.locate(pack(alike)) == 600 * [((a, Tier.HOST),)] + 50 * [()]
    index.check_integrity()


def test_the_index_grows_and_shrinks_with_its_blocks(index: BlockIndex) -> None:
    (a,) = nodes(index, 1)
    small = index.bytes_held
    blocks = names(30_000)
    index.store(a, Tier.HOST, pack(blocks))
    assert [run.blocks for run in index.lookup(pack(blocks))] == [30_000]
    index.check_integrity()
    assert (index.bytes_held - small) / len(index) < 100
    index.remove(a, Tier.HOST, pack(blocks[10:]))
    index.check_integrity()
    assert index.bytes_held < small + 200_000
    assert [run.blocks for run in index.lookup(pack(blocks))] == [10]


def test_blocks_with_eight_holders_cost_no_more_than_with_one(index: BlockIndex) -> None:
    blocks = pack(names(20_000))
    one, *others = nodes(index, 8)
    index.store(one, Tier.HOST, blocks)
    alone = index.bytes_held
    for node in others:
        index.store(node, Tier.HOST, blocks)
    assert index.bytes_held < 1.1 * alone
    assert len(index.locate(blocks[:16])[0]) == 8


def test_every_block_may_have_a_set_of_holders_of_its_own(index: BlockIndex) -> None:
    members = nodes(index, 12)
    blocks = names(4_096)
    for bit, node in enumerate(members):
        index.store(node, Tier.HOST, pack(b for at, b in enumerate(blocks) if at >> bit & 1))
    index.check_integrity()
    for at in (0, 1, 2_730, 4_095):
        expected = {node for bit, node in enumerate(members) if at >> bit & 1}
        assert {node for node, _ in index.locate(blocks[at])[0]} == expected
    for node in members[::2]:
        index.remove(node, Tier.HOST, pack(blocks))
    index.check_integrity()
    assert {node for node, _ in index.locate(blocks[4_095])[0]} == set(members[1::2])


def test_a_block_may_be_held_by_every_node(index: BlockIndex) -> None:
    head = names(1)[0]
    members = nodes(index, 500)
    for node in reversed(members):
        index.store(node, Tier.HOST, head)
        index.store(node, Tier.DEVICE, head)
    assert len(index.locate(head)[0]) == 1_000
    index.check_integrity()
    for node in members[1:]:
        index.remove(node, Tier.HOST, head)
        index.drop_node(node)
    assert index.locate(head) == [((members[0], Tier.HOST), (members[0], Tier.DEVICE))]
    index.sweep()
    index.check_integrity()


def test_a_node_keeps_no_more_copies_than_it_may() -> None:
    index = BlockIndex(SEED, blocks_per_node=10)
    a, b = nodes(index, 2)
    chain = names(20)
    index.store(a, Tier.HOST, pack(chain[:6]))
    index.store(a, Tier.DISK, pack(chain[:6]))
    index.store(b, Tier.HOST, pack(chain[:10]))
    assert (index.copies(a), index.copies(b), index.refused) == (10, 10, 2)
    index.remove(a, Tier.HOST, chain[0])
    index.store(a, Tier.HOST, chain[19])
    assert index.locate(chain[19]) == [((a, Tier.HOST),)]
    index.check_integrity()


def test_there_are_only_so_many_nodes_and_numbers_come_back(
    index: BlockIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_index, "MAX_NODES", 3)
    a, _, c = nodes(index, 3)
    assert index.add_node() is None
    index.store(c, Tier.HOST, names(1)[0])
    index.drop_node(c)
    index.drop_node(a)
    assert len(nodes(index, 3)) == 2
    assert index.locate(names(1)[0]) == [()]
    index.check_integrity()


def colliding(home: int, length: int, count: int, seed: int) -> bytes:
    """Names that all belong in slot `home` of a table of `length`, as one who knows SEED finds."""
    random = np.frombuffer(
        np.random.default_rng(seed).bytes(16 * int(1.2 * count * length)), np.uint64
    ).reshape(-1, 2)
    low_half, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    words = block_index._expand(SEED)
    mixed = np.full(len(random), words[0])
    for column in (0, 1):
        mixed += words[1 + 2 * column] * (random[:, column] & low_half)
        mixed += words[2 + 2 * column] * (random[:, column] >> shift)
    homes = ((mixed >> shift) * np.uint64(length)) >> shift
    found = random[homes == home][:count]
    assert len(found) == count
    return found.tobytes()


def test_names_chosen_to_collide_are_refused_instead_of_slowing_everyone(
    index: BlockIndex,
) -> None:
    (a,) = nodes(index, 1)
    evil = colliding(home=7, length=block_index.MIN_SLOTS, count=560, seed=1)
    beyond = 560 - block_index.MAX_PROBES
    index.store(a, Tier.HOST, evil)
    assert len(index) == block_index.MAX_PROBES
    assert index.crowded == beyond
    index.check_integrity()
    good = names(50)
    index.store(a, Tier.HOST, pack(good))
    known = sum(map(bool, index.locate(pack(good))))
    assert index.crowded == beyond + 50 - known
    index.remove(a, Tier.HOST, evil)
    assert len(index) == known
    index.store(a, Tier.HOST, pack(good))
    assert index.lookup(pack(good)) == [Run(a, Tier.HOST, 0, 50)]
    index.check_integrity()


def test_names_that_collide_only_in_a_smaller_table_are_crowded_out_of_it(
    index: BlockIndex,
) -> None:
    a, b, filler = nodes(index, 3)
    index.store(filler, Tier.HOST, pack(names(2_500)))
    index.remove(filler, Tier.HOST, pack(names(1_800)))
    length = index._length
    first, second = (colliding(home, length, 400, home) for home in (1_000, 1_500))
    index.store(a, Tier.HOST, first)
    index.store(a, Tier.DISK, second)
    index.store(b, Tier.HOST, second[-16:])
    known, crowded = index.copies(a), index.crowded
    index.drop_node(filler)
    index.sweep()
    assert index._length < length
    assert index.crowded > crowded
    assert index.copies(a) == len(index) == known - (index.crowded - crowded)
    assert index.copies(b) == 0
    index.check_integrity()


def test_an_answer_has_no_more_runs_than_a_message_may_carry(index: BlockIndex) -> None:
    a, b = nodes(index, 2)
    chain = names(block_index.MAX_RUNS + 10)
    index.store(a, Tier.HOST, pack(chain[::2]))
    index.store(b, Tier.HOST, pack(chain[1::2]))
    runs = index.lookup(pack(chain))
    assert len(runs) == block_index.MAX_RUNS
    assert [run.start for run in runs] == list(range(block_index.MAX_RUNS))
