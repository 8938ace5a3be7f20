"""Engines for the connector's tests."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's imports have some, and we did not write them
    import vllm
    from vllm.config import ModelConfig

    from kvbm_service.adapters.nats_server import EmbeddedNats
    from tests.connectors.cluster import LiveRegistry
    from tests.connectors.engine import Engine, Shape
    from tests.connectors.releases import agree_on_names
    from tests.connectors.stand_in import make_model

agree_on_names()

PATIENT = {"KVBM_LOOKUP_DEADLINE_MS": 5_000}
"""Slow machines may take their time; an answer ends the waiting."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A model of which only the configuration exists."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[EmbeddedNats]:
    with EmbeddedNats(store_dir=tmp_path / "nats") as server:
        yield server


@pytest.fixture
def make_engine(
    model: ModelConfig, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Engine]]:
    """Makes engines that are checked for leaks when the test has passed."""
    engines: list[Engine] = []

    def make(**shape: Any) -> Engine:
        engines.append(Engine(model, Shape(**shape)))
        return engines[-1]

    yield make
    for engine in reversed(engines):
        engine.close()


@pytest.fixture
def registry(nats: EmbeddedNats) -> Iterator[LiveRegistry]:
    with LiveRegistry(nats.url) as registry:
        yield registry


@pytest.fixture
def make_node(
    make_engine: Callable[..., Engine], nats: EmbeddedNats, registry: LiveRegistry
) -> Callable[..., Engine]:
    """Makes engines of one cluster."""

    def make(name: str, **shape: Any) -> Engine:
        extra = PATIENT | shape.pop("extra", {})
        return make_engine(node=name, nats=nats.url, extra=extra, **shape)

    return make


@pytest.fixture
def hear_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `caplog` have our log, which otherwise goes where vLLM's goes."""
    theirs = logging.getLogger("vllm")
    monkeypatch.setattr(theirs, "handlers", [])
    monkeypatch.setattr(theirs, "propagate", True)


def pytest_report_header() -> str:
    """Which release is tested."""
    return f"vllm: {vllm.__version__} in {Path(vllm.__file__).parent}"
