"""Disks that fail under running engines: serving goes on, with right answers."""

from __future__ import annotations

import os

from tests.integration.conftest import Options, Reference
from tests.integration.node import prompt, same
from tests.integration.option import D2H, FROM_HOST, H2DISK, Option, failures, tokens

BLOCKS = 6
WORKS = "kvbm_disk_works"


def ask_twice(option: Option, reference: Reference, seed: object) -> int:
    """Ask, lose the device, and ask again; how many tokens came back from a tier."""
    question = prompt(seed, BLOCKS)
    for _ in range(2):
        answer = option.ask(question)
        assert same(answer, reference.answer(question))
        option.forget_device()
    return answer.cached_tokens


def test_a_disk_that_cannot_be_written_any_more_is_given_up_and_the_host_tier_goes_on(
    options: Options, reference: Reference
) -> None:
    option = options.both
    assert option.engine.call_workers("kvbm_make_disk_read_only") == [None]
    before = option.samples()
    assert before[WORKS] == 1
    for number in range(3):
        assert ask_twice(option, reference, ("read-only", number)) == tokens(BLOCKS)
    counted = option.since(before, lambda by: option.samples()[WORKS] == 0)
    assert counted[H2DISK] == 0
    assert (counted[D2H], counted[FROM_HOST]) == (3 * BLOCKS, 3 * BLOCKS)
    assert sum(failures(counted).values()) > 0
    assert option.log.count("the disk tier is given up") == 1


def test_a_disk_whose_bytes_are_gone_costs_computations_and_nothing_else(
    options: Options, reference: Reference
) -> None:
    option = options.disk
    question = prompt("cut off", BLOCKS)
    option.ask(question)
    option.forget_device()
    before = option.samples()
    (file,) = options.disk_folder(option).rglob("rank-0.blocks")
    os.truncate(file, 0)
    answer = option.ask(question)
    assert same(answer, reference.answer(question))
    option.forget_device()
    counted = option.since(before, lambda by: failures(by))
    assert sum(failures(counted).values()) == BLOCKS
    for number in range(3):
        ask_twice(option, reference, ("cut off", number))
    assert option.engine.alive
