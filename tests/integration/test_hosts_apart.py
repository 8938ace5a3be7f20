"""Two engines on hosts of their own, and what happens when these are cut off from each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from kvbm_service.adapters.nixl_reader import QUIET_SECONDS
from kvbm_service.demo.engine import BLOCK_TOKENS, Engine, share_cores
from tests.integration.conftest import Reference
from tests.integration.node import (
    LOOKUP_SECONDS,
    MEMBERSHIP_SECONDS,
    TRANSFER_SECONDS,
    Node,
    node_options,
    prompt,
    same,
)
from tests.integration.witness import Witness
from tests.world import Line, World
from tests.world.nats import NatsOnHost
from tests.world.registry import start_registry
from tests.world.skipping import world_or_skip

BLOCKS = 4
SLACK_SECONDS = 15.0
"""For computing the prompt, on slow cores."""
WAIT_SECONDS = 2 * LOOKUP_SECONDS + TRANSFER_SECONDS + QUIET_SECONDS + SLACK_SECONDS
SHARE_SECONDS = 60.0
"""How soon after healing blocks are shared again: tests/faults/site.py adds it up."""

TROUBLES: dict[str, Callable[[World], None]] = {
    "no bytes either way": lambda world: world.cut("a", "b"),
    "no bytes from the owner": lambda world: world.cut_one_way("a", "b"),
    "no requests to the owner": lambda world: world.cut_one_way("b", "a"),
    "the reader without NATS": lambda world: world.cut("b", "nats"),
    "the reader alone": lambda world: world.isolate("b"),
    "a lossy line": lambda world: world.set_lines("a", "b", Line(loss=0.05)),
}


class Apart(NamedTuple):
    """Two engines, each on a host of its own."""

    world: World
    a: Node
    b: Node


@pytest.fixture(scope="module")
def apart(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    """NATS, a registry, a witness and the engines, on five hosts."""
    folder = tmp_path_factory.mktemp("apart")
    with world_or_skip("nats", "registry", "a", "b", "witness", seed=6) as world:
        nats = NatsOnHost(world["nats"], folder / "nats")
        nats.start()
        start_registry(world["registry"], nats.url, folder / "registry.log", MEMBERSHIP_SECONDS)
        witness = world["witness"].run(Witness, nats.url, MEMBERSHIP_SECONDS)
        engines = []
        try:
            for name, cores in zip("ab", share_cores(engines=2), strict=True):
                log = folder / f"{name}.log"
                options = node_options(model, log, nats.url, name, cores=cores)
                # Between real hosts there is no shared memory; here UCX would find a way.
                environment = dict(options.environment) | {"UCX_TLS": "tcp,self"}
                options = dataclasses.replace(options, environment=environment)
                engines.append(world[name].run(Engine, options))
            a, b = (Node(engine.wait_ready(), witness).wait_joined() for engine in engines)
            b.wait_until_it_reads_from(a, SHARE_SECONDS)
            yield Apart(world, a, b)
        finally:
            for engine in engines:
                engine.kill()
            witness.close()


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
def test_answers_are_those_of_an_engine_without_a_cache(
    reference: Reference, apart: Apart, trouble: Callable[[World], None]
) -> None:
    world, a, b = apart
    name = next(name for name, each in TROUBLES.items() if each is trouble)
    shared, own, new, late = (prompt((name, part), BLOCKS) for part in range(4))
    a.compute(shared, BLOCKS)
    b.compute(own, BLOCKS)
    b.forget_device()
    trouble(world)
    try:
        for node, question in ((b, shared), (b, own), (b, new), (a, own)):
            answer = node.ask(question)
            assert same(answer, reference.answer(question))
            assert answer.seconds < WAIT_SECONDS
            if (node, question) == (b, own):
                assert answer.cached_tokens == BLOCKS * BLOCK_TOKENS
    finally:
        world.heal()
    b.wait_until_it_reads_from(a, SHARE_SECONDS)
    a.compute(late, BLOCKS)
    answer = b.ask(late)
    assert same(answer, reference.answer(late))
    assert answer.cached_tokens == BLOCKS * BLOCK_TOKENS
    for node in (a, b):
        node.check_at_rest()
