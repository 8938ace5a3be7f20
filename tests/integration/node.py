"""An engine that takes part: asked, and watched through what it says on the bus."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvbm_schemas.events import Beat
from kvbm_schemas.subjects import Scope
from kvbm_service.demo.engine import BLOCK_TOKENS, Engine, EngineOptions
from kvbm_service.demo.model import VOCABULARY
from kvbm_service.demo.talk import Answer
from tests.integration.witness import Report, Witness

ANSWER_SECONDS = 180.0
"""No answer takes this long, whatever has died; an engine that does not answer hangs."""
REST_SECONDS = 60.0
MEMBERSHIP_SECONDS = 4.0
LOOKUP_SECONDS = 2.0
TRANSFER_SECONDS = 3.0
DEVICE_BLOCKS = 40
HOST_BLOCKS = 48

PLUGINS = str(Path(__file__).parent / "plugins")
os.environ["PYTHONPATH"] = os.pathsep.join(
    [*filter(None, [os.environ.get("PYTHONPATH")]), PLUGINS]
)  # of every engine that a test starts

TAIL = list(range(40))
"""How every prompt ends: a block and a bit, so that an answer can only differ by its prefix."""


def prompt(seed: object, blocks: int) -> list[int]:
    """So many full blocks, all its own, and a bit."""
    chooser = random.Random(repr(seed))
    own = blocks * BLOCK_TOKENS + BLOCK_TOKENS // 2 - len(TAIL)
    return [chooser.randrange(VOCABULARY // 2) for _ in range(own)] + TAIL


def same(answer: Answer, reference: Answer) -> bool:
    """Whether two answers agree in every token, and in how likely each was."""
    return answer.tokens == reference.tokens and answer.logprobs == pytest.approx(
        reference.logprobs, abs=1e-3
    )


def node_options(model: Path, log: Path, url: str, name: str, **changed: Any) -> EngineOptions:
    """A small node that checksums everything; `connector` in `changed` adds to its settings."""
    connector = {
        "KVBM_NATS_URL": url,
        "KVBM_NODE_NAME": name,
        "KVBM_VERIFY": True,
        "KVBM_LOOKUP_DEADLINE_MS": LOOKUP_SECONDS * 1e3,
        "KVBM_MEMBERSHIP_SECONDS": MEMBERSHIP_SECONDS,
        "KVBM_TRANSFER_TIMEOUT_SECONDS": TRANSFER_SECONDS,
        "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": HOST_BLOCKS,
        "KVBM_HOST_CACHE_DIR": "none",
    } | changed.pop("connector", {})
    arguments = {"worker_extension_cls": "worker_probe.Probe"} | changed.pop("arguments", {})
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return EngineOptions(
        **{
            "model": model,
            "log": log,
            "device_blocks": DEVICE_BLOCKS,
            "connector": {key: value for key, value in connector.items() if value is not None},
            "arguments": arguments,
            "environment": {"PYTHONPATH": os.pathsep.join(paths), "VLLM_LOGGING_LEVEL": "INFO"},
        }
        | changed
    )


class Node:
    """A running engine under its node's name."""

    def __init__(self, engine: Engine, witness: Witness) -> None:
        self.engine = engine
        self.witness = witness
        connector = engine.options.connector
        assert connector is not None
        self.name = str(connector["KVBM_NODE_NAME"])

    @property
    def log(self) -> str:
        """What the engine has logged so far."""
        return self.engine.options.log.read_text(errors="replace")

    def ask(self, prompt: Sequence[int], max_tokens: int = 8, salt: str | None = None) -> Answer:
        """Ask, and wait; an engine that hangs fails the test."""
        return self.engine.ask(prompt, max_tokens, salt, ANSWER_SECONDS)

    def compute(self, prompt: Sequence[int], blocks: int) -> tuple[Answer, Scope, list[bytes]]:
        """Have the prompt computed, and its blocks known to everyone; returns their names."""
        report = self.witness.listen()
        answer = self.ask(prompt)
        names = self.wait_stored(report, blocks)
        scope = report.scope(self.name)
        self.witness.wait_until_located(scope, names, self.name)
        return answer, scope, names

    def wait_stored(self, report: Report, blocks: int) -> list[bytes]:
        """Wait until the node has told of so many blocks; returns their names."""
        what = f"{self.name} has {blocks} more blocks"
        self.witness.wait(what, lambda: len(report.stored(self.name)) >= blocks)
        return report.stored(self.name)

    def wait_loaded(self, report: Report) -> dict[str, int]:
        """Wait until the node has told of a load; returns its blocks by where they came from."""
        what = f"{self.name} has told of a load"
        return self.witness.wait(what, lambda: report.sources(self.name))

    @contextlib.contextmanager
    def running(self, prompt: Sequence[int]) -> Iterator[list[int]]:
        """Have the prompt's answer under way; gives the device blocks that the prompt is in."""
        answer = self.engine.submit(prompt, max_tokens=500)
        try:
            what = f"{self.name} works on the prompt"
            yield self.witness.wait(
                what, lambda: self.engine.call_workers("kvbm_device_blocks")[0]
            )[0]
        finally:
            answer.cancel()
            self.witness.wait(
                f"{self.name} has ended the request",
                lambda: not self.engine.call_workers("kvbm_device_blocks")[0],
            )

    def wait_joined(self, seconds: float = ANSWER_SECONDS) -> Node:
        """Wait until the node takes part: what it comes to hold from now on, it tells of."""
        report = self.witness.listen()
        what = f"{self.name} takes part"
        self.witness.wait(what, lambda: report.of(Beat, self.name), seconds)
        return self

    def wait_until_it_reads_from(self, owner: Node, seconds: float) -> None:
        """Wait until a prompt that `owner` has computed is read from there."""
        turns = itertools.count()

        def reads() -> bool:
            question = prompt((self.name, owner.name, time.monotonic(), next(turns)), 2)
            owner.compute(question, 2)
            return self.ask(question).cached_tokens > 0

        self.witness.wait(f"{self.name} reads from {owner.name}", reads, seconds)

    def forget_device(self) -> None:
        """Empty the device pool. Fails when a block of it is never given back."""
        self.witness.wait(
            f"no device block of {self.name} is held",
            self.engine.reset_prefix_cache,
            REST_SECONDS,
        )

    def forget(self) -> None:
        """Empty the device pool and the host tier."""
        self.forget_device()
        assert self.engine.reset_prefix_cache(connector=True)

    def check_at_rest(self) -> None:
        """The engine lives, and soon holds nothing: no block, no pin, no lease."""
        assert self.engine.alive
        self.forget_device()
        since = time.monotonic()

        def nothing_pinned() -> bool:
            return self.witness.pinned(self.name, time.monotonic() - since) == 0

        self.witness.wait(f"{self.name} has nothing pinned", nothing_pinned, REST_SECONDS)
