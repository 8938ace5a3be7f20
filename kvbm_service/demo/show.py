"""The demo: a prompt computed by one vLLM engine is reused by another, and one sees how.

Engine A answers a prompt. Engine B answers it without any cache (a cache salt of its own keeps
every block apart), then again as it is: now B finds A's blocks through the registry, leases
them, and reads them out of A's memory. The two answers of B must be the same, token for token.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvbm_schemas.block import count
from kvbm_schemas.codec import AnyMessage, Decoder, Malformed
from kvbm_schemas.events import Loaded, Removed, Stored
from kvbm_schemas.message import Message
from kvbm_schemas.requests import Acquire, Lookup, Release
from kvbm_schemas.subjects import EVERYTHING, parse
from kvbm_service.adapters.bus import Delivery
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.demo.cluster import Cluster
from kvbm_service.demo.engine import Engine, EngineOptions, share_cores
from kvbm_service.demo.model import VOCABULARY, make_model
from kvbm_service.demo.talk import Answer
from kvbm_service.errors import KvbmError

PROMPT_TOKENS = 2048
ANSWER_TOKENS = 16
SETTLE_SECONDS = 30.0
"""How long A's blocks may take to be visible to everyone."""

_decoder: Decoder[AnyMessage] = Decoder(AnyMessage)  # type: ignore[arg-type]


class Outcome(msgspec.Struct):
    """The demo's last line."""

    prompt_tokens: int
    reused_tokens: int
    reused_from: str
    identical: bool
    ttft_cold_ms: float
    ttft_reused_ms: float
    transferred_bytes: int

    @property
    def good(self) -> bool:
        """Whether blocks were really reused, and the answer is the same."""
        return self.identical and self.reused_tokens > 0 and bool(self.reused_from)


