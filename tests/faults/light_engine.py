"""An engine without a model, in a process of its own: it computes nothing but does all the rest.

A real leader and a real worker, over NATS and NIXL; only a block's "KV" is drawn from its name, so
it is known what every byte must be. It obeys one line of JSON after the other.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch

from kvbm_schemas.block import BlockHash
from kvbm_schemas.step import StepResults
from kvbm_schemas.subjects import Scope
from kvbm_service.core.columns import unpack_u32
from kvbm_service.core.leader import Leader
from kvbm_service.host_worker import start_worker
from kvbm_service.leader_service import LeaderService
from kvbm_service.network import over_nats
from kvbm_service.settings import Settings
from kvbm_service.worker_service import RankId

SCOPE = Scope("faults", "0123456789abcdef")
LAYERS = 2
PIECE_BYTES = 64 << 10
BLOCK_BYTES = LAYERS * PIECE_BYTES
DEVICE_BLOCKS = 32
HOST_BLOCKS = 256
STEP_SECONDS = 0.001
"""How often it takes a step while something is under way."""


Chain = list[BlockHash]
"""A prompt: the names of its blocks."""


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Answer these prompts, at the same time."""

    chains: list[Chain]


class Forget(msgspec.Struct, frozen=True, tag=True):
    """Forget every block."""


class Look(msgspec.Struct, frozen=True, tag=True):
    """Say how things are."""


class Answer(msgspec.Struct, frozen=True):
    """How a prompt was answered."""

    right: bool
    """Whether each byte in the device is what it has to be."""
    host: int
    remote: int
    """Blocks that were loaded, by where they are said to come from."""
    failed: int
    """How many of those did not arrive, and were computed."""
    reason: str
    seconds: float
    """Until nothing was to be waited for any more: what is absent could be computed."""


@dataclass
class Prompt:
    """A prompt being answered."""

    request: str
    chain: Chain
    device: range
    """Where its blocks are to be."""
    began: float = field(default_factory=time.monotonic)
    found: int = 0
    failed: set[int] = field(default_factory=set)
    reason: str = ""
    seconds: float = 0.0


class State(msgspec.Struct, frozen=True):
    """What is held, and what is held on to."""

    held: list[BlockHash]
    pinned: int
    """Slots that may not be reused."""
    leases: int
    open: int
    """Loads and saves that have not ended, and requests that are still followed."""


Said = list[Answer] | State | None


