"""Engines for the connector's tests."""

from __future__ import annotations

import json
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
    from tests.connectors.stand_in import ARCHITECTURE, register

MODEL = {
    "architectures": [ARCHITECTURE],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "torch_dtype": "float32",
}

PATIENT = {"KVBM_LOOKUP_DEADLINE_MS": 5_000}
"""Slow machines may take their time; an answer ends the waiting."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A model of which only the configuration exists."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(MODEL))
    register()
    return ModelConfig(
        model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=1024, seed=0
    )


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


def pytest_report_header() -> str:
    """Which release is tested."""
    return f"vllm: {vllm.__version__} in {Path(vllm.__file__).parent}"
