"""What a leader says of its engine, for routers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvbm_service.route.fleet import Role
from kvbm_service.route.vllm_names import Naming
from kvbm_service.settings import Settings

vllm_layout = pytest.importorskip("kvbm_connectors.vllm_layout")

URL = "http://10.0.0.1:8001"


def config(role: str = "kv_both", algorithm: str = "sha256", served: Any = "tiny") -> Any:
    """As much of vLLM's configuration as is looked at."""
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_role=role),
        cache_config=SimpleNamespace(prefix_caching_hash_algo=algorithm),
        model_config=SimpleNamespace(served_model_name=served),
    )


@pytest.mark.parametrize(
    ("role", "told"),
    [("kv_both", Role.BOTH), ("kv_producer", Role.PREFILL), ("kv_consumer", Role.DECODE)],
)
def test_what_an_engine_is_for_follows_from_its_role_in_transfers(role: str, told: Role) -> None:
    front = vllm_layout.front(config(role), Settings(engine_url=URL))
    assert (front.role, front.url) == (told, URL)
    assert vllm_layout.front(config(role), Settings()).url == ""


def test_how_blocks_are_named_is_told_only_where_others_can_do_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "17")
    for algorithm in ("sha256", "sha256_cbor"):
        naming = Naming.parse(vllm_layout.front(config(algorithm=algorithm), Settings()).names)
        assert naming == Naming(vllm_layout.KEYS_OF_NAMES, algorithm, "17")
    assert vllm_layout.front(config(algorithm="xxhash"), Settings()).names == ""


@pytest.mark.parametrize(
    ("served", "told"), [("tiny", "tiny"), (["tiny", "alias"], "tiny"), (None, ""), ([], "")]
)
def test_the_model_is_called_as_clients_call_it(served: object, told: str) -> None:
    assert vllm_layout.front(config(served=served), Settings()).model == told
