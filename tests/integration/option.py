"""One of the guides' three cache options, as users choose it: by environment variables."""

from __future__ import annotations

import os
import re
import time
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

from kvbm_service.demo.engine import BLOCK_TOKENS, Engine, EngineOptions
from kvbm_service.demo.talk import Answer
from tests.integration.node import ANSWER_SECONDS, REST_SECONDS

DEVICE_BLOCKS = 24
BLOCK_GB = 65_536e-9
"""Of the tests' model; the guides' gigabytes are decimal."""
COUNTED_SECONDS = 30.0
"""What ranks have done is counted with the engine's next steps."""

HOST, DISK = "DYN_KVBM_CPU_CACHE_GB", "DYN_KVBM_DISK_CACHE_GB"
D2H, H2DISK, D2DISK = (f"kvbm_offload_blocks_{path}" for path in ("d2h", "h2d", "d2d"))
FROM_HOST, FROM_DISK = "kvbm_onboard_blocks_h2d", "kvbm_onboard_blocks_d2d"
MATCHED = "kvbm_matched_tokens"
PATHS = (D2H, H2DISK, D2DISK, FROM_HOST, FROM_DISK)

Samples = Mapping[str, float]


def gigabytes(blocks: int) -> str:
    """What a user would write for so many blocks, and a bit."""
    return f"{(blocks + 0.5) * BLOCK_GB:.6f}"


class Option:
    """An engine with one option; when it has ended, another one starts in the same directories."""

    def __init__(
        self, name: str, model: Path, logs: Path, url: str, cores: str, **chosen: str
    ) -> None:
        self.name = name
        self._model = model
        self._logs = logs
        self._lives = 0
        self._engine: Engine | None = None
        self._cores = cores
        self._chosen = {
            "KVBM_NATS_URL": url,
            "KVBM_NAMESPACE": f"option-{name}",  # the others' blocks would be hits, too
            "DYN_KVBM_METRICS": "true",
            "DYN_KVBM_METRICS_PORT": "0",
            "KVBM_METRICS_HOST": "127.0.0.1",
            **chosen,
        }

    # -- its life ------------------------------------------------------------------------------

    def start(self) -> Option:
        """Start an engine, unless one runs, and do not wait for it."""
        if self._engine is None or not self._engine.alive:
            self._lives += 1
            probe = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
            self._engine = Engine(
                EngineOptions(
                    model=self._model,
                    log=self._logs / f"{self.name}-{self._lives}.log",
                    device_blocks=DEVICE_BLOCKS,
                    connector={},
                    cores=self._cores,
                    environment=self._chosen
                    | {"PYTHONPATH": os.pathsep.join(probe), "VLLM_LOGGING_LEVEL": "INFO"},
                    arguments={"worker_extension_cls": "worker_probe.Probe"},
                )
            )
        return self

    @property
    def engine(self) -> Engine:
        """The running engine, ready to answer."""
        assert self._engine is not None
        return self._engine.wait_ready()

    def kill(self) -> None:
        """kill -9."""
        if self._engine is not None:
            self._engine.kill()

    # -- asking it -----------------------------------------------------------------------------

    def ask(self, prompt: list[int]) -> Answer:
        """Ask, and wait; an engine that hangs fails the test."""
        return self.engine.ask(prompt, timeout_seconds=ANSWER_SECONDS)

    def ask_all(self, prompts: list[list[int]]) -> list[Future[Answer]]:
        """Ask all at once, and do not wait."""
        return [self.engine.submit(prompt) for prompt in prompts]

    def forget_device(self) -> None:
        """Empty the device pool, as soon as no block of it is held."""
        wait(f"{self.name} holds no device block", self.engine.reset_prefix_cache, REST_SECONDS)

    @property
    def log(self) -> str:
        """What the engine has logged so far."""
        return self.engine.options.log.read_text(errors="replace")

    # -- what it counts ------------------------------------------------------------------------

    def samples(self) -> Samples:
        """Everything that /metrics says now."""
        (address,) = set(re.findall(r"metrics are served at (http://\S+)", self.log))
        with urllib.request.urlopen(address, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def since(
        self, before: Samples, enough: Callable[[Samples], bool] = lambda by: True
    ) -> dict[str, float]:
        """What was counted since `before`, as soon as it is enough."""
        grown: dict[str, float] = {}

        def is_enough() -> bool:
            now = self.samples()
            grown.update({name: now[name] - before.get(name, 0.0) for name in now})
            return enough(grown)

        wait(f"{self.name} has counted enough", is_enough, COUNTED_SECONDS)
        return grown


def by_path(samples: Samples) -> dict[str, float]:
    """The guides' block counters that are not 0."""
    return {name: samples[name] for name in PATHS if samples[name]}


def failures(samples: Samples) -> dict[str, float]:
    """Blocks that did not arrive, by path and reason."""
    return {name: value for name, value in samples.items() if "failed_blocks" in name and value}


def wait(what: str, condition: Callable[[], object], seconds: float) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def tokens(blocks: int) -> int:
    """How many there are in so many blocks."""
    return blocks * BLOCK_TOKENS
