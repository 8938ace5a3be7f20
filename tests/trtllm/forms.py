"""The two forms of TensorRT-LLM's interface, and the connector as it is imported under each."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

STAND_INS = Path(__file__).parent / "stand_in"
BOUND = ("kvbm_connectors.trtllm", "kvbm_connectors.trtllm_interface")
"""Modules that bind the interface when they are imported."""


class Form(NamedTuple):
    """One form of the interface, and the connector on it."""

    name: str
    interface: ModuleType
    connector: ModuleType

    @property
    def by_group(self) -> bool:
        """Whether blocks are told by groups of layers, and pools described."""
        return self.name == "newest"

    @property
    def bases(self) -> tuple[Any, Any]:
        """The classes that leader and worker have to be."""
        return self.interface.KvCacheConnectorScheduler, self.interface.KvCacheConnectorWorker


INTERFACES = {
    "release_1_2": "tensorrt_llm._torch.pyexecutor.kv_cache_connector",
    "newest": "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector",
}


def _forget() -> None:
    for name in list(sys.modules):
        if name in BOUND or name.split(".")[0] == "tensorrt_llm":
            del sys.modules[name]


def load(name: str) -> Form:
    """Import the connector with this stand-in on the path, and leave no trace of either."""
    _forget()
    sys.path.insert(0, str(STAND_INS / name))
    importlib.invalidate_caches()
    try:
        interface = importlib.import_module(INTERFACES[name])
        connector = importlib.import_module("kvbm_connectors.trtllm")
    finally:
        sys.path.remove(str(STAND_INS / name))
        _forget()
    return Form(name, interface, connector)
