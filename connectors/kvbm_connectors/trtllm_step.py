"""What goes between TensorRT-LLM's ranks: down with a step's metadata, and up at its end."""

from __future__ import annotations

from dataclasses import dataclass

from kvbm_schemas.records import RankRecord
from kvbm_schemas.step import StepCommands, StepResults, Survivors


@dataclass(frozen=True)
class Commands:
    """Leader → every worker, each step."""

    commands: StepCommands
    nothing_to_load: tuple[int, ...] = ()
    """Requests that wait for a load of which TensorRT-LLM, having asked, wanted nothing."""
    saves_first: bool = False
    """The step writes to blocks that are being saved: nothing may begin before that is done."""


@dataclass(frozen=True)
class Report:
    """Every rank → every rank, each step."""

    results: tuple[StepResults, ...] = ()
    unserved: tuple[str, ...] = ()
    """Loads that were promised, and can never be."""
    last: bool = False
    """Of rank 0: no request is left, so the engine may not step again for long."""


@dataclass(frozen=True)
class Ready:
    """Every rank → every rank, once: the tiers beside its KV pool are there, or (error) not."""

    record: RankRecord | None = None
    survivors: tuple[Survivors, ...] = ()
    error: str = ""
