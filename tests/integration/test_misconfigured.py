"""Settings that cannot work: the engine does not start, and says which setting and why."""

from __future__ import annotations

import pytest
import torch

from kvbm_schemas.subjects import Scope
from kvbm_service.demo.engine import Engine, EngineFailed, share_cores
from kvbm_service.errors import SettingError
from kvbm_service.host_worker import start_worker
from kvbm_service.network import over_nats
from kvbm_service.settings import Settings
from kvbm_service.worker_service import RankId
from tests.integration.conftest import Engines, Site

NO_SIZE = {"connector": {"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": None}}
RANDOM_NAMES = {"arguments": {"prefix_caching_hash_algo": "xxhash"}}


@pytest.fixture(scope="module")
def starting(site: Site, lasting_engines: Engines) -> tuple[Engine, Engine]:
    """One whose host tier has no size, and one whose blocks have names that nobody shares."""
    cores = share_cores(engines=2)
    return (
        lasting_engines.start_node("no-size", site.cluster.url, cores=cores[0], **NO_SIZE),
        lasting_engines.start_node("xxhash", site.cluster.url, cores=cores[1], **RANDOM_NAMES),
    )


def test_an_engine_with_no_tier_that_has_a_size_does_not_start(
    starting: tuple[Engine, Engine],
) -> None:
    words = r"DYN_KVBM_CPU_CACHE_GB=0.*the host tier has no size.*or DYN_KVBM_DISK_CACHE_GB"
    with pytest.raises(EngineFailed, match=words):
        starting[0].wait_ready()


def test_an_engine_whose_blocks_have_random_names_does_not_start(
    starting: tuple[Engine, Engine],
) -> None:
    with pytest.raises(EngineFailed, match=r"prefix-caching-hash-algo.*PYTHONHASHSEED"):
        starting[1].wait_ready()


def test_a_host_tier_that_is_smaller_than_a_block_is_refused() -> None:
    settings = Settings.load({}, {"DYN_KVBM_CPU_CACHE_GB": 0.00001})
    layers = {"layer": torch.zeros(40, 2, 32, 2, 32)}
    scope, connect = Scope("default", "test"), over_nats(settings, "test")
    with pytest.raises(SettingError, match="one block takes 32768 bytes over all ranks; set at"):
        start_worker(settings, RankId(scope, "node", 0, 2, "life"), layers, 40, connect)
