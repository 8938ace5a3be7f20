"""Tiny models of several architectures, made in code with random weights.

Like the demo's Qwen3 (`kvbm_service/demo/model.py`), whose reasons hold here, too: weights large
enough that every prefix gives its own answer, and the same on every machine. No tokenizer:
prompts are numbers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvbm_service.demo.model import INITIALIZER_RANGE, SEED, VOCABULARY

MAX_TOKENS = 2048

WINDOW = 96
"""Of Gemma-3's sliding layers: three of the smallest blocks, far less than a prompt has."""

COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": MAX_TOKENS,
    "initializer_range": INITIALIZER_RANGE,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 257,
}


def _qwen3(kv_heads: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            **COMMON,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            head_dim=32,
        )
    )


def _deepseek_v2() -> Any:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    return DeepseekV2ForCausalLM(
        DeepseekV2Config(
            **COMMON,
            hidden_size=128,
            intermediate_size=256,
            moe_intermediate_size=64,
            num_hidden_layers=3,
            first_k_dense_replace=3,  # all: a router near a tie would amplify rounding
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            topk_method="greedy",
            norm_topk_prob=False,
            routed_scaling_factor=1.0,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=None,
            kv_lora_rank=512,  # with the next: the one size that the CPU kernel knows
            qk_rope_head_dim=64,
            qk_nope_head_dim=32,
            v_head_dim=32,
        )
    )


def _gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    layers = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **COMMON | {"tie_word_embeddings": True},
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=len(layers),
            layer_types=layers,
            sliding_window=WINDOW,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            query_pre_attn_scalar=32,
            use_bidirectional_attention=False,
        )
    )


MODELS: dict[str, Callable[[], Any]] = {
    "gqa": lambda: _qwen3(kv_heads=2),
    "mqa": lambda: _qwen3(kv_heads=1),
    "mla": _deepseek_v2,
    "gemma3": _gemma3,
}

LORA_RANK = 8


def make(name: str, folder: Path) -> Path:
    """Have this model in `folder`, made now if it is not there as this file makes it."""
    return _made(folder / name, lambda path: _save_model(name, path))


def make_lora(folder: Path) -> Path:
    """Have an adapter for the model `gqa` in `folder` that changes its answers."""
    return _made(folder / "gqa-lora", _save_lora)


def _made(path: Path, save: Callable[[Path], None]) -> Path:
    marker = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    made = path / "made_by"
    if not made.exists() or made.read_text() != marker:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        save(path)
        made.write_text(marker)
    return path


def _save_model(name: str, path: Path) -> None:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = MODELS[name]()
    model.to(torch.float32).save_pretrained(path)


def _save_lora(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    targets = {"q_proj": 128, "v_proj": 64}
    drawn = torch.Generator().manual_seed(SEED)
    tensors = {}
    for layer in range(4):
        for target, rows in targets.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            a = torch.randn(LORA_RANK, 128, generator=drawn) * INITIALIZER_RANGE
            b = torch.randn(rows, LORA_RANK, generator=drawn) * INITIALIZER_RANGE
            tensors |= {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": LORA_RANK,
        "lora_alpha": 2 * LORA_RANK,
        "target_modules": sorted(targets),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
