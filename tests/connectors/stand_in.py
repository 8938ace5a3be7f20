"""The model class that vLLM asks about, and never runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.models import ModelRegistry

ARCHITECTURE = "StandInForCausalLM"

CONFIG = {
    "architectures": [ARCHITECTURE],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "torch_dtype": "float32",
}


class StandInForCausalLM(nn.Module):
    """Has the methods by which vLLM recognises a language model."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()

    def embed_input_ids(self, input_ids: Any) -> Any:
        raise NotImplementedError

    def forward(self, input_ids: Any, positions: Any) -> Any:
        raise NotImplementedError

    def compute_logits(self, hidden_states: Any) -> Any:
        raise NotImplementedError


def make_model(folder: Path, **changed: Any) -> ModelConfig:
    """A model of which only the configuration exists, in `folder`."""
    # Known in this process: vLLM need not start another to look at the class.
    ModelRegistry.register_model(ARCHITECTURE, StandInForCausalLM)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changed))
    return ModelConfig(
        model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=1024, seed=0
    )
