"""What an operator feels: time to first token and throughput of real vLLM engines.

Three engines on one host, asked one at a time: one without a connector, one that computes and
keeps blocks (A), one that reads A's (B). Each figure is the median of several prompts; what is
compared is measured in turns, so that a busy minute of the host meets both sides.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from kvbm_service.bench.row import Row
from kvbm_service.demo.cluster import Cluster
from kvbm_service.demo.engine import BLOCK_TOKENS, Engine, EngineOptions, share_cores
from kvbm_service.demo.model import VOCABULARY, make_model

PROMPT_TOKENS = 2048
ROUNDS = 5
THROUGHPUT_PROMPTS = 8
THROUGHPUT_TOKENS = 512
THROUGHPUT_ROUNDS = 7
SETTLE_SECONDS = 60.0

Say = Callable[[str], None]


class _Engines(NamedTuple):
    alone: Engine
    a: Engine
    b: Engine


def rows(say: Say) -> list[Row]:
    """Measure everything; `say` hears what is going on."""
    with _engines(say) as engines:
        chooser = random.Random(time.time_ns())
        for engine in engines:
            engine.ask(_prompt(chooser, PROMPT_TOKENS), 1)
        samples: dict[str, list[float]] = {}
        for number in range(ROUNDS):
            say(f"time to first token, round {number + 1} of {ROUNDS}")
            for name, seconds in _first_tokens(engines, chooser):
                samples.setdefault(name, []).append(seconds * 1e3)
        say("throughput without any reuse")
        return [*_ttft_rows(samples), _throughput(engines, chooser)]


def _first_tokens(engines: _Engines, chooser: random.Random) -> Iterator[tuple[str, float]]:
    prompt = _prompt(chooser, PROMPT_TOKENS)
    yield "alone cold", _ttft(engines.alone, prompt, cached=0)
    yield "alone own cache", _ttft(engines.alone, prompt, cached=PROMPT_TOKENS)
    yield "cold", _ttft(engines.a, prompt, cached=0)
    yield "own cache", _ttft(engines.a, prompt, cached=PROMPT_TOKENS)
    _empty_device_pool(engines.a)
    yield "g2", _ttft(engines.a, prompt, cached=PROMPT_TOKENS)
    yield "remote", _ttft(engines.b, prompt, cached=PROMPT_TOKENS)
    yield "own cache of b", _ttft(engines.b, prompt, cached=PROMPT_TOKENS)


def _ttft(engine: Engine, prompt: list[int], cached: int) -> float:
    """Seconds to the first token of `prompt`, of which all full blocks, or none, are cached."""
    answer = engine.ask(prompt, 1)
    expected = max(0, cached - BLOCK_TOKENS)
    if answer.cached_tokens != expected:
        raise AssertionError(f"{answer.cached_tokens} tokens were cached, not {expected}")
    return answer.ttft_seconds


def _empty_device_pool(engine: Engine) -> None:
    """Forget the device pool's blocks, as soon as no save holds them any more."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while not engine.reset_prefix_cache():
        assert time.monotonic() < deadline, "the device pool stays in use"


def _ttft_rows(samples: dict[str, list[float]]) -> list[Row]:
    median = {name: statistics.median(values) for name, values in samples.items()}

    def row(name: str, ours: str, yardstick: str, theirs: str) -> Row:
        value, least = median[ours], median[theirs]
        return Row(name, value, "ms", yardstick, least, value / least)

    return [
        row("ttft_cold", "cold", "the engine alone, cold", "alone cold"),
        row("ttft_own_cache", "own cache", "the engine alone, own cache", "alone own cache"),
        row("ttft_g2", "g2", "own prefix cache", "own cache"),
        row("ttft_remote", "remote", "own prefix cache", "own cache of b"),
    ]


def _throughput(engines: _Engines, chooser: random.Random) -> Row:
    alone, ours = [], []
    for _ in range(THROUGHPUT_ROUNDS):
        alone.append(_tokens_per_second(engines.alone, chooser))
        ours.append(_tokens_per_second(engines.a, chooser))
    value, yardstick = statistics.median(ours), statistics.median(alone)
    return Row(
        "throughput_no_reuse", value, "tokens/s", "the engine alone", yardstick, value / yardstick
    )


def _tokens_per_second(engine: Engine, chooser: random.Random) -> float:
    """Prompt and answer tokens per second, of prompts that share nothing."""
    prompts = [_prompt(chooser, THROUGHPUT_TOKENS) for _ in range(THROUGHPUT_PROMPTS)]
    began = time.perf_counter()
    asked = [engine.submit(prompt, max_tokens=16) for prompt in prompts]
    tokens = sum(THROUGHPUT_TOKENS + len(future.result(300).tokens) for future in asked)
    return tokens / (time.perf_counter() - began)


def _prompt(chooser: random.Random, tokens: int) -> list[int]:
    return [chooser.randrange(VOCABULARY) for _ in range(tokens)]


@contextmanager
def _engines(say: Say) -> Iterator[_Engines]:
    with tempfile.TemporaryDirectory(prefix="kvbm-bench-") as temporary, ExitStack() as stack:
        folder = Path(temporary)
        say("making a model of the shape of Qwen3-0.6B")
        model = make_model(folder / "model", "qwen3-0.6b")
        cluster = stack.enter_context(Cluster(folder))

        def start(name: str, connector: dict[str, object] | None) -> Engine:
            say(f"starting engine {name}")
            options = EngineOptions(
                model=model,
                log=folder / f"{name}.log",
                device_blocks=4 * PROMPT_TOKENS // BLOCK_TOKENS,
                cores=share_cores()[0],
                connector=connector,
            )
            return stack.enter_context(Engine(options))

        ours: dict[str, object] = {
            "KVBM_NATS_URL": cluster.url,
            "DYN_KVBM_CPU_CACHE_GB": 2.0,
            "KVBM_LOOKUP_DEADLINE_MS": 200,
        }
        engines = _Engines(start("alone", None), start("a", ours), start("b", ours))
        with ThreadPoolExecutor() as threads:
            list(threads.map(Engine.wait_ready, engines))
        yield engines
