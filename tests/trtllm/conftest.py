"""Engines for the tests of the TensorRT-LLM connector, under both forms of its interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbm_service.adapters.nats_server import EmbeddedNats
from tests.connectors.cluster import LiveRegistry
from tests.trtllm import forms
from tests.trtllm.engine import Engine
from tests.trtllm.forms import Form

ALONE = {
    "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "64",
    "KVBM_HOST_CACHE_DIR": "none",
    "KVBM_LOOKUP_DEADLINE_MS": "0",
    "KVBM_NATS_URL": "nats://127.0.0.1:1",
}


@pytest.fixture(scope="session")
def loaded() -> dict[str, Form]:
    return {name: forms.load(name) for name in forms.INTERFACES}


@pytest.fixture(params=sorted(forms.INTERFACES))
def form(request: pytest.FixtureRequest, loaded: dict[str, Form]) -> Form:
    return loaded[request.param]


@pytest.fixture
def make_engine(form: Form) -> Iterator[Callable[..., Engine]]:
    """Makes engines that are checked for leaks when the test has passed."""
    engines: list[Engine] = []

    def make(environment: dict[str, str] | None = None, **shape: Any) -> Engine:
        engines.append(Engine(form, ALONE | (environment or {}), **shape))
        return engines[-1]

    yield make
    for engine in reversed(engines):
        engine.close()


@pytest.fixture
def make_broken(form: Form) -> Iterator[Callable[..., Engine]]:
    """Makes engines that the test breaks for good."""
    engines: list[Engine] = []

    def make(environment: dict[str, str] | None = None, **shape: Any) -> Engine:
        engines.append(Engine(form, ALONE | (environment or {}), **shape))
        return engines[-1]

    yield make
    for engine in engines:
        engine.kill()


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[EmbeddedNats]:
    with EmbeddedNats(store_dir=tmp_path / "nats") as server:
        yield server


@pytest.fixture
def registry(nats: EmbeddedNats) -> Iterator[LiveRegistry]:
    with LiveRegistry(nats.url) as registry:
        yield registry