class LightEngine:
    """One rank; requests come in groups, one group at a time."""

    def __init__(self, settings: Settings, node: str) -> None:
        shape = (DEVICE_BLOCKS, PIECE_BYTES)
        self._device = [torch.zeros(shape, dtype=torch.uint8) for _ in range(LAYERS)]
        connect = over_nats(settings, node)
        caches = {f"layer{number}": tensor for number, tensor in enumerate(self._device)}
        instance = f"{node}-{time.time_ns()}"
        rank = RankId(SCOPE, node, 0, 1, instance)
        self._worker = start_worker(settings, rank, caches, DEVICE_BLOCKS, connect)
        self._leader = LeaderService(settings, SCOPE, node, 1, connect, instance=instance)
        self._leader.attach(self._worker.record)
        self._leader.start()
        self._numbers = itertools.count(1)

    def ask(self, chains: Sequence[Chain]) -> list[Answer]:
        """Have all blocks of these prompts in the device, then save those that are not yet."""
        for layer in self._device:
            layer.zero_()
        starts = itertools.accumulate((len(chain) for chain in chains), initial=0)
        prompts = [
            Prompt(f"request-{next(self._numbers)}", chain, range(start, start + len(chain)))
            for start, chain in zip(starts, chains, strict=False)
        ]
        for prompt in prompts:
            self._leader.arrive(prompt.request, prompt.chain)
        for prompt in prompts:
            self._match(prompt)
        self._load({prompt.request: prompt for prompt in prompts if prompt.found})
        answers = [self._answer(prompt) for prompt in prompts]
        for prompt in prompts:
            self._store(prompt)
            self._leader.finish(prompt.request)
        return answers

    def forget(self) -> None:
        """Forget every block."""
        self._leader.reset()
        for _ in self._steps():
            pass

    def look(self) -> State:
        """How things are now."""

        def state(core: Leader) -> State:
            core.check_integrity()
            blocks = [block for _, blocks in core.snapshot()[1] for block in blocks]
            return State(
                held=blocks,
                pinned=core.tiers.host.pinned,
                leases=len(core.lending.leases),
                open=len(core.loads) + core.busy + len(core.lookups.readers),
            )

        return self._leader.on_core(state, State([], 0, 0, 0))

    def close(self) -> None:
        """Leave."""
        self._leader.close()
        self._worker.close()

    def _match(self, prompt: Prompt) -> None:
        """Ask what can be loaded, until there is an answer."""
        while (found := self._leader.match(prompt.request, 0)) is None:
            time.sleep(STEP_SECONDS)
        prompt.found = found
        prompt.seconds = time.monotonic() - prompt.began

    def _load(self, waiting: dict[str, Prompt]) -> None:
        """Load what was promised to these, and see what has arrived."""
        for prompt in waiting.values():
            self._leader.load(prompt.request, 0, prompt.device[: prompt.found])
        for results in self._steps():
            for load in results.loads:
                prompt = waiting.pop(load.request)
                prompt.failed = set(unpack_u32(load.failed_blocks))
                prompt.reason = load.reason
                prompt.seconds = time.monotonic() - prompt.began
        assert not waiting, "a load was not reported"

    def _answer(self, prompt: Prompt) -> Answer:
        for at, name in enumerate(prompt.chain):
            if at >= prompt.found or prompt.device[at] in prompt.failed:
                self._compute(prompt.device[at], name)
        hits = self._leader.hits(prompt.request)
        return Answer(
            all(map(self._is_right, prompt.device, prompt.chain)),
            hits.host,
            hits.remote,
            len(prompt.failed),
            prompt.reason,
            prompt.seconds,
        )

    def _store(self, prompt: Prompt) -> None:
        done = 0
        while done < len(prompt.chain):
            after = prompt.chain[done - 1] if done else None
            more, _ = self._leader.store(
                prompt.request, after, prompt.chain[done:], prompt.device[done:]
            )
            done += more
            for _ in self._steps():
                pass

    def _steps(self) -> Iterator[StepResults]:
        """Take steps until the rank has reported everything; gives what it reports."""
        while True:
            self._worker.submit(self._leader.take_commands())
            results = self._worker.collect()
            if results is not None:
                self._leader.report([results])
                yield results
            elif not self._leader.busy:
                return
            else:
                time.sleep(STEP_SECONDS)

    def _compute(self, at: int, name: BlockHash) -> None:
        for layer, octets in zip(self._device, _content(name), strict=True):
            layer[at] = torch.from_numpy(octets)

    def _is_right(self, at: int, name: BlockHash) -> bool:
        return all(
            np.array_equal(layer[at].numpy(), octets)
            for layer, octets in zip(self._device, _content(name), strict=True)
        )


def _content(name: BlockHash) -> list[np.ndarray]:
    """The bytes of a block, by layer."""
    chance = np.random.default_rng(int.from_bytes(name, "big"))
    return [np.frombuffer(chance.bytes(PIECE_BYTES), np.uint8).copy() for _ in range(LAYERS)]


def main() -> None:
    """Obey the lines of stdin until it ends."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    node, said = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print is not an answer
    extra = msgspec.json.decode(said, type=dict[str, object])
    tiers = {"cpu_cache_override_num_blocks": HOST_BLOCKS, "host_cache_dir": "none"}
    engine = LightEngine(Settings.load({}, tiers | extra), node)
    decoder = msgspec.json.Decoder[Ask | Forget | Look](Ask | Forget | Look)
    answer: Said = None
    print(msgspec.json.encode(answer).decode(), file=out)
    for line in sys.stdin:
        match decoder.decode(line):
            case Ask(chains):
                answer = engine.ask(chains)
            case Forget():
                engine.forget()
                answer = None
            case Look():
                answer = engine.look()
        print(msgspec.json.encode(answer).decode(), file=out)
    engine.close()


if __name__ == "__main__":
    main()
