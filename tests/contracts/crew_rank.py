"""One rank of an engine without a model, in a process of its own: the real worker, KV tensors.

It obeys: what to write into device blocks, what to do around a step, and what it has done.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from kvbm_schemas.codec import Decoder, encode
from kvbm_schemas.step import StepCommands
from kvbm_service.host_worker import start_worker
from kvbm_service.network import over_nats
from kvbm_service.settings import Settings
from kvbm_service.worker_service import RankId
from tests.contracts.child import serve
from tests.contracts.lone_leader import SCOPE

DEVICE_BLOCKS = 16
LAYERS = 2
PIECE_BYTES = 4096
_commands = Decoder(StepCommands)


class CrewRank:
    """The worker of one rank."""

    def __init__(
        self, node: str, number: int, world_size: int, instance: str, settings: Any
    ) -> None:
        chosen = Settings(**settings)
        shape = (DEVICE_BLOCKS, PIECE_BYTES)
        self._device = [torch.zeros(shape, dtype=torch.uint8) for _ in range(LAYERS)]
        caches = {f"layer{layer}": tensor for layer, tensor in enumerate(self._device)}
        rank = RankId(SCOPE, node, number, world_size, instance)
        connect = over_nats(chosen, f"{node}.{number}")
        self._worker = start_worker(chosen, rank, caches, DEVICE_BLOCKS, connect)

    def introduce(self) -> dict[str, Any]:
        """Who this is, and what it has found."""
        return {
            "record": encode(self._worker.record).hex(),
            "survivors": [encode(survivors).hex() for survivors in self._worker.survivors],
        }

    def submit(self, commands: str) -> None:
        """Around a step."""
        self._worker.submit(_commands.decode(bytes.fromhex(commands)))

    def collect(self) -> str:
        """What was done since the last time; empty: nothing."""
        results = self._worker.collect()
        return encode(results).hex() if results else ""

    def write(self, block: int, value: int) -> None:
        """Fill a device block."""
        for layer, tensor in enumerate(self._device):
            tensor[block] = (value + layer) % 256

    def read(self, block: int) -> int:
        """What a device block is filled with; below 0: it is not filled with one thing."""
        values = {
            (int(value) - layer) % 256
            for layer, tensor in enumerate(self._device)
            for value in tensor[block].unique()
        }
        return values.pop() if len(values) == 1 else -1


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    serve(CrewRank)
