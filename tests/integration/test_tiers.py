"""The guides' three cache options: right answers, and hits from the tier that is meant."""

from __future__ import annotations

import pytest

from tests.integration.conftest import Options, Reference
from tests.integration.node import prompt, same
from tests.integration.option import (
    D2DISK,
    D2H,
    FROM_DISK,
    FROM_HOST,
    H2DISK,
    MATCHED,
    PATHS,
    Option,
    by_path,
    failures,
    tokens,
)

BLOCKS = 6


def ask_rightly(option: Option, reference: Reference, question: list[int]) -> int:
    """Ask with nothing on the device; how many tokens were not computed."""
    answer = option.ask(question)
    assert same(answer, reference.answer(question))
    option.forget_device()
    return answer.cached_tokens


def test_with_host_memory_blocks_go_there_and_come_back_from_there(
    options: Options, reference: Reference
) -> None:
    option = options.cpu
    question = prompt("host memory", BLOCKS)
    before = option.samples()
    assert ask_rightly(option, reference, question) == 0
    assert ask_rightly(option, reference, question) == tokens(BLOCKS)
    counted = option.since(before, lambda by: by[FROM_HOST] > 0)
    assert by_path(counted) == {D2H: BLOCKS, FROM_HOST: BLOCKS}
    assert counted[MATCHED] == tokens(BLOCKS)
    now = option.samples()
    assert now["kvbm_host_cache_hit_rate"] > 0
    assert now["kvbm_disk_cache_hit_rate"] == 0
    assert "kvbm_disk_works" not in now


def test_with_host_and_disk_what_is_used_twice_outlives_the_host_tier(
    options: Options, reference: Reference
) -> None:
    option = options.both
    host = int(option.samples()['kvbm_tier_capacity_blocks{tier="host"}'])
    questions = [prompt(("both", number), BLOCKS) for number in range(2 * host // BLOCKS)]
    before = option.samples()
    for question in questions:
        assert ask_rightly(option, reference, question) == 0
        assert ask_rightly(option, reference, question) == tokens(BLOCKS)
    stored = len(questions) * BLOCKS
    counted = option.since(before, lambda by: by[H2DISK] >= stored)
    assert by_path(counted) == {D2H: stored, FROM_HOST: stored, H2DISK: stored}
    before = option.samples()
    for question in questions:
        assert ask_rightly(option, reference, question) == tokens(BLOCKS)
    counted = option.since(before, lambda by: by[FROM_DISK] + by[FROM_HOST] >= stored)
    assert counted[FROM_DISK] + counted[FROM_HOST] == stored
    assert counted[FROM_DISK] >= stored - host
    assert counted[MATCHED] == tokens(stored)
    assert option.samples()["kvbm_disk_cache_hit_rate"] > 0
    assert failures(option.samples()) == {}


def test_with_host_and_disk_what_is_used_once_stays_off_the_disk(
    options: Options, reference: Reference
) -> None:
    option = options.both
    before = option.samples()
    assert ask_rightly(option, reference, prompt("once", BLOCKS)) == 0
    counted = option.since(before, lambda by: by[D2H] >= BLOCKS)
    assert by_path(counted) == {D2H: BLOCKS}


def test_with_disk_only_blocks_go_there_directly_and_come_back_from_there(
    options: Options, reference: Reference
) -> None:
    option = options.disk
    question = prompt("disk only", BLOCKS)
    before = option.samples()
    assert ask_rightly(option, reference, question) == 0
    assert ask_rightly(option, reference, question) == tokens(BLOCKS)
    counted = option.since(before, lambda by: by[FROM_DISK] > 0)
    assert by_path(counted) == {D2DISK: BLOCKS, FROM_DISK: BLOCKS}
    assert counted[MATCHED] == tokens(BLOCKS)
    assert option.samples()["kvbm_disk_cache_hit_rate"] > 0
    assert failures(option.samples()) == {}


def test_disk_only_is_called_experimental_once(options: Options) -> None:
    log = options.disk.engine and options.disk.log
    assert [line for line in log.splitlines() if "experimental" in line and "disk" in line]
    assert "experimental, and DYN_KVBM" not in options.both.log


@pytest.mark.parametrize("name", ["cpu", "both", "disk"])
def test_the_guides_metrics_are_all_there(options: Options, name: str) -> None:
    option: Option = getattr(options, name)
    option.engine  # noqa: B018 - waits until it is ready
    samples = option.samples()
    rates = ("kvbm_host_cache_hit_rate", "kvbm_disk_cache_hit_rate")
    assert not {*PATHS, MATCHED, *rates} - set(samples)
    assert all(0 <= samples[rate] <= 1 for rate in rates)
