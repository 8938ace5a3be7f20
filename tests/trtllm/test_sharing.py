"""Two engines over a real NATS server and registry; and who must not share."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from kvbm_connectors import trtllm_worker
from kvbm_service.adapters.nats_server import EmbeddedNats
from tests.connectors.cluster import PATIENCE_SECONDS, LiveRegistry, eventually
from tests.trtllm.engine import Engine
from tests.trtllm.executor import State

SLOW_SAVE_SECONDS = 0.5
PROMPT = [13 * i % 401 for i in range(50)]
FULL_BLOCKS = 12


@pytest.fixture
def make_node(
    make_engine: Callable[..., Engine], nats: EmbeddedNats, registry: LiveRegistry
) -> Callable[..., Engine]:
    def make(name: str, **shape: object) -> Engine:
        return make_engine(
            {
                "KVBM_NATS_URL": nats.url,
                "KVBM_NODE_NAME": name,
                "KVBM_LOOKUP_DEADLINE_MS": "5000",
            },
            **shape,
        )

    return make


def test_the_last_blocks_of_a_resting_engine_are_seen_without_another_step(
    make_node: Callable[..., Engine], registry: LiveRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trtllm_worker, "LINGER_SECONDS", PATIENCE_SECONDS)
    engine = make_node("a", ranks=2)
    number = engine.submit(PROMPT, max_new=1)
    engine.gate(1).saves.close()
    late = threading.Timer(SLOW_SAVE_SECONDS, engine.gate(1).saves.open)
    late.start()
    engine.step_until(lambda: engine.request(number).state is State.DONE)
    late.join()
    eventually(lambda: registry.copies == FULL_BLOCKS)


def meet(first: Engine, second: Engine, registry: LiveRegistry) -> None:
    """Until the second finds what it has never seen: the first's blocks."""
    prompts = ([start, *PROMPT[1:]] for start in range(1, 400))

    def found() -> bool:
        prompt = next(prompts)
        before = registry.copies
        first.run(prompt, max_new=1)
        eventually(lambda: registry.copies >= before + FULL_BLOCKS)
        return second.run(prompt, max_new=1).matched == FULL_BLOCKS * 4

    eventually(found)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_one_engine_computed_is_read_by_another(
    make_node: Callable[..., Engine], registry: LiveRegistry, ranks: int
) -> None:
    first, second = make_node("a", ranks=ranks), make_node("b", ranks=ranks)
    meet(first, second, registry)
    assert all(second.gate(rank).pulls.blocks == FULL_BLOCKS for rank in range(ranks))


def test_engines_whose_pools_differ_do_not_see_each_other(
    make_node: Callable[..., Engine], registry: LiveRegistry
) -> None:
    first = make_node("a")
    second = make_node("b", model="no/other-model")
    assert first.service.scope != second.service.scope


def test_two_salts_never_share(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.run(PROMPT, cache_salt_id=1)
    engine.forget_cached()
    assert engine.run(PROMPT, cache_salt_id=2).matched == 0
    engine.forget_cached()
    assert engine.run(PROMPT).matched == 0
    engine.forget_cached()
    assert engine.run(PROMPT, cache_salt_id=1).matched == FULL_BLOCKS * 4


def test_two_lora_adapters_never_share(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.run(PROMPT, lora_task_id=1)
    engine.forget_cached()
    assert engine.run(PROMPT, lora_task_id=2).matched == 0
    engine.forget_cached()
    assert engine.run(PROMPT, lora_task_id=1).matched == FULL_BLOCKS * 4


def test_an_adapter_of_one_engine_is_no_adapter_of_another(
    make_node: Callable[..., Engine], registry: LiveRegistry
) -> None:
    first, second = make_node("a"), make_node("b")
    meet(first, second, registry)
    before = registry.copies
    first.run(PROMPT, lora_task_id=1)
    eventually(lambda: registry.copies == before + FULL_BLOCKS)
    assert second.run(PROMPT, lora_task_id=1).matched == 0


def test_a_request_with_an_image_is_left_alone(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.run(PROMPT, multimodal_hashes=[[1, 2, 3]])
    engine.forget_cached()
    assert engine.run(PROMPT, multimodal_hashes=[[1, 2, 3]]).matched == 0
