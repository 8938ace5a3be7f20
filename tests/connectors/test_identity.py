"""Which blocks are the same, and which engines cannot be cached at all."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)

from kvbm_connectors.identity import weights
from kvbm_connectors.vllm_layout import block_size
from kvbm_connectors.vllm_releases import LOST_REQUESTS, SHARED_NAMES
from kvbm_service.errors import LayoutError, SettingError
from tests.connectors.engine import BLOCK, Engine, full_attention, prompt, sliding_window
from tests.connectors.releases import needs_lost_requests

MakeEngine = Callable[..., Engine]

SEED_WANTED = "PYTHONHASHSEED.*the same number for all engines"


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What our code logs as a warning or worse."""
    lines: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("vllm")  # the connector logs where vLLM does
    log.addHandler(listener)
    yield lines
    log.removeHandler(listener)


def test_a_model_whose_weights_were_replaced_is_another_one_to_what_survives(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    config = make_engine().config
    config.model_config = copy.copy(config.model_config)
    config.model_config.model = str(tmp_path)
    assert weights(config.model_config.model) == ""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"old")
    before = weights(config.model_config.model)
    assert before == weights(config.model_config.model) != ""
    file.write_bytes(b"new")
    os.utime(file, (1, 1))
    assert weights(config.model_config.model) != before


def test_tenants_with_different_salts_do_not_share_blocks(make_engine: MakeEngine) -> None:
    engine = make_engine()
    mine = engine.ask(prompt(41), salt="mine")
    engine.forget_device()
    yours = engine.ask(prompt(41), salt="yours")
    nobodys = engine.ask(prompt(41))
    assert yours.loaded == nobodys.loaded == 0
    assert not set(mine.names) & set(yours.names)
    engine.forget_device()
    assert engine.ask(prompt(41), salt="mine").loaded == 40


def test_different_loras_do_not_share_blocks(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.ask(prompt(41), lora="one")
    engine.forget_device()
    assert engine.ask(prompt(41), lora="two").loaded == 0
    assert engine.ask(prompt(41)).loaded == 0
    engine.forget_device()
    assert engine.ask(prompt(41), lora="one").loaded == 40


def test_two_engines_give_a_block_the_same_name(make_engine: MakeEngine) -> None:
    one, two = make_engine(), make_engine()
    assert one.ask(prompt(41)).names == two.ask(prompt(41)).names


@pytest.mark.parametrize("hashing", ["xxhash", "xxhash_cbor"])
def test_names_that_differ_between_processes_are_refused(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, hashing: str
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    advice = f"--prefix-caching-hash-algo='{hashing}'.*sha256"
    with pytest.raises(SettingError, match=advice if SHARED_NAMES.here else SEED_WANTED):
        make_engine(hashing=hashing)


@pytest.mark.parametrize("hashing", ["sha256", "sha256_cbor"])
def test_a_seed_is_wanted_exactly_where_names_differ_between_processes_without_one(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, hashing: str
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    if len({beginning_of_all_names(hashing) for _process in range(2)}) == 1:
        make_engine(hashing=hashing)
    else:
        with pytest.raises(SettingError, match=SEED_WANTED):
            make_engine(hashing=hashing)


def beginning_of_all_names(hashing: str) -> bytes:
    """What vLLM chains the first block's hash to, as a process that starts now would have it."""
    kv_cache_utils.init_none_hash(get_hash_fn_by_name(hashing))
    return bytes(kv_cache_utils.NONE_HASH)


def test_names_made_from_a_shared_seed_are_good(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    engine = make_engine(hashing="xxhash")
    engine.ask(prompt(41))
    engine.forget_device()
    assert engine.ask(prompt(41)).loaded == 40


@pytest.mark.skipif(LOST_REQUESTS.here, reason="this vLLM can be told of whole requests")
def test_a_model_with_several_kv_cache_groups_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(LayoutError, match=r"2 KV cache groups.*--disable-hybrid"):
        make_engine(specs=(full_attention(), sliding_window()))


@pytest.mark.skipif(LOST_REQUESTS.here, reason="this vLLM can be told of whole requests")
def test_a_model_whose_blocks_do_not_all_stay_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(LayoutError, match="SlidingWindowSpec"):
        make_engine(specs=(sliding_window(),))


def test_a_model_with_states_that_are_no_blocks_is_refused_by_their_kind(
    make_engine: MakeEngine,
) -> None:
    chunked = ChunkedLocalAttentionSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=4, dtype=torch.float32, attention_chunk_size=8
    )
    with pytest.raises(LayoutError, match="ChunkedLocalAttentionSpec"):
        make_engine(specs=(chunked,))


@needs_lost_requests
def test_groups_with_blocks_of_different_sizes_are_refused(make_engine: MakeEngine) -> None:
    config = make_engine().config
    specs = [full_attention(), replace(sliding_window(), block_size=2 * BLOCK)]
    groups = [KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs)]
    layout = KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups)
    with pytest.raises(LayoutError, match=r"blocks of \[4, 8\] tokens"):
        block_size(config, layout)


def test_blocks_spread_over_context_parallel_ranks_are_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(LayoutError, match="context parallel"):
        make_engine(ranks=2, parallel={"decode_context_parallel_size": 2})


def test_a_policy_that_fails_requests_is_warned_of(
    make_engine: MakeEngine, said: list[str]
) -> None:
    make_engine(policy="fail")
    assert any("kv_load_failure_policy" in line and '"recompute"' in line for line in said)


def test_a_policy_that_recomputes_is_not_warned_of(
    make_engine: MakeEngine, said: list[str]
) -> None:
    make_engine(policy="recompute")
    assert not any("kv_load_failure_policy" in line for line in said)


def test_a_setting_that_does_not_exist_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(SettingError, match="KVBM_LOOKUP_DEADLINE"):
        make_engine(extra={"KVBM_LOOKUP_DEADLINE": 20})


def test_a_host_tier_without_a_size_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(SettingError, match="DYN_KVBM_CPU_CACHE_GB"):
        make_engine(slots=0)
