"""Engines killed while they offload: the next ones begin with hits, and answer right."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future

import pytest

from kvbm_service.demo.engine import EngineFailed
from kvbm_service.demo.talk import Answer
from tests.integration.conftest import Options, Reference
from tests.integration.node import ANSWER_SECONDS, prompt, same
from tests.integration.option import (
    D2DISK,
    D2H,
    FROM_DISK,
    FROM_HOST,
    H2DISK,
    MATCHED,
    Option,
    failures,
    tokens,
    wait,
)

BLOCKS = 6
FULL_SPEED = 12
"""So many prompts are under way when the engine is killed."""
INTO = {"cpu": D2H, "both": H2DISK, "disk": D2DISK}


def known(name: str) -> list[int]:
    """What the engine was asked long before its end."""
    return prompt(("known", name), BLOCKS)


def storm(name: str) -> list[list[int]]:
    """What it was busy with at its end: all of it twice, as the disk wants it."""
    return [prompt(("storm", name, number), BLOCKS) for number in range(FULL_SPEED)] * 2


def kill_while_it_offloads(option: Option) -> list[Future[Answer]]:
    """Returns the answers that were under way, some of which never came."""
    for _ in range(2):
        option.ask(known(option.name))
        option.forget_device()
    path = INTO[option.name]
    before = option.samples()[path]
    answers = option.ask_all(storm(option.name))
    wait(
        f"{option.name} is in the middle of it",
        lambda: option.samples()[path] >= before + FULL_SPEED,
        ANSWER_SECONDS,
    )
    option.kill()
    return answers


@pytest.fixture(scope="module")
def killed(all_options: Options) -> dict[str, list[Future[Answer]]]:
    """Each option's engine has been killed, and another one started in its place."""
    for option in all_options:
        option.start()
    answers = {option.name: kill_while_it_offloads(option) for option in all_options}
    for option in all_options:
        option.start()
    return answers


@pytest.mark.parametrize("name", ["cpu", "both", "disk"])
def test_the_first_request_after_a_kill_hits(
    options: Options, killed: dict[str, list[Future[Answer]]], reference: Reference, name: str
) -> None:
    option: Option = getattr(options, name)
    assert any(answer.exception() for answer in killed[name]), "it had done all of its work"
    answer = option.ask(known(name))
    assert answer.cached_tokens == tokens(BLOCKS)
    assert same(answer, reference.answer(known(name)))
    counted = option.since({}, lambda by: by[FROM_HOST] + by[FROM_DISK] > 0)
    assert counted[FROM_HOST] + counted[FROM_DISK] == BLOCKS
    assert counted[FROM_HOST] == (BLOCKS if name == "cpu" else counted[FROM_HOST])
    assert counted[FROM_DISK] == (BLOCKS if name == "disk" else counted[FROM_DISK])
    assert counted[MATCHED] == tokens(BLOCKS)


@pytest.mark.parametrize("name", ["cpu", "both", "disk"])
def test_whatever_was_under_way_at_the_kill_is_answered_right(
    options: Options, killed: dict[str, list[Future[Answer]]], reference: Reference, name: str
) -> None:
    option: Option = getattr(options, name)
    before = option.engine and option.samples()
    for question in storm(name)[:FULL_SPEED]:
        assert same(option.ask(question), reference.answer(question))
    option.forget_device()
    counted = option.since(before)
    assert counted[MATCHED] > 0
    assert failures(option.samples()) == {}
    for answer in killed[name]:
        with contextlib.suppress(EngineFailed):
            answer.result(0)
