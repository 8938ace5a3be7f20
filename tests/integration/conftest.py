"""Real vLLM engines for tests: started with the smallest model, killed when the test ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbm_service.demo.engine import Engine, EngineOptions
from kvbm_service.demo.model import make_model

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
        engine = Engine(EngineOptions(**{"model": self._model, "log": log} | options))
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
