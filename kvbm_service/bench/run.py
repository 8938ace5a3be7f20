"""Runs benchmarks, shows one table, writes one file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
from rich.console import Console
from rich.status import Status
from rich.table import Table

from kvbm_service.bench.row import Row

RESULT = Path("build/bench.json")


def run(groups: Iterable[str], result: Path = RESULT, console: Console | None = None) -> list[Row]:
    """Measure `groups`, print a table, write `result` (a list of rows, as JSON)."""
    console = console or Console()
    found: list[Row] = []
    for group in groups:
        with console.status(f"measuring: {group}") as status:

            def say(what: str, group: str = group, status: Status = status) -> None:
                status.update(f"measuring: {group}: {what}")

            found += _measure(group, say)
    console.print(table(found))
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    console.print(f"written to {result}")
    return found


def _measure(group: str, say: Callable[[str], None]) -> list[Row]:
    match group:
        case "transfers":
            from kvbm_service.bench import transfers

            return transfers.rows()
        case "remote":
            from kvbm_service.bench import remote

            return remote.rows()
        case "disk":
            from kvbm_service.bench import disk

            return disk.rows()
        case "leader":
            from kvbm_service.bench import leader

            return leader.rows()
        case "registry":
            from kvbm_service.bench import registry

            return registry.rows()
        case "replay":
            from kvbm_service.bench import replay

            return replay.rows()
        case "engines":
            from kvbm_service.bench import engines

            return engines.rows(say)
    raise ValueError(f"no group {group!r}")


def table(found: list[Row]) -> Table:
    """The rows, for people."""
    shown = Table("what", "value", "unit", "yardstick", "its value", "ratio")
    for row in found:
        shown.add_row(
            row.name, _short(row.value), row.unit, row.yardstick, _short(row.yardstick_value),
            f"{row.ratio:.2f}",
        )  # fmt: skip
    return shown


def _short(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"
