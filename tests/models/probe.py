"""One row of the table: the same prompts answered by computing, and by reuse of each kind.

    python -m tests.models.probe hybrid outcome.json

Prompts are asked one at a time, so that
nothing but where their KV comes from differs between

- computed: under a salt of their own each, so that nothing is reused
- own: reused from vLLM's own prefix cache
- ours: after vLLM has forgotten everything, reused from the connector's tier.

The connector compares each block that it loads with a checksum of the device's bytes at the time
they were saved (KVBM_VERIFY).
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from kvbm_service.demo.engine import share_cores
from tests.models.outcome import Outcome
from tests.models.rows import ROWS, Row
from tests.models.zoo import MAX_TOKENS, make, make_lora

MODELS = Path(__file__).parents[2] / "build" / "models" / "zoo"
LENGTHS = (419, 290, 643, 200)
"""Of the prompts: none fills its last block, of whatever size."""
ANSWER_TOKENS = 8
POOL_TOKENS = 12_288
SETTLE_SECONDS = 60.0
NOWHERE = "nats://127.0.0.1:1"


class Answer(msgspec.Struct, frozen=True):
    """To one prompt."""

    tokens: list[int]
    logprobs: list[float]
    cached: int
    """Tokens of the prompt that were not computed."""


def prompts() -> list[list[int]]:
    """Some that have nothing in common, and one that goes on from the first."""
    drawn = random.Random(1)
    apart = [[drawn.randrange(256) for _ in range(length)] for length in LENGTHS]
    return [*apart, apart[0] + [drawn.randrange(256) for _ in range(77)]]


def questions(lora: Any) -> list[tuple[list[int], Any]]:
    """Each prompt, for the base model and (if there is one) for the adapter."""
    return [(prompt, adapter) for adapter in ([None, lora] if lora else [None])
            for prompt in prompts()]  # fmt: skip


def ask(llm: Any, prompt: list[int], lora: Any, salt: str) -> Answer:
    """Ask, and wait for the answer."""
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True, detokenize=False, logprobs=0
    )
    question = {"prompt_token_ids": prompt, "cache_salt": salt}
    (output,) = llm.generate(question, greedy, use_tqdm=False, lora_request=lora)
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    chosen = zip(completion.logprobs, tokens, strict=True)
    return Answer(
        tokens, [position[token].logprob for position, token in chosen], output.num_cached_tokens
    )


def forget(llm: Any) -> None:
    """Have vLLM forget every block, once those that are being saved are in our tier."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while not llm.reset_prefix_cache():
        assert time.monotonic() < deadline, "blocks are still in use"
        time.sleep(0.05)


def start(row: Row, folder: Path) -> Any:
    """vLLM as the row wants it."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    arguments = dict(row.arguments)
    block = arguments.setdefault("block_size", 32)
    settings = {
        "KVBM_NATS_URL": NOWHERE,
        "KVBM_VERIFY": True,
        "KVBM_HOST_CACHE_DIR": "none",
        "DYN_KVBM_DISK_CACHE_DIR": str(folder),
        "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": 256,
    }
    transfer = KVTransferConfig(
        kv_connector="KvbmConnector",
        kv_connector_module_path="kvbm_connectors.vllm",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=settings | dict(row.settings),
    )
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": MAX_TOKENS,
        "num_gpu_blocks_override": POOL_TOKENS // block,
        "max_num_seqs": 4,
    }
    return LLM(
        model=str(make(row.model, MODELS)),
        skip_tokenizer_init=True,
        enforce_eager=True,
        seed=0,
        kv_transfer_config=transfer,
        **defaults | arguments,
    )


def probe(row: Row, folder: Path) -> Outcome:
    """Start the engine, ask, and say what came of it."""
    llm = start(row, folder)
    try:
        return compare(llm, row)
    finally:
        llm.llm_engine.engine_core.shutdown()


def compare(llm: Any, row: Row) -> Outcome:
    """Ask in every way, and compare."""
    from vllm.lora.request import LoRARequest

    lora = LoRARequest("adapter", 1, str(make_lora(MODELS))) if row.lora else None
    asked = questions(lora)
    computed = [ask(llm, *each, f"once {number}") for number, each in enumerate(asked)]
    assert not any(answer.cached for answer in computed)
    for each in asked:
        ask(llm, *each, "kept")
    own = [ask(llm, *each, "kept") for each in asked]
    forget(llm)
    ours = [ask(llm, *each, "kept") for each in asked]
    config = llm.llm_engine.vllm_config
    block = config.cache_config.block_size
    return Outcome(
        prompts=len(asked),
        block_tokens=block,
        groups=groups(llm),
        own_blocks=sum(answer.cached // block for answer in own),
        our_blocks=sum(answer.cached // block for answer in ours),
        expected_blocks=sum((len(prompt) - 1) // block for prompt, _ in asked),
        own_as_computed=_alike(own, computed),
        ours_as_computed=_alike(ours, computed),
        ours_as_own=_alike(ours, own),
        furthest=_furthest(ours, own),
        furthest_from_computed=_furthest(ours, computed),
        different=len({tuple(answer.tokens) for answer in computed}),
    )


def groups(llm: Any) -> int:
    """How many KV cache groups the engine has."""
    return int(llm.collective_rpc(_count_groups)[0])


def _count_groups(worker: Any) -> int:
    return len(worker.model_runner.kv_cache_config.kv_cache_groups)


def _alike(some: list[Answer], others: list[Answer]) -> int:
    return sum(a.tokens == b.tokens for a, b in zip(some, others, strict=True))


def _furthest(some: list[Answer], others: list[Answer]) -> float:
    """The greatest difference of a log probability, where the tokens are the same."""
    return max(
        (
            abs(a - b)
            for one, other in zip(some, others, strict=True)
            if one.tokens == other.tokens
            for a, b in zip(one.logprobs, other.logprobs, strict=True)
        ),
        default=0.0,
    )


def environment(row: Row) -> dict[str, str]:
    """What the engine's processes need: no network but loopback, nothing in the home."""
    state = str(MODELS / "vllm-state")
    return {
        "DO_NOT_TRACK": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HOME": state,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_COMPILE_DISABLE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `groups` sends a function
        "VLLM_CACHE_ROOT": state,
        "VLLM_CONFIG_ROOT": state,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": share_cores(1, row.ranks)[0],
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        **row.environment,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("outcome", type=Path, help="where to write what came of it, as JSON")
    chosen = parser.parse_args()
    row = ROWS[chosen.row]
    os.environ.update(environment(row))
    with tempfile.TemporaryDirectory(prefix="kvbm-models-") as folder:
        outcome = probe(row, Path(folder))
    chosen.outcome.write_bytes(msgspec.json.encode(outcome))


if __name__ == "__main__":
    main()
