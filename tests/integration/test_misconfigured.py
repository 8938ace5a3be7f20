"""Settings that cannot work: the engine does not start, and says which setting and why."""

from __future__ import annotations

import pytest

from kvbm_service.demo.engine import Engine, EngineFailed, share_cores
from tests.integration.conftest import Engines, Site

WRONG = {
    "no size": (
        {"connector": {"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": None}},
        "DYN_KVBM_CPU_CACHE_GB=0.*the host tier has no size",
    ),
    "smaller than a block": (
        {
            "connector": {
                "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": None,
                "DYN_KVBM_CPU_CACHE_GB": 0.00001,
            }
        },
        "one block takes 65536 bytes",
    ),
    "names nobody shares": (
        {"arguments": {"prefix_caching_hash_algo": "xxhash"}},
        "PYTHONHASHSEED",
    ),
}


@pytest.fixture(scope="module")
def starting(site: Site, lasting_engines: Engines) -> dict[str, Engine]:
    """All of them, starting side by side."""
    cores = share_cores(engines=len(WRONG))
    return {
        what: lasting_engines.start_node(
            what.replace(" ", "-"), site.cluster.url, cores=cores[index], **options
        )
        for index, (what, (options, _)) in enumerate(WRONG.items())
    }


@pytest.mark.parametrize("what", WRONG)
def test_an_engine_does_not_start_with_a_host_tier_of(
    starting: dict[str, Engine], what: str
) -> None:
    with pytest.raises(EngineFailed, match=WRONG[what][1]):
        starting[what].wait_ready()
