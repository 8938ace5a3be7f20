"""Registry and NATS die and come back: what an engine has itself goes on, sharing resumes."""

from __future__ import annotations

import os
import shutil
import signal
import time

import pytest

from kvbm_service.demo.engine import BLOCK_TOKENS
from tests.integration.conftest import Reference, Site
from tests.integration.node import LOOKUP_SECONDS, Node, prompt, same

Pair = tuple[Node, Node]

BLOCKS = 6
RESUME_SECONDS = 60.0
"""How soon after an outage blocks are shared again."""
SLACK_SECONDS = 15.0
"""For computing the prompt, on slow cores."""


def test_lookups_miss_while_there_is_no_registry_and_hit_with_a_new_one(
    site: Site, reference: Reference, pair: Pair
) -> None:
    a, b = pair
    early, late = prompt("no registry", BLOCKS), prompt("new registry", BLOCKS)
    a.compute(early, BLOCKS)
    _, scope, names = a.compute(late, BLOCKS)
    site.cluster.kill_registry()
    answer = b.ask(early)
    assert same(answer, reference.answer(early))
    assert answer.cached_tokens == 0
    assert answer.seconds < 2 * LOOKUP_SECONDS + SLACK_SECONDS
    site.cluster.start_registry()
    site.witness.wait_until_located(scope, names, a.name, RESUME_SECONDS)
    answer = b.ask(late)
    assert same(answer, reference.answer(late))
    assert answer.cached_tokens == BLOCKS * BLOCK_TOKENS


def test_a_registry_that_hangs_costs_a_request_no_more_than_its_deadline(
    site: Site, reference: Reference, pair: Pair
) -> None:
    a, b = pair
    early, late = prompt("hangs", BLOCKS), prompt("goes on", BLOCKS)
    a.compute(early, BLOCKS)
    _, scope, names = a.compute(late, BLOCKS)
    registry = site.cluster.registry_pid
    assert registry is not None
    os.kill(registry, signal.SIGSTOP)
    try:
        answer = b.ask(early)
    finally:
        os.kill(registry, signal.SIGCONT)
    assert same(answer, reference.answer(early))
    assert answer.cached_tokens == 0
    assert LOOKUP_SECONDS * 0.9 < answer.seconds < 2 * LOOKUP_SECONDS + SLACK_SECONDS
    site.witness.wait_until_located(scope, names, a.name, RESUME_SECONDS)
    assert b.ask(late).cached_tokens == BLOCKS * BLOCK_TOKENS


@pytest.mark.parametrize("wiped", [False, True], ids=["state kept", "state wiped"])
def test_own_tiers_go_on_without_nats_and_sharing_resumes_with_it(
    site: Site, reference: Reference, pair: Pair, wiped: bool
) -> None:
    a, b = pair
    before, during, after = (prompt((when, wiped), BLOCKS) for when in ("old", "new", "other"))
    a.compute(before, BLOCKS)
    _, scope, names = a.compute(after, BLOCKS)
    a.forget_device()
    site.cluster.nats.kill()
    try:
        own = a.ask(before)
        others = b.ask(before)
        alone = a.ask(during)
    finally:
        if wiped:
            shutil.rmtree(site.cluster.nats_folder)
        site.cluster.nats.start()
    began = time.monotonic()
    assert own.cached_tokens == BLOCKS * BLOCK_TOKENS
    assert others.cached_tokens == 0
    for answer, question in ((own, before), (others, before), (alone, during)):
        assert same(answer, reference.answer(question))
        assert answer.seconds < 2 * LOOKUP_SECONDS + SLACK_SECONDS
    site.witness.wait_until_located(scope, names, a.name, RESUME_SECONDS)
    b.wait_until_it_reads_from(a, RESUME_SECONDS - (time.monotonic() - began))
    for question in (during, after):
        answer = b.ask(question)
        assert same(answer, reference.answer(question))
        assert answer.cached_tokens == BLOCKS * BLOCK_TOKENS
