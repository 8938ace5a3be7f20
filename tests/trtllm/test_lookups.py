"""The one question that is asked, on the thread that runs the engine: it is answered in time."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from kvbm_service.adapters.nats_server import EmbeddedNats
from tests.connectors.cluster import SilentRegistry, eventually
from tests.trtllm.engine import Engine

PROMPT = [19 * i % 401 for i in range(50)]
DEADLINE_SECONDS = 1.0
LONG_SECONDS = 10.0
A_SLOW_MACHINE_SECONDS = 20.0


@pytest.fixture
def deadline_seconds() -> float:
    return DEADLINE_SECONDS


@pytest.fixture
def engine(
    make_engine: Callable[..., Engine], nats: EmbeddedNats, deadline_seconds: float
) -> Engine:
    return make_engine(
        {
            "KVBM_NATS_URL": nats.url,
            "KVBM_NODE_NAME": "a",
            "KVBM_LOOKUP_DEADLINE_MS": str(int(deadline_seconds * 1000)),
        }
    )


def test_a_registry_that_does_not_answer_costs_one_deadline_and_what_is_here_is_used(
    engine: Engine, nats: EmbeddedNats
) -> None:
    engine.run(PROMPT)
    with SilentRegistry(nats.url) as registry:
        others = ([first, *PROMPT[1:]] for first in range(1, 400))

        def asks() -> bool:
            engine.run(next(others), max_new=1)
            return bool(registry.asked)

        eventually(asks)
        engine.run(PROMPT)  # the others may have pushed it out
        engine.forget_cached()
        longer = [*PROMPT, *range(20)]
        began = time.monotonic()
        engine.submit(longer)
        engine.step()
        took = time.monotonic() - began
        assert engine.request(max(engine.ranks[0].requests)).matched == 48
        assert DEADLINE_SECONDS / 4 < took < DEADLINE_SECONDS + A_SLOW_MACHINE_SECONDS


@pytest.mark.parametrize("deadline_seconds", [LONG_SECONDS], ids=["patient"])
def test_a_prompt_that_is_all_here_waits_for_nobody(engine: Engine, nats: EmbeddedNats) -> None:
    engine.run(PROMPT)
    engine.forget_cached()
    with SilentRegistry(nats.url):
        began = time.monotonic()
        engine.submit(PROMPT)
        engine.step()
        assert time.monotonic() - began < LONG_SECONDS - 1
        assert engine.request(max(engine.ranks[0].requests)).matched == 48
