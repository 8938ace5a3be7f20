"""Names that are meant for us and are no settings of an engine: nobody should wonder in vain."""

from __future__ import annotations

import re
from collections.abc import Mapping

_RANKS_MEET = "ranks meet through NATS here, so that there is no port to choose"
_NO_OBJECTS = "there is no object storage tier yet"
_NO_BROADCAST = "each rank loads its own blocks, so that there is no broadcast"
_NO_MERGING = "what is stored and removed is told over NATS, beside the engine's own events"

NOT_USED_YET: Mapping[str, str] = {
    "DYN_KVBM_TRANSFER_BATCH_SIZE": "DYN_KVBM_MAX_TRANSFER_BATCH_SIZE is the one that is read",
    "DYN_KVBM_LEADER_ZMQ_HOST": _RANKS_MEET,
    "DYN_KVBM_LEADER_ZMQ_PUB_PORT": _RANKS_MEET,
    "DYN_KVBM_LEADER_ZMQ_ACK_PORT": _RANKS_MEET,
    "DYN_KVBM_ENABLE_RECORD": "calls are not recorded; `kvbm tap` shows events as they happen",
    "DYN_KVBM_NCCL_MLA_MODE": _NO_BROADCAST,
    "DYN_KVBM_NCCL_MAX_CTAS": _NO_BROADCAST,
    "DYN_KVBM_DISABLE_WRITE_COMBINED": "host memory is never write-combined here",
    "DYN_KVBM_ENABLE_NUMA": "where host memory lies is left to the kernel",
    "DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR": _NO_MERGING,
    "DYN_KVBM_KV_EVENTS_CONSOLIDATOR_MODE": _NO_MERGING,
    "DYN_KVBM_TRTLLM_ZMQ_PORT": _NO_MERGING,
    "DYN_KVBM_OBJECT_ENABLED": _NO_OBJECTS,
    "DYN_KVBM_OBJECT_BUCKET": _NO_OBJECTS,
    "DYN_KVBM_OBJECT_ENDPOINT": _NO_OBJECTS,
    "DYN_KVBM_OBJECT_REGION": _NO_OBJECTS,
    "DYN_KVBM_OBJECT_ACCESS_KEY": _NO_OBJECTS,
    "DYN_KVBM_OBJECT_SECRET_KEY": _NO_OBJECTS,
    "DYN_KVBM_OBJECT_NUM_BLOCKS": _NO_OBJECTS,
}
"""Variables that people bring along from Dynamo's KVBM and that change nothing here: why not."""

USED_ELSEWHERE = frozenset({"KVBM_BIND_ADDRESS"})
"""Variables that deploy/docker-compose.yml reads: an engine that sees them has no use for them."""

_NOT_USED_YET_PREFIX = re.compile(r"DYN_KVBM_NIXL_BACKEND_\w+")


def why_unused(variable: str) -> str:
    """Why this version does not read a name of the guides; empty if it is none of those."""
    if _NOT_USED_YET_PREFIX.fullmatch(variable):
        return "KVBM_DISK_BACKEND names the backend for files; others are not to be chosen"
    return NOT_USED_YET.get(variable, "")
