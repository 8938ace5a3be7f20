"""What differs between the releases of vLLM that the connector runs on: all of it is here.

Importing this refuses a vLLM that cannot work, so that a person reads that, and not what some
import did not find. What a release can do is found out by what it has; numbers are for people.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.core import kv_cache_utils

from kvbm_service.core.reads import Hits
from kvbm_service.errors import EngineTooOld
from kvbm_service.route.vllm_names import Keys

LOWEST = "0.26"
"""The lowest release on which all of this was seen to work."""

NEEDED = (
    "bind_gpu_block_pool",
    "build_connector_worker_meta",
    "get_handshake_metadata",
    "has_pending_push_work",
    "on_new_request",
    "set_xfer_handshake_metadata_pp_aware",
)
"""What vLLM has to ask: a release that does not know one of these would never tell us of blocks
that are copied, or free them while they are."""


class Novelty(NamedTuple):
    """Something that only some of the releases have, and that the connector can do without."""

    what: str
    since: str
    """The first release that has it."""
    here: bool
    """Whether this one has it."""


SHARED_NAMES = Novelty(
    "names a block alike in every process without being given a seed",
    "0.29",
    hasattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED"),
)
"""Without it, PYTHONHASHSEED has to be set."""

PATIENCE = Novelty(
    "asks whether blocks will come back before it preempts a request",
    "0.30",
    hasattr(KVConnectorBase_V1, "has_pending_block_frees"),
)
"""Without it, a request may be preempted for want of blocks that a save is about to give back."""

HIT_SOURCES = Novelty(
    "asks where the tokens of a hit come from",
    "0.32",
    hasattr(KVConnectorBase_V1, "get_external_cache_hit_sources"),
)
"""Without it, vLLM's own metrics do not tell our tiers apart. Ours do."""

KEYS_OF_NAMES = Keys.TAGGED if hasattr(kv_cache_utils, "to_event_extra_keys") else Keys.PLAIN
"""How adapters and salts go into the names of blocks; a release that tags them unties the tags
again for its event stream."""

SEED_OF_NAMES: str = getattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED", "")
"""What names of blocks begin with where PYTHONHASHSEED is not set; empty: something random."""

LOST_REQUESTS = Novelty(
    "can be told that a request's load has failed, rather than which of its blocks",
    "0.30",
    hasattr(base, "KVConnectorTransferResults"),
)
"""Without it, a model whose layers let go of blocks is served with its hybrid allocator off: a load
that fails for several block tables could not be reported."""

NOVELTIES = (SHARED_NAMES, PATIENCE, HIT_SOURCES, LOST_REQUESTS)

HYBRID: tuple[type, ...] = (base.SupportsHMA,) if LOST_REQUESTS.here else ()
"""What a connector is, besides, that vLLM's hybrid allocator may be used with."""


def transfer_results(loaded: set[str], failed: set[str]) -> Any:
    """Requests whose loads have ended, and those of them whose blocks must not be used; for
    releases with `LOST_REQUESTS`.
    """
    return base.KVConnectorTransferResults(finished_recving=loaded, failed_recving=failed)


def refuse_too_old(base: type, release: str) -> None:
    """Refuse a vLLM whose connectors, of class `base`, are not asked what they need to be.

    Raises:
        EngineTooOld: names what is missing, and the lowest release that will do.
    """
    if missing := [name for name in NEEDED if not hasattr(base, name)]:
        raise EngineTooOld(
            f"vLLM {release} cannot be served: it never calls {', '.join(missing)} of a "
            f"connector; install vLLM {LOWEST} or later"
        )


def by_source(hits: Hits, promised: int) -> dict[Any, int]:
    """`promised` tokens by where they come from, in vLLM's words; for releases with
    `HIT_SOURCES`.
    """
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    if sum(hits) != promised:
        return {CacheHitSource.EXTERNAL_UNSPECIFIED: promised}
    sources = {
        CacheHitSource.HOST: hits.host,
        CacheHitSource.DISK: hits.disk,
        CacheHitSource.P2P: hits.remote,
    }
    return {source: tokens for source, tokens in sources.items() if tokens}


refuse_too_old(KVConnectorBase_V1, vllm.__version__)
