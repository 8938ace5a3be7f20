"""Our names of a prompt's blocks are vLLM's own."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm_service.route import vllm_names
from kvbm_service.route.vllm_names import Adapter, Keys, Naming, block_names, canonical_cbor

kv_cache_utils = pytest.importorskip("vllm.v1.core.kv_cache_utils")
hashing = pytest.importorskip("vllm.utils.hashing")

KEYS = Keys.TAGGED if hasattr(kv_cache_utils, "to_event_extra_keys") else Keys.PLAIN
SEED = os.environ.get("PYTHONHASHSEED") or getattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED", "17")
TOKENS = st.lists(st.integers(0, 1 << 20), max_size=200)
TEXT = st.text(min_size=1, max_size=20)
ADAPTER = st.none() | st.builds(Adapter, TEXT, TEXT)


def theirs(
    algorithm: str, block: int, tokens: list[int], adapter: Adapter | None, salt: str
) -> list[bytes]:
    """What vLLM makes of a request: its own code, on as much of a request as it looks at."""
    digest = hashing.get_hash_fn_by_name(algorithm)
    lora: Any = adapter and SimpleNamespace(lora_name=adapter.name, lora_path=adapter.path)
    request = SimpleNamespace(
        block_hashes=[],
        num_tokens=len(tokens),
        all_token_ids=tokens,
        mm_features=[],
        lora_request=lora,
        cache_salt=salt or None,
        prompt_embeds=None,
    )
    hasher = kv_cache_utils.get_request_block_hasher(block, digest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", SEED)
        patch.setattr(kv_cache_utils, "NONE_HASH", b"", raising=False)  # put back afterwards
        patch.setattr(kv_cache_utils, "_NONE_HASH_SEED", "", raising=False)
        kv_cache_utils.init_none_hash(digest)
        return [bytes(name[:16]) for name in hasher(request)]


@pytest.mark.parametrize("algorithm", list(vllm_names.ALGORITHMS))
@given(st.integers(1, 40), TOKENS, ADAPTER, st.just("") | TEXT)
def test_a_prompts_blocks_have_the_names_that_vllm_gives_them(
    algorithm: str, block: int, tokens: list[int], adapter: Adapter | None, salt: str
) -> None:
    ours = block_names(Naming(KEYS, algorithm, SEED), block, tokens, adapter, salt)
    assert ours == theirs(algorithm, block, tokens, adapter, salt)
    assert len(ours) == len(tokens) // block


NAMED = st.recursive(
    st.none() | st.integers(0, (1 << 64) - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=30).map(tuple),
)


@given(NAMED)
def test_cbor_is_written_as_others_write_it(value: object) -> None:
    cbor2 = pytest.importorskip("cbor2")
    assert canonical_cbor(value) == cbor2.dumps(value, canonical=True)


def test_so_many_blocks_of_a_prompt_are_named() -> None:
    naming = Naming(Keys.TAGGED, "sha256", "seed")
    tokens = list(range(2 * vllm_names.MAX_NAMED + 2))
    names = block_names(naming, 2, tokens)
    assert len(names) == vllm_names.MAX_NAMED
    assert names[:3] == block_names(naming, 2, tokens[:7])


@given(st.sampled_from(list(Keys)), st.sampled_from(list(vllm_names.ALGORITHMS)), TEXT)
def test_what_a_record_says_of_names_is_understood(keys: Keys, algorithm: str, seed: str) -> None:
    naming = Naming(keys, algorithm, seed)
    assert Naming.parse(str(naming)) == naming


@pytest.mark.parametrize(
    "text", ["", "vllm", "vllm tagged sha256", "vllm tagged xxhash 1", "trtllm plain sha256 1",
             "vllm odd sha256 1", "vllm tagged sha256 "]
)  # fmt: skip
def test_names_of_another_kind_are_not_understood(text: str) -> None:
    assert Naming.parse(text) is None