@dataclass
class Watcher:
    """Listens to the bus, shows what happens there, and remembers what matters."""

    console: Console
    stored: dict[str, int] = field(default_factory=dict)
    loads: list[tuple[str, Loaded]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    async def take(self, delivery: Delivery) -> None:
        """One message."""
        subject = parse(delivery.subject)
        try:
            message = _decoder.decode(delivery.payload)
        except Malformed:
            return
        if subject is None or (line := _in_words(subject.node, message)) is None:
            return
        self.console.print(f"  [dim]{subject.what:>8}[/dim]  {line}")
        with self.changed:
            if isinstance(message, Stored):
                before = self.stored.get(subject.node, 0)
                self.stored[subject.node] = before + count(message.hashes)
            elif isinstance(message, Loaded):
                self.loads.append((subject.node, message))
            self.changed.notify_all()

    def wait_until_stored(self, node: str, blocks: int) -> None:
        """Wait until `node` has told of so many blocks.

        Raises:
            KvbmError: it has not, for a long time.
        """
        with self.changed:
            if not self.changed.wait_for(
                lambda: self.stored.get(node, 0) >= blocks, SETTLE_SECONDS
            ):
                raise KvbmError(f"{node} has told of {self.stored.get(node, 0)} blocks of {blocks}")


def _in_words(node: str, message: Message) -> str | None:
    match message:
        case Stored():
            return f"[green]{node}[/green] holds {count(message.hashes)} more blocks in G2"
        case Removed():
            return f"[yellow]{node}[/yellow] has evicted {count(message.hashes)} blocks"
        case Lookup():
            return f"{message.asker} asks who has {count(message.hashes)} blocks"
        case Acquire():
            return f"[green]{node}[/green] is asked for a lease on {count(message.hashes)} blocks"
        case Release():
            return f"[green]{node}[/green] has its lease back"
        case Loaded():
            places = ", ".join(
                f"{source.blocks} blocks ({source.bytes / 1e6:.1f} MB) from {source.node}"
                for source in message.sources
            )
            return f"[cyan]{node}[/cyan] read {places} in {message.seconds * 1e3:.0f} ms"
    return None


@contextlib.contextmanager
def watching(url: str, console: Console) -> Iterator[Watcher]:
    """Listen to everything on the bus at `url`, on a thread of its own."""
    watcher = Watcher(console)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="watcher", daemon=True)
    thread.start()

    async def listen() -> NatsBus:
        bus = await NatsBus.connect(url, name="kvbm demo")
        await bus.subscribe(EVERYTHING, watcher.take)
        return bus

    bus = asyncio.run_coroutine_threadsafe(listen(), loop).result(30)
    try:
        yield watcher
    finally:
        asyncio.run_coroutine_threadsafe(bus.close(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def run(folder: Path | None = None, console: Console | None = None) -> Outcome:
    """Run the demo with its model, logs and state in `folder` (default: a temporary one).

    Raises:
        KvbmError: something did not start, or did not come about.
    """
    console = console or Console(stderr=False)
    if folder is not None:
        return _run(folder, console)
    with tempfile.TemporaryDirectory(prefix="kvbm-demo-") as temporary:
        return _run(Path(temporary), console)


def _run(folder: Path, console: Console) -> Outcome:
    with _spinner(console, "making a small model with random weights"):
        model = make_model(folder / "model", "small")
    with Cluster(folder) as cluster, watching(cluster.url, console) as watcher:
        console.print(f"NATS and a registry at {cluster.url}")
        with contextlib.ExitStack() as stack:
            engines = _start_engines(folder, model, cluster.url, console, stack)
            return _share(engines["A"], engines["B"], watcher, console)


def _start_engines(
    folder: Path, model: Path, url: str, console: Console, stack: contextlib.ExitStack
) -> dict[str, Engine]:
    engines: dict[str, Engine] = {}
    for name, cores in zip("AB", share_cores(engines=2), strict=True):
        options = EngineOptions(
            model=model,
            log=folder / f"engine-{name}.log",
            cores=cores,
            connector={
                "KVBM_NATS_URL": url,
                "KVBM_NODE_NAME": f"engine-{name}",
                "KVBM_LOOKUP_DEADLINE_MS": 500,  # two engines, NATS and a registry on few cores
                "DYN_KVBM_CPU_CACHE_GB": 0.2,
            },
        )
        engines[name] = stack.enter_context(Engine(options))
    with _progress(console) as progress, ThreadPoolExecutor() as threads:
        waiting = []
        for name, engine in engines.items():
            task = progress.add_task(f"engine {name}: starting vLLM", total=None)

            def tell(stage: str, name: str = name, task: object = task) -> None:
                progress.update(task, description=f"engine {name}: {stage}")  # type: ignore[arg-type]

            waiting.append(threads.submit(engine.wait_ready, progress=tell))
        for started in waiting:
            started.result()
    return engines


def _share(a: Engine, b: Engine, watcher: Watcher, console: Console) -> Outcome:
    chooser = random.Random(7)
    warm_up, prompt = ([chooser.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in "12")
    console.rule("warming up")
    for engine in (a, b):  # the first prompt of an engine's life pays for what is made lazily
        engine.ask(warm_up, 2, cache_salt="warm-up")
    console.rule("engine A computes the prompt")
    before = watcher.stored.get("engine-A", 0)
    first = a.ask(prompt, ANSWER_TOKENS)
    watcher.wait_until_stored("engine-A", before + PROMPT_TOKENS // 32)
    console.rule("engine B computes it by itself, with no cache")
    cold = b.ask(prompt, ANSWER_TOKENS, cache_salt="alone")
    console.rule("engine B is asked the same prompt")
    watcher.loads.clear()
    reused = b.ask(prompt, ANSWER_TOKENS)
    with watcher.changed:
        watcher.changed.wait_for(lambda: bool(watcher.loads), 5.0)
    outcome = _judge(first, cold, reused, watcher)
    console.print(_table(outcome))
    return outcome


def _judge(first: Answer, cold: Answer, reused: Answer, watcher: Watcher) -> Outcome:
    remote = [
        source
        for node, load in watcher.loads
        for source in load.sources
        if node == "engine-B" and source.node != node
    ]
    return Outcome(
        prompt_tokens=PROMPT_TOKENS,
        reused_tokens=reused.cached_tokens,
        reused_from=remote[0].node if remote else "",
        identical=first.tokens == cold.tokens == reused.tokens,
        ttft_cold_ms=round(cold.ttft_seconds * 1e3, 1),
        ttft_reused_ms=round(reused.ttft_seconds * 1e3, 1),
        transferred_bytes=sum(source.bytes for source in remote),
    )


def _table(outcome: Outcome) -> Table:
    table = Table("engine B, one prompt", "computed alone", "with A's blocks")
    speedup = outcome.ttft_cold_ms / max(outcome.ttft_reused_ms, 0.1)
    table.add_row("prompt tokens computed", str(outcome.prompt_tokens),
                  str(outcome.prompt_tokens - outcome.reused_tokens))  # fmt: skip
    reused = f"{outcome.reused_tokens} from {outcome.reused_from}"
    table.add_row("prompt tokens reused", "0", reused)
    table.add_row("bytes read from A's memory", "0", f"{outcome.transferred_bytes:,}")
    table.add_row("time to first token", f"{outcome.ttft_cold_ms:.0f} ms",
                  f"{outcome.ttft_reused_ms:.0f} ms ({speedup:.1f} x faster)")  # fmt: skip
    same = "[green]yes[/green]" if outcome.identical else "[red]NO[/red]"
    table.add_row("same answer, token for token", "", same)
    return table


@contextlib.contextmanager
def _spinner(console: Console, what: str) -> Iterator[None]:
    with _progress(console) as progress:
        progress.add_task(what, total=None)
        yield


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console
    )


def main() -> int:
    """Run it, print the outcome as one line of JSON, and return the exit status."""
    console = Console()
    began = time.monotonic()
    outcome = run(console=console)
    console.print(f"[dim]took {time.monotonic() - began:.0f} s[/dim]")
    print(json.dumps(msgspec.to_builtins(outcome)), flush=True)
    return 0 if outcome.good else 1
