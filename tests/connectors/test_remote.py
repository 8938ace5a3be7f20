"""Blocks that one engine has computed are read by another, over NATS and NIXL."""

from __future__ import annotations

from collections.abc import Callable

from tests.connectors.cluster import LiveRegistry, eventually
from tests.connectors.engine import Engine, prompt
from tests.connectors.releases import needs_sources

MakeEngine = Callable[..., Engine]


def meet(*engines: Engine) -> None:
    """Wait until all know each other."""
    names = {engine.shape.node for engine in engines}
    for engine in engines:
        others = names - {engine.shape.node}
        eventually(
            lambda engine=engine, others=others: (
                engine.core.peers.online
                and all(engine.core.peers.can_ask(node, 0.0) for node in others)
            )
        )


def nothing_leased(engine: Engine) -> bool:
    return len(engine.core.lending.leases) == 0 and engine.core.tiers.host.pinned == 0


def test_a_prompt_computed_by_one_engine_is_read_by_another(
    make_node: MakeEngine, registry: LiveRegistry
) -> None:
    owner, reader = make_node("owner"), make_node("reader")
    meet(owner, reader)
    owner.ask(prompt(41))
    eventually(lambda: registry.copies == 10)
    asked = reader.ask(prompt(41), tokens=5)
    assert (asked.loaded, asked.computed) == (40, 5)
    assert reader.ranks[0].gate.pulls.blocks == 10
    eventually(lambda: nothing_leased(owner))


def test_what_is_read_from_another_node_a_second_time_is_kept(
    make_node: MakeEngine, registry: LiveRegistry
) -> None:
    owner, reader = make_node("owner"), make_node("reader")
    meet(owner, reader)
    owner.ask(prompt(41))
    eventually(lambda: registry.copies == 10)
    pulls = reader.ranks[0].gate.pulls
    for times_read, copies in ((1, 10), (2, 20), (2, 20)):
        assert reader.ask(prompt(41)).loaded == 40
        assert pulls.calls == times_read
        eventually(lambda copies=copies: registry.copies == copies)
        assert len(reader.core.tiers.host) == copies - 10
        reader.forget_device()
    eventually(lambda: nothing_leased(owner))


def test_a_beginning_from_here_and_an_end_from_there_make_one_prefix(
    make_node: MakeEngine, registry: LiveRegistry
) -> None:
    owner, reader = make_node("owner"), make_node("reader")
    meet(owner, reader)
    reader.ask(prompt(21))
    eventually(lambda: registry.copies == 5)
    owner.ask(prompt(61))  # which uses the reader's five blocks in place
    eventually(lambda: registry.copies == 15)
    reader.forget_device()
    asked = reader.ask(prompt(61))
    assert (asked.loaded, asked.computed) == (60, 1)
    gate = reader.ranks[0].gate
    assert (gate.loads.blocks, gate.pulls.blocks) == (5, 10)
    eventually(lambda: nothing_leased(owner))


@needs_sources
def test_tokens_from_here_and_from_there_are_told_apart(
    make_node: MakeEngine, registry: LiveRegistry
) -> None:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    owner, reader = make_node("owner"), make_node("reader")
    meet(owner, reader)
    reader.ask(prompt(21))
    eventually(lambda: registry.copies == 5)
    owner.ask(prompt(61))  # which uses the reader's five blocks in place
    eventually(lambda: registry.copies == 15)
    reader.forget_device()
    pulls = reader.ranks[0].gate.pulls
    pulls.close()
    asked = reader.submit(prompt(61))
    reader.until(lambda: pulls.waiting)
    sources = reader.connector.get_external_cache_hit_sources(asked.request, 60)
    assert sources == {CacheHitSource.HOST: 20, CacheHitSource.P2P: 40}
    pulls.open()
    reader.run()
    eventually(lambda: nothing_leased(owner))


def test_two_ranks_read_each_its_own_share(make_node: MakeEngine, registry: LiveRegistry) -> None:
    owner, reader = make_node("owner", ranks=2), make_node("reader", ranks=2)
    meet(owner, reader)
    owner.ask(prompt(41))
    eventually(lambda: registry.copies == 10)
    asked = reader.ask(prompt(41))
    assert (asked.loaded, asked.computed) == (40, 1)
    assert [rank.gate.pulls.blocks for rank in reader.ranks] == [10, 10]
    eventually(lambda: nothing_leased(owner))


