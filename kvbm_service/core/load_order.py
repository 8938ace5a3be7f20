"""Turning a plan into an order for the ranks: which device block gets what, and from where."""

from __future__ import annotations

from collections.abc import Sequence

from kvbm_schemas import step
from kvbm_schemas.block import BlockHash, pack
from kvbm_service.core.columns import pack_u32, pack_u64
from kvbm_service.core.reads import Reader


def order_load(
    op: int,
    request: str,
    reader: Reader,
    computed: int,
    device_blocks: Sequence[int],
    now: float,
    transfer_seconds: float,
) -> tuple[step.Load, dict[int, tuple[BlockHash, str]]]:
    """Write out the plan for `chain[computed:]`: the command, and what each device block gets."""
    plan = reader.plan
    assert plan is not None
    end = computed + len(device_blocks)
    places: dict[int, tuple[BlockHash, str]] = {}

    def place(start: int, stop: int, node: str) -> tuple[bytes, bytes]:
        blocks = device_blocks[start - computed : stop - computed]
        names = reader.chain[start:stop]
        places.update((block, (name, node)) for block, name in zip(blocks, names, strict=True))
        return pack(names), pack_u32(blocks)

    local = None
    if computed < (stop := min(plan.local_end, end)):
        hashes, blocks = place(computed, stop, "")
        local = step.LocalRead(
            hashes=hashes,
            blocks=blocks,
            slots=pack_u32(plan.local_slots[computed - plan.start : stop - plan.start]),
            fills=pack_u64(plan.local_fills[computed - plan.start : stop - plan.start]),
        )
    remote: list[step.RemoteRead] = []
    for grant in plan.grants:
        start, stop = max(computed, grant.start), min(grant.end, end)
        if start >= stop:
            continue
        hashes, blocks = place(start, stop, grant.node)
        remote.append(
            step.RemoteRead(
                node=grant.node,
                agents=grant.agents,
                seconds=max(0.0, min(transfer_seconds, grant.deadline - now)),
                hashes=hashes,
                blocks=blocks,
                slots=pack_u32(grant.slots[start - grant.start : stop - grant.start]),
                fills=pack_u64(grant.fills[start - grant.start : stop - grant.start]),
            )
        )
    return step.Load(op=op, request=request, local=local, remote=tuple(remote)), places
