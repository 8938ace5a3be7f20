"""Links that are slow, lossy or narrow: answers stay right, and come before their deadlines."""

from __future__ import annotations

import pytest

from tests.faults.site import (
    HEAL_SECONDS,
    LEASE_SECONDS,
    LOOKUP_SECONDS,
    SHARE_SECONDS,
    SLACK_SECONDS,
    TRANSFER_SECONDS,
    Site,
)
from tests.world import Line

BLOCKS = 6
BAD_LINES = {
    "delayed": Line(delay_seconds=0.1, jitter_seconds=0.02),
    "lossy": Line(loss=0.05),
    "narrow": Line(bytes_per_second=1e6),
}
LINKS = {
    "between the nodes": [("a", "b")],
    "to NATS": [("a", "nats"), ("b", "nats"), ("registry", "nats")],
}
BLOCK_SECONDS = 0.15
"""What a block's bytes take on the narrow line, and a bit."""


@pytest.mark.parametrize("links", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_blocks_are_shared_over_a_bad_link(
    site: Site, line: Line, links: list[tuple[str, str]]
) -> None:
    for one, other in links:
        site.world.set_lines(one, other, line)
    of_a, of_b = (site.computed_by(node, BLOCKS) for node in site.nodes)
    site.check(site.b.ask(of_a), site.a.ask(of_b))
    site.wait_until_shared(SHARE_SECONDS + SLACK_SECONDS)
    site.wait("the registry equals the truth", site.registry_is_right, HEAL_SECONDS + SLACK_SECONDS)
    site.wait("nothing is pinned", site.at_rest, LEASE_SECONDS + SLACK_SECONDS)


def test_a_link_too_narrow_for_the_transfer_timeout_costs_a_recompute(site: Site) -> None:
    site.world.set_line("a", "b", Line(bytes_per_second=1e6 * BLOCK_SECONDS / TRANSFER_SECONDS))
    site.wait("b is lent blocks, and cannot read them", site.fails_to_read, SHARE_SECONDS)
    site.wait("nothing is pinned", site.at_rest, LEASE_SECONDS + SLACK_SECONDS)
    site.heal()


def test_what_the_registry_says_too_late_is_not_waited_for(site: Site) -> None:
    question = site.computed_by(site.a, BLOCKS)
    site.world.set_line("nats", "b", Line(delay_seconds=1.5 * LOOKUP_SECONDS))
    answer = site.b.ask(question)
    site.check(answer)
    assert answer.remote == 0
    site.wait("nothing is pinned", site.at_rest, LEASE_SECONDS + SLACK_SECONDS)
    site.heal()
