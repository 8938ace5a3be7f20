"""The table's rows: which model runs how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One engine: a model of the zoo, and how vLLM is started with it."""

    model: str
    what: str
    """For people."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of `vllm.LLM`, on top of ours."""
    environment: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the connector, on top of ours."""
    lora: bool = False
    """Ask every prompt with and without the adapter."""
    exact: bool = True
    """Whether reuse must not change a token. If not, it may where vLLM's own reuse does: in 16 bits
    and fewer, and with DeepSeek-V2, which vLLM's CPU build answers otherwise when it goes on from
    a text's beginning than when it computes the text whole, connector or not."""
    ranks: int = 1
    groups: int = 1
    """KV cache groups that the engine must have at least."""


NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 2,
}
DISK_ONLY = {
    "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": 0,
    "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": 256,
}

ROWS = {
    "gqa": Row("gqa", "GQA (Qwen3), float32, blocks of 32"),
    "mqa": Row("mqa", "MQA (Qwen3 with one KV head)"),
    "mla": Row("mla", "MLA (DeepSeek-V2), blocks of 16", exact=False),
    "deepseek": Row(
        "mla",
        "DeepSeek-V2 with VLLM_MLA_DISABLE=1",
        environment={"VLLM_MLA_DISABLE": "1"},
        exact=False,
    ),
    "hybrid": Row("gemma3", "Gemma-3: sliding and full attention, hybrid allocator", groups=2),
    "hybrid-chunked": Row(
        "gemma3", "the same, in chunks of 128 tokens", {"max_num_batched_tokens": 128}, groups=2
    ),
    "hybrid-disk": Row("gemma3", "the same, from disk", settings=DISK_ONLY, groups=2),
    "hybrid-off": Row(
        "gemma3",
        "Gemma-3 with --disable-hybrid-kv-cache-manager",
        {"disable_hybrid_kv_cache_manager": True},
    ),
    "bf16": Row("gqa", "bfloat16", {"dtype": "bfloat16"}, exact=False),
    "fp16": Row("gqa", "float16", {"dtype": "float16"}, exact=False),
    "fp8": Row("gqa", "KV cache in fp8", {"kv_cache_dtype": "fp8"}, exact=False),
    "lora": Row(
        "gqa",
        "a LoRA adapter beside the base model",
        {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8},
        lora=True,
    ),
    "blocks-64": Row("gqa", "blocks of 64", {"block_size": 64}),
    "blocks-128": Row("gqa", "blocks of 128", {"block_size": 128}),
    "chunked": Row("gqa", "in chunks of 96 tokens", {"max_num_batched_tokens": 96}),
    "ngram": Row("gqa", "speculative decoding (n-gram)", {"speculative_config": NGRAM}),
    "tp2": Row("gqa", "two ranks (TP=2)", {"tensor_parallel_size": 2}, ranks=2),
    "hybrid-tp2": Row(
        "gemma3", "Gemma-3 on two ranks", {"tensor_parallel_size": 2}, ranks=2, groups=2
    ),
}
