"""What came of a row, and whether that is good."""

from __future__ import annotations

import msgspec

from tests.models.rows import Row


class Outcome(msgspec.Struct, frozen=True):
    """What came of a row: prompts and blocks, counted."""

    prompts: int
    block_tokens: int
    groups: int
    """KV cache groups."""
    own_blocks: int
    """That vLLM reused by itself."""
    our_blocks: int
    """That it reused from our tier."""
    expected_blocks: int
    own_as_computed: int
    """Prompts whose answer with vLLM's own reuse is the computed one."""
    ours_as_computed: int
    ours_as_own: int
    furthest: float
    """Greatest difference of a log probability, our reuse from vLLM's."""
    furthest_from_computed: float
    different: int
    """How many computed answers differ from each other: all, or they would prove nothing."""


def faults(row: Row, outcome: Outcome) -> list[str]:
    """What is wrong with it; nothing, if the row holds.

    Our reuse must not change a token where vLLM's does not: the same bytes in the same places. In
    few bits vLLM's own may, because a prompt's rest is computed in another shape than the whole.
    """
    found = []
    if outcome.different < outcome.prompts:
        found.append("two prompts have the same answer")
    if outcome.groups < row.groups:
        found.append(f"{outcome.groups} KV cache group(s)")
    if outcome.our_blocks != outcome.expected_blocks:
        found.append(f"{outcome.our_blocks} blocks reused, not {outcome.expected_blocks}")
    if outcome.ours_as_own < outcome.prompts or outcome.furthest:
        found.append("answers differ from those with vLLM's own reuse")
    if row.exact and outcome.ours_as_computed < outcome.prompts:
        found.append("answers differ from the computed ones")
    return found
