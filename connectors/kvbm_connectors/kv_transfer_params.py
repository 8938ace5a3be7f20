"""What an answer and a request carry so that one engine can go on with another's blocks.

    to a prefill engine     {"do_remote_decode": true}
    in its answer, and      {"do_remote_prefill": true, "do_remote_decode": false,
    to a decode engine       "node": "a", "lease": "3f…", "blocks": 12}

Whoever routes requests hands the second on as it is. It comes from outside, so it is looked at
before it is believed; whoever makes one up gets nothing by it but a question to another node.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from kvbm_schemas.message import Token
from kvbm_schemas.requests import Count
from kvbm_service.core.reads import Origin

_log = logging.getLogger(__name__)


Lease = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{16,64}\Z")]
"""Narrower than what nodes accept from each other: JSON knows strings that cannot be sent."""


class _HandedOver(msgspec.Struct, frozen=True):
    node: Token
    lease: Lease
    blocks: Count


def wants_hand_over(params: Mapping[str, Any] | None) -> bool:
    """Whether another engine is to go on with the request."""
    return bool(params and params.get("do_remote_decode"))


def written(origin: Origin) -> dict[str, Any]:
    """What the other engine has to be told."""
    return {"do_remote_prefill": True, "do_remote_decode": False, **origin._asdict()}


def read(params: Mapping[str, Any] | None) -> Origin | None:
    """Who hands this request's blocks over; None: nobody does, or what it says makes no sense."""
    if not (params and params.get("do_remote_prefill")):
        return None
    try:
        told = msgspec.convert(dict(params), _HandedOver)
    except (msgspec.ValidationError, ValueError, TypeError) as error:
        _log.warning("kv_transfer_params that name no hand-over of ours are ignored: %s", error)
        return None
    return Origin(told.node, told.lease, told.blocks)
