"""Hosts that are cut off: from everyone, from NATS, from each other; both ways, and only one."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from kvbm_service.adapters.nixl_reader import QUIET_SECONDS
from tests.faults.light_engine import Answer
from tests.faults.site import (
    LEASE_SECONDS,
    MEMBERSHIP_SECONDS,
    NOTICE_SECONDS,
    POLL_SECONDS,
    SHARE_SECONDS,
    SLACK_SECONDS,
    TRANSFER_SECONDS,
    Site,
)
from tests.world import Line, World
from tests.world.hosts import unsent_requests

Cut = Callable[[World], None]

BLOCKS = 6
CONTROL_CUTS: dict[str, Cut] = {
    "b alone": lambda world: world.isolate("b"),
    "b and NATS": lambda world: world.cut("b", "nats"),
    "b to NATS": lambda world: world.cut_one_way("b", "nats"),
    "NATS to b": lambda world: world.cut_one_way("nats", "b"),
}
DATA_CUTS: dict[str, Cut] = {
    "both ways": lambda world: world.cut("a", "b"),
    "owner to reader": lambda world: world.cut_one_way("a", "b"),
    "reader to owner": lambda world: world.cut_one_way("b", "a"),
}


@pytest.mark.parametrize("cut", CONTROL_CUTS.values(), ids=CONTROL_CUTS)
def test_a_node_without_nats_goes_on_by_itself_and_is_forgotten_until_it_is_back(
    site: Site, cut: Cut
) -> None:
    of_a, of_b = (site.computed_by(node, BLOCKS) for node in site.nodes)
    cut(site.world)
    own, others, new = (site.b.ask(each) for each in (of_b, of_a, site.new_chain()))
    site.check(own, others, new, site.a.ask(of_b))
    assert own.host == BLOCKS, "its own tiers need nobody"
    assert others.remote == others.failed, "nothing was read that nobody could have told it of"
    site.wait(
        "b is no member any more",
        lambda: "b" not in site.witness.nodes(),
        MEMBERSHIP_SECONDS + SLACK_SECONDS,
    )
    site.check(site.b.ask(of_b), site.a.ask(site.new_chain()))
    site.heal()


@pytest.mark.parametrize("cut", DATA_CUTS.values(), ids=DATA_CUTS)
def test_blocks_of_an_owner_whose_bytes_do_not_come_are_computed_in_time(
    site: Site, cut: Cut
) -> None:
    cut(site.world)
    site.wait("b is lent blocks, and cannot read them", site.fails_to_read, SHARE_SECONDS)
    # A request that reaches an owner whose reader is gone makes UCX abort the owner's process.
    b, a = site.world["b"], site.world["a"]
    site.wait(
        "no read request can come late",
        lambda: not unsent_requests(b, a),
        QUIET_SECONDS + SLACK_SECONDS,
    )
    site.wait("b tries again, and connects anew", site.fails_to_read, SHARE_SECONDS)
    site.wait("nothing is pinned", site.at_rest, LEASE_SECONDS + SLACK_SECONDS)
    site.heal()


@pytest.mark.parametrize("cut", DATA_CUTS.values(), ids=DATA_CUTS)
def test_a_read_that_is_cut_in_the_middle_is_given_up_and_both_ends_live(
    site: Site, cut: Cut
) -> None:
    answer = _cut_in_the_middle(site, cut)
    site.check(answer)
    assert answer.failed == answer.remote == 2 * BLOCKS
    site.heal()


def _cut_in_the_middle(site: Site, cut: Cut) -> Answer:
    """Let b read slowly from a, and break something meanwhile."""
    deadline = time.monotonic() + SHARE_SECONDS
    while True:
        question = site.computed_by(site.a, 2 * BLOCKS)
        before = site.world.traffic("a", "b").passed
        site.world.set_line("a", "b", Line(bytes_per_second=500e3))
        asked = site.b.ask_soon(question)
        while not asked.done() and site.world.traffic("a", "b").passed < before + 20:
            time.sleep(POLL_SECONDS)
        if not asked.done():
            cut(site.world)
            return asked.result()[0]
        assert time.monotonic() < deadline, "b is never lent anything"


def test_what_was_lent_to_a_node_that_vanished_is_free_when_the_lease_has_ended(
    site: Site,
) -> None:
    asked = time.monotonic()
    site.check(_cut_in_the_middle(site, lambda world: world.isolate("b")))
    assert site.a.look().leases == 1 or time.monotonic() > asked + LEASE_SECONDS
    site.wait(
        "a has ended the lease",
        lambda: (site.a.look().pinned, site.a.look().leases) == (0, 0),
        LEASE_SECONDS + SLACK_SECONDS,
    )
    site.heal()


def test_reads_that_wait_behind_one_that_hangs_fail_when_it_does(site: Site) -> None:
    deadline = time.monotonic() + SHARE_SECONDS
    while True:
        questions = [site.computed_by(site.a, BLOCKS) for _ in range(4)]
        site.world.cut("a", "b")
        answers = site.b.ask_soon(*questions).result()
        site.check(*answers)
        if all(answer.failed == BLOCKS for answer in answers):
            break
        assert time.monotonic() < deadline, "b is never lent all four"
        site.world.heal()
    ended = sorted(answer.seconds for answer in answers)
    assert ended[-1] - ended[0] < TRANSFER_SECONDS, ended
    site.heal()


@pytest.mark.parametrize("lost", ["registry", "nats"])
def test_everyone_goes_on_without_the_host_of(site: Site, lost: str) -> None:
    of_a, of_b = (site.computed_by(node, BLOCKS) for node in site.nodes)
    site.world.isolate(lost)
    own, new = site.a.ask(of_a), site.a.ask(site.new_chain())
    site.check(own, new, site.b.ask(of_a), site.a.ask(of_b))
    assert own.host == BLOCKS
    if lost == "nats":  # long enough for everyone to notice: then they connect anew
        lines = {node: node.log.read_text().count("lost the conn") for node in site.nodes}
        site.wait(
            "both notice",
            lambda: all(
                node.log.read_text().count("lost the conn") > lines[node] for node in site.nodes
            ),
            NOTICE_SECONDS + SLACK_SECONDS,
        )
        answer = site.b.ask(site.new_chain())
        site.check(answer)
    site.heal()
