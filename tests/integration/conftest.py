"""Real vLLM engines for tests. They start slowly, so most tests share a few of them.

- `reference` computes every answer by itself: no connector, nothing reused.
- `site` has what nodes need to find each other, and a witness who hears all they say.
- `pair` is two nodes of one cluster, with a device pool and a host tier of a few blocks each.
- `options` are three engines, one with each of the guides' cache options.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbm_service.demo.cluster import Cluster
from kvbm_service.demo.engine import Engine, EngineOptions, share_cores
from kvbm_service.demo.model import make_model
from kvbm_service.demo.talk import Answer
from tests.integration.node import ANSWER_SECONDS, MEMBERSHIP_SECONDS, Node, node_options
from tests.integration.option import DISK, HOST, Option, gigabytes
from tests.integration.witness import Witness

ROOT = Path(__file__).parents[2]
TEST_SECONDS = 600
"""Starting engines on two slow cores takes a minute or more."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is slow, and marked so."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(TEST_SECONDS))


@pytest.fixture(scope="session")
def model() -> Path:
    """The smallest model, kept in `build/` for the next run."""
    return make_model(ROOT / "build" / "models" / "tiny")


class Engines:
    """Starts engines, and ends all of them."""

    def __init__(self, model: Path, logs: Path) -> None:
        self._model = model
        self._logs = logs
        self._started: list[Engine] = []

    def start(self, name: str, **options: Any) -> Engine:
        """Start an engine and do not wait for it; options as in `EngineOptions`."""
        log = self._logs / f"{name}.log"
        return self.start_with(EngineOptions(**{"model": self._model, "log": log} | options))

    def start_node(self, name: str, url: str, **options: Any) -> Engine:
        """Start an engine with the connector; options as in `node_options`."""
        logs = itertools.count(1)
        log = next(p for n in logs if not (p := self._logs / f"{name}-{n}.log").exists())
        return self.start_with(node_options(self._model, log, url, name, **options))

    def start_with(self, options: EngineOptions) -> Engine:
        """Start an engine and do not wait for it."""
        engine = Engine(options)
        self._started.append(engine)
        return engine

    def end(self) -> None:
        """Kill -9 whatever is left."""
        for engine in self._started:
            engine.kill()


@pytest.fixture
def engines(model: Path, tmp_path: Path) -> Iterator[Engines]:
    """Engines for one test. Start all of them first, then wait: they start side by side."""
    fleet = Engines(model, tmp_path)
    yield fleet
    fleet.end()


@pytest.fixture(scope="module")
def lasting_engines(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Engines for all tests of a file: what they do to an engine must not spoil it."""
    fleet = Engines(model, tmp_path_factory.mktemp("engines"))
    yield fleet
    fleet.end()


@pytest.fixture(scope="session")
def shared_engines(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Engines for all tests of this folder."""
    fleet = Engines(model, tmp_path_factory.mktemp("shared"))
    yield fleet
    fleet.end()


class Reference:
    """Answers as they are without any cache."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._known: dict[tuple[int, ...], Answer] = {}
        self._salts = itertools.count()

    def answer(self, prompt: list[int], max_tokens: int = 8) -> Answer:
        """What the prompt's answer has to be: computed whole, under a salt of its own."""
        key = (max_tokens, *prompt)
        if key not in self._known:
            self.engine.wait_ready()
            salt = f"reference {next(self._salts)}"
            answer = self.engine.ask(prompt, max_tokens, salt, ANSWER_SECONDS)
            assert answer.cached_tokens == 0
            self._known[key] = answer
        return self._known[key]


@pytest.fixture(scope="session")
def reference(shared_engines: Engines) -> Reference:
    """The engine without the connector. It may start while others do: asking it waits."""
    return Reference(shared_engines.start("reference", device_blocks=64))


class Site:
    """NATS, a registry, and a witness."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.witness = Witness(cluster.url, MEMBERSHIP_SECONDS)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The cluster that all nodes belong to; whoever breaks it mends it."""
    settings = {"KVBM_MEMBERSHIP_SECONDS": str(MEMBERSHIP_SECONDS)}
    with Cluster(tmp_path_factory.mktemp("cluster"), settings) as cluster:
        site = Site(cluster)
        yield site
        site.witness.close()


@pytest.fixture(scope="session")
def lasting_pair(site: Site, shared_engines: Engines) -> tuple[Node, Node]:
    """Two nodes, for all tests of this folder."""
    started = [
        shared_engines.start_node(name, site.cluster.url, cores=cores)
        for name, cores in zip(("node-A", "node-B"), share_cores(engines=2), strict=True)
    ]
    a, b = (Node(engine.wait_ready(), site.witness).wait_joined() for engine in started)
    return a, b


@pytest.fixture
def pair(lasting_pair: tuple[Node, Node]) -> Iterator[tuple[Node, Node]]:
    """Two nodes that hold no block. Afterwards both must live, and let go of everything."""
    for node in lasting_pair:
        node.forget()
    yield lasting_pair
    for node in lasting_pair:
        node.check_at_rest()


class Options:
    """Three engines in three directories; whoever kills one starts the next."""

    def __init__(self, model: Path, folder: Path, memory: Path, url: str) -> None:
        self._folder = folder
        cores = iter(share_cores(engines=3))

        def option(name: str, **chosen: str) -> Option:
            directories = {
                "KVBM_HOST_CACHE_DIR": str(memory),
                "DYN_KVBM_DISK_CACHE_DIR": str(folder / name),
            }
            return Option(name, model, folder, url, next(cores), **directories, **chosen)

        self.cpu = option("cpu", **{HOST: gigabytes(96)})
        self.both = option("both", **{HOST: gigabytes(24), DISK: gigabytes(160)})
        self.disk = option("disk", **{DISK: gigabytes(160)})

    def disk_folder(self, option: Option) -> Path:
        """Where an option's disk tier is."""
        return self._folder / option.name

    def __iter__(self) -> Iterator[Option]:
        return iter((self.cpu, self.both, self.disk))


@pytest.fixture(scope="session")
def all_options(
    model: Path, site: Site, reference: Reference, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Options]:
    """The three, for all tests of this folder. They start beside each other."""
    folder = tmp_path_factory.mktemp("options")
    with tempfile.TemporaryDirectory(prefix="kvbm-tests-", dir="/dev/shm") as memory:
        options = Options(model, folder, Path(memory), site.cluster.url)
        yield options
        for option in options:
            option.kill()


@pytest.fixture
def options(all_options: Options) -> Options:
    """The three, running."""
    for option in all_options:
        option.start()
    return all_options
