"""What one engine computes is found again in its own tiers, byte by byte."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.trtllm.contract import check_signatures
from tests.trtllm.engine import Engine
from tests.trtllm.forms import Form
from tests.trtllm.pool import BLOCK_TOKENS

PROMPT = [7 * i % 401 for i in range(50)]
FULL = (len(PROMPT) - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def test_every_method_is_there_and_takes_what_the_executor_gives(form: Form) -> None:
    connector = form.connector
    check_signatures(form, connector.KvbmConnectorLeader, connector.KvbmConnectorWorker)
    check_signatures(form, connector.DynamoKVBMConnectorLeader, connector.DynamoKVBMConnectorWorker)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_prompt_that_the_device_has_lost_comes_back_from_the_host(
    make_engine: Callable[..., Engine], ranks: int
) -> None:
    engine = make_engine(ranks=ranks)
    assert engine.run(PROMPT).matched == 0
    engine.forget_cached()
    assert engine.run(PROMPT).matched == FULL


def test_only_what_the_device_lacks_is_loaded(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.run(PROMPT)
    engine.forget_cached()
    engine.run(PROMPT[:20])
    again = engine.run(PROMPT)
    assert (again.reused, again.matched) == (20, FULL - 20)


def test_blocks_that_are_filled_while_generating_are_kept(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine()
    first = engine.run(PROMPT, max_new=10)
    engine.forget_cached()
    conversation = [*first.tokens, 5, 6, 7]
    kept = (len(first.tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert engine.run(conversation).matched == kept


def test_prompts_that_part_share_the_blocks_before(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.run(PROMPT)
    engine.forget_cached()
    assert engine.run(PROMPT[:30] + [400] * 20).matched == 28


def test_several_requests_at_once_each_get_their_own_bytes(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine(ranks=2, blocks=96)
    prompts = [[start, *PROMPT[:30]] for start in range(5)]
    for prompt in prompts:
        engine.run(prompt)
    engine.forget_cached()
    numbers = [engine.submit(prompt) for prompt in prompts]
    engine.step_until(lambda: engine.at_rest)
    assert [engine.request(number).matched for number in numbers] == [28] * 5
    for number, prompt in zip(numbers, prompts, strict=True):
        assert engine.request(number).generated == engine.request(number).text.generated(2), prompt


def test_a_device_with_room_for_less_than_was_promised_computes_the_rest(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine(ranks=2)
    engine.run(PROMPT)
    engine.forget_cached()
    for rank in engine.ranks:
        rank.reserve_blocks = 3
    assert engine.run(PROMPT).matched == FULL


def test_a_device_with_no_room_for_what_was_promised_computes_it_all(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine(ranks=2)
    engine.run(PROMPT)
    engine.forget_cached()
    for rank in engine.ranks:
        rank.reserve_blocks = 0
    assert engine.run(PROMPT).matched == FULL
