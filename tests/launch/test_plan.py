"""Which engine gets which devices, role and settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from deploy.launch.plan import GUIDES_MODEL, Planned, Wanted, on_cpu, on_gpus

USUAL = Wanted(engines=0, prefill=1, decode=1, model="", ranks=1, connector="kvbm", extra=())


def wanted(**changed: Any) -> Wanted:
    return dataclasses.replace(USUAL, **changed)


def after(engine: Planned, flag: str) -> str:
    """The flag's value."""
    return engine.command[list(engine.command).index(flag) + 1]


def test_gpus_are_shared_out_in_the_order_in_which_they_were_named() -> None:
    engines = on_gpus(wanted(prefill=2, ranks=2), ["7", "5", "3", "1", "0", "2"], {})
    assert [engine.name for engine in engines] == ["prefill-1", "prefill-2", "decode-1"]
    devices = [engine.environment["CUDA_VISIBLE_DEVICES"] for engine in engines]
    assert devices == ["7,5", "3,1", "0,2"]
    assert {after(engine, "--tensor-parallel-size") for engine in engines} == {"2"}
    assert {after(engine, "--model") for engine in engines} == {GUIDES_MODEL}


def test_every_engine_says_where_it_listens_and_what_it_is_for() -> None:
    engines = on_gpus(wanted(engines=1), ["0", "1", "2"], {})
    transfers = [json.loads(after(engine, "--kv-transfer-config")) for engine in engines]
    roles = [transfer["kv_role"] for transfer in transfers]
    assert roles == ["kv_producer", "kv_consumer", "kv_both"]
    assert {transfer["kv_load_failure_policy"] for transfer in transfers} == {"recompute"}
    urls = [engine.environment["KVBM_ENGINE_URL"] for engine in engines]
    assert urls == [f"http://127.0.0.1:{after(engine, '--port')}" for engine in engines]
    assert len(set(urls)) == 3


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, {"DYN_KVBM_CPU_CACHE_GB": "4"}),
        ({"DYN_KVBM_CPU_CACHE_GB": "64"}, {}),
        ({"DYN_KVBM_DISK_CACHE_GB": "8"}, {}),
        ({"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "100"}, {}),
    ],
)
def test_a_host_tier_is_added_where_no_tier_was_asked_for(
    given: dict[str, str], added: dict[str, str]
) -> None:
    environment = on_gpus(wanted(), ["0", "1"], given)[0].environment
    assert {key: value for key, value in environment.items() if "CACHE" in key} == added


def test_in_other_peoples_cluster_no_engine_meets_a_namesake() -> None:
    theirs = {"KVBM_NATS_URL": "nats://10.0.0.1:4222"}
    assert "KVBM_NODE_NAME" not in on_gpus(wanted(), ["0", "1"], theirs)[0].environment
    named = on_gpus(wanted(), ["0", "1"], theirs | {"KVBM_NODE_NAME": "rack-1"})
    assert [engine.environment["KVBM_NODE_NAME"] for engine in named] == [
        "rack-1-prefill-1",
        "rack-1-decode-1",
    ]


def test_on_a_cpu_the_variables_that_were_set_are_left_as_they_are(tmp_path: Path) -> None:
    given = {"KVBM_HOST_CACHE_DIR": "/dev/shm", "VLLM_CPU_KVCACHE_SPACE": "8"}
    engine = on_cpu(wanted(model="mine"), None, tmp_path, given)[0]
    assert not engine.environment.keys() & given.keys()
    assert after(engine, "--model") == "mine"


def test_what_is_given_to_vllm_comes_last() -> None:
    engine = on_gpus(wanted(extra=["--max-model-len", "100"]), ["0", "1"], {})[0]
    assert list(engine.command[-2:]) == ["--max-model-len", "100"]


def test_to_compare_with_there_are_other_connectors_and_none() -> None:
    devices = ["0", "1"]
    nixl = on_gpus(wanted(connector="nixl"), devices, {})[0]
    assert json.loads(after(nixl, "--kv-transfer-config"))["kv_connector"] == "NixlConnector"
    assert "--kv-transfer-config" not in on_gpus(wanted(connector="none"), devices, {})[0].command
