"""A Qwen3 model with random weights, made in seconds and the same on every machine.

Its answers mean nothing, but each depends on the whole prompt: weights as small as most
initialisations draw them would give every prompt the same answer, and a cache that returns
the wrong blocks would go unnoticed. Hence `INITIALIZER_RANGE`, and embeddings of its own at
either end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

INITIALIZER_RANGE = 0.1
SEED = 20_260_701
VOCABULARY = 512
"""256 bytes and a few named tokens; the rest is there to be predicted."""

END = "<|end|>"
PADDING = "<|padding|>"


@dataclass(frozen=True)
class Shape:
    """What decides a model's size, and so what its KV blocks weigh."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    dtype: str
    max_tokens: int


SHAPES = {
    "tiny": Shape(
        layers=4,
        hidden=128,
        intermediate=256,
        heads=4,
        kv_heads=2,
        head_size=32,
        dtype="float32",
        max_tokens=8192,
    ),
    "small": Shape(
        layers=12,
        hidden=512,
        intermediate=1536,
        heads=8,
        kv_heads=4,
        head_size=64,
        dtype="float32",
        max_tokens=8192,
    ),
    "qwen3-0.6b": Shape(
        layers=28,
        hidden=1024,
        intermediate=3072,
        heads=16,
        kv_heads=8,
        head_size=128,
        dtype="bfloat16",
        max_tokens=8192,
    ),
}
"""`tiny` for tests, where a difference in float32 is a fault; `small` for the demo, where
computing a prompt should take a second; the other for timings."""


def make_model(path: Path, size: str = "tiny") -> Path:
    """Have a model of this size in `path`, made now if it is not there yet. Returns `path`.

    A folder that holds anything else is replaced. Two processes may ask at once: one makes it,
    the other waits. What is seen in `path` is always complete.

    Raises:
        ValueError: no such size.
    """
    if size not in SHAPES:
        raise ValueError(f"no model of size {size!r}: choose one of {', '.join(SHAPES)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        marker = _marker(size)
        made = path / "made.json"
        if made.exists() and made.read_text() == marker:
            return path
        draft = path.with_name(f"{path.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        _write_tokenizer(draft, SHAPES[size])
        _write_weights(draft, SHAPES[size])
        (draft / made.name).write_text(marker)
        shutil.rmtree(path, ignore_errors=True)
        draft.rename(path)
    return path


def _marker(size: str) -> str:
    """What a finished folder says about itself: everything its content depends on."""
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return json.dumps({"size": size, "made_by": source, **asdict(SHAPES[size])})


def _write_weights(path: Path, shape: Shape) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=shape.max_tokens,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Qwen3ForCausalLM(config)
    model.to(getattr(torch, shape.dtype)).save_pretrained(path)


def _write_tokenizer(path: Path, shape: Shape) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, PADDING])
    named = VOCABULARY - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<{number}>" for number in range(named)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PADDING,
        model_max_length=shape.max_tokens,
    ).save_pretrained(path)
