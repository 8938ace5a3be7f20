"""Asking the registry: the engine is never kept waiting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from kvbm_service.adapters.nats_server import EmbeddedNats
from tests.connectors.cluster import SilentRegistry, eventually
from tests.connectors.engine import Engine, prompt

MakeEngine = Callable[..., Engine]


@pytest.fixture
def registry(nats: EmbeddedNats) -> Iterator[SilentRegistry]:
    with SilentRegistry(nats.url) as registry:
        yield registry


def online(make_engine: MakeEngine, nats: EmbeddedNats, deadline_ms: int) -> Engine:
    """An engine that asks registries."""
    extra = {"KVBM_LOOKUP_DEADLINE_MS": deadline_ms}
    engine = make_engine(nats=nats.url, extra=extra)
    eventually(lambda: engine.core.peers.online)
    return engine


def test_a_request_waits_for_the_answer_while_others_are_served(
    make_engine: MakeEngine, nats: EmbeddedNats, registry: SilentRegistry
) -> None:
    engine = online(make_engine, nats, deadline_ms=10_000)
    waiting = engine.submit(prompt(41))
    short = engine.submit(prompt(3), tokens=4)  # less than a block: nothing to ask for
    engine.until(lambda: short.finished)
    eventually(lambda: registry.asked)
    for _ in range(20):
        engine.step()
    assert not waiting.computed
    registry.answer()
    engine.run()
    assert waiting.answer == waiting.text.generated(1)


def test_a_registry_that_never_answers_costs_no_more_than_the_deadline(
    make_engine: MakeEngine, nats: EmbeddedNats, registry: SilentRegistry
) -> None:
    engine = online(make_engine, nats, deadline_ms=300)
    began = time.monotonic()
    asked = engine.submit(prompt(41))
    engine.until(lambda: asked.computed)
    assert time.monotonic() - began >= 0.3
    engine.run()
    assert registry.asked
    assert asked.answer == asked.text.generated(1)


def test_where_no_registry_is_the_request_is_computed_at_once(
    make_engine: MakeEngine, nats: EmbeddedNats
) -> None:
    engine = online(make_engine, nats, deadline_ms=10_000)
    began = time.monotonic()
    asked = engine.ask(prompt(41))
    assert asked.computed == 41
    assert time.monotonic() - began < 9


def test_a_lookup_deadline_of_zero_asks_nobody(
    make_engine: MakeEngine, nats: EmbeddedNats, registry: SilentRegistry
) -> None:
    engine = online(make_engine, nats, deadline_ms=0)
    engine.ask(prompt(41))
    engine.forget_device()
    assert engine.ask(prompt(41)).loaded == 40
    assert not registry.asked


def test_a_request_aborted_while_it_waits_for_the_answer_leaves_nothing(
    make_engine: MakeEngine, nats: EmbeddedNats, registry: SilentRegistry
) -> None:
    engine = online(make_engine, nats, deadline_ms=10_000)
    asked = engine.submit(prompt(41))
    eventually(lambda: registry.asked)
    engine.step()
    engine.abort(asked)
    registry.answer()
    engine.run()
    assert not asked.computed


def test_what_is_here_already_is_served_without_asking(
    make_engine: MakeEngine, nats: EmbeddedNats, registry: SilentRegistry
) -> None:
    engine = online(make_engine, nats, deadline_ms=10_000)
    first = engine.submit(prompt(41))
    eventually(lambda: registry.asked)
    registry.answer()
    engine.run()
    engine.forget_device()
    again = engine.ask(prompt(41))
    assert (again.loaded, again.computed) == (40, 1)
    assert first.finished
    assert not registry.asked


def test_an_engine_whose_nats_is_lost_goes_on_with_its_own_blocks(
    make_engine: MakeEngine, nats: EmbeddedNats, registry: SilentRegistry
) -> None:
    engine = online(make_engine, nats, deadline_ms=300)
    engine.ask(prompt(41))
    nats.kill()
    eventually(lambda: not engine.core.peers.online)
    engine.forget_device()
    assert engine.ask(prompt(61)).loaded == 40