def test_engines_of_different_shapes_do_not_see_each_other(
    make_node: MakeEngine, registry: LiveRegistry
) -> None:
    one, two = make_node("one", ranks=1), make_node("two", ranks=2)
    for engine in (one, two):
        eventually(lambda engine=engine: engine.core.peers.online)
    one.ask(prompt(41))
    eventually(lambda: registry.copies == 10)
    asked = two.ask(prompt(41))
    assert asked.loaded == 0


def test_blocks_that_cannot_be_read_are_computed_and_their_owner_is_left_alone(
    make_node: MakeEngine, registry: LiveRegistry
) -> None:
    owner, reader = make_node("owner"), make_node("reader")
    meet(owner, reader)
    owner.ask(prompt(41))
    owner.ask(prompt(41, seed=1))
    eventually(lambda: registry.copies == 20)
    pulls = reader.ranks[0].gate.pulls
    pulls.failing = True
    asked = reader.ask(prompt(41))
    assert (asked.loaded, asked.computed) == (40, 41)
    reader.ask(prompt(41, seed=1))
    assert pulls.calls == 1
    eventually(lambda: nothing_leased(owner))


def test_one_rank_that_cannot_read_from_the_owner_makes_all_compute(
    make_node: MakeEngine, registry: LiveRegistry
) -> None:
    owner, reader = make_node("owner", ranks=2), make_node("reader", ranks=2)
    meet(owner, reader)
    owner.ask(prompt(41))
    eventually(lambda: registry.copies == 10)
    reader.ranks[1].gate.pulls.loses = 4
    asked = reader.ask(prompt(41))
    assert asked.computed == 1 + 4 * 4
    eventually(lambda: nothing_leased(owner))


def test_a_request_aborted_while_it_reads_gives_its_lease_back(
    make_node: MakeEngine, registry: LiveRegistry
) -> None:
    owner, reader = make_node("owner"), make_node("reader")
    meet(owner, reader)
    owner.ask(prompt(41))
    eventually(lambda: registry.copies == 10)
    pulls = reader.ranks[0].gate.pulls
    pulls.close()
    asked = reader.submit(prompt(41))
    reader.until(lambda: pulls.waiting)
    assert owner.core.tiers.host.pinned == 10
    reader.abort(asked)
    pulls.open()
    reader.run()
    eventually(lambda: nothing_leased(owner))


def test_what_the_owner_has_lost_meanwhile_is_computed(
    make_node: MakeEngine, registry: LiveRegistry
) -> None:
    owner, reader = make_node("owner"), make_node("reader")
    meet(owner, reader)
    owner.ask(prompt(41))
    eventually(lambda: registry.copies == 10)
    pulls = reader.ranks[0].gate.pulls
    pulls.close()
    asked = reader.submit(prompt(41))
    reader.until(lambda: pulls.waiting)
    owner.ranks[0].slab.headers["fill"] += 1  # as if other blocks were in these slots now
    pulls.open()
    reader.run()
    assert asked.answer == asked.text.generated(1)
    assert asked.computed == 41
    eventually(lambda: nothing_leased(owner))


def test_an_owner_that_has_gone_costs_a_computation(
    make_node: MakeEngine, make_engine: MakeEngine, registry: LiveRegistry
) -> None:
    owner, reader = make_node("owner"), make_node("reader")
    meet(owner, reader)
    owner.ask(prompt(41))
    eventually(lambda: registry.copies == 10)
    owner.scheduler.connector._scheduler_side.close()
    asked = reader.ask(prompt(41))
    assert asked.computed == 41


def test_both_engines_read_from_each_other_at_once(
    make_node: MakeEngine, registry: LiveRegistry
) -> None:
    one, two = make_node("one"), make_node("two")
    meet(one, two)
    one.ask(prompt(41, seed=1))
    two.ask(prompt(41, seed=2))
    eventually(lambda: registry.copies == 20)
    first = one.submit(prompt(41, seed=2))
    second = two.submit(prompt(41, seed=1))

    def both_finished() -> bool:
        two.step()
        return first.finished and second.finished

    one.until(both_finished)
    one.run()
    two.run()
    assert (first.computed, second.computed) == (1, 1)
    eventually(lambda: nothing_leased(one) and nothing_leased(two))
