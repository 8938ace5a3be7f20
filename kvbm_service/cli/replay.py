"""`kvbm replay`: how well blocks are chosen, on recorded requests."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbm_service.cli.options import Json
from kvbm_service.errors import SettingError

if TYPE_CHECKING:
    from kvbm_service.replay.policies import Outcome, TierOutcome
    from kvbm_service.replay.trace import Trace


def replay(
    trace: Annotated[
        Path, typer.Option(metavar="FILE", help="Requests, as jsonl in Mooncake's format.")
    ],
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Of default, lru, arc, s3fifo, clairvoyant. Default: all.",
            show_default=False,
        ),
    ] = None,
    capacity: Annotated[
        str, typer.Option(metavar="PERCENT", help="Host tier, of the unique blocks.")
    ] = "1%,5%,10%,25%",
    disk: Annotated[
        float | None,
        typer.Option(
            metavar="TIMES",
            help="Also replay with a disk tier so many times the host tier.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw hit ratio over capacity (.png).", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Replay recorded requests through the core, and compare its choice with others'.

    Prefix-hit ratio: of all blocks asked for, those in the longest stored head of their request.
    """
    from kvbm_service.replay import report
    from kvbm_service.replay.trace import Trace

    policies = _policies(policy)
    shares = [_share(text) for text in capacity.split(",")]
    if disk is not None and not 0 < disk <= 1000:
        raise SettingError("--disk", disk, "how many times the host tier, like 4")
    if plot is not None:
        report.check_plot()
    read = Trace.read(trace)
    outcomes, tiers = _replay(read, policies, shares, disk)
    if plot is not None:
        report.plot(outcomes, plot)
    if as_json:
        rows = [
            {
                "trace": one.trace,
                "policy": one.policy,
                "capacity": one.capacity,
                "prefix_hit_ratio": one.prefix_hit_ratio,
            }
            for one in outcomes
        ]
        typer.echo(json.dumps(rows, indent=2))
    else:
        _show(read, outcomes, tiers, shares)


def _policies(given: str | None) -> list[str]:
    from kvbm_service.replay.policies import POLICIES
    from kvbm_service.replay.yardsticks import NAMES, available

    if given is None:
        if available():
            return list(POLICIES)
        typer.echo("Without lru, arc and s3fifo: pip install libcachesim", err=True)
        return [name for name in POLICIES if name not in NAMES]
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in POLICIES:
            raise SettingError("--policy", name, ", ".join(POLICIES))
    return list(dict.fromkeys(names))


def _share(text: str) -> float:
    allowed = "percentages above 0 and up to 100, like 1%,5%,10%,25%"
    try:
        share = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        raise SettingError("--capacity", text, allowed) from None
    if not 0 < share <= 1:
        raise SettingError("--capacity", text, allowed)
    return share


def _replay(
    trace: Trace, policies: Sequence[str], shares: Sequence[float], disk: float | None
) -> tuple[list[Outcome], list[TierOutcome]]:
    from rich.console import Console
    from rich.progress import Progress

    from kvbm_service.replay.policies import replay as replay_one
    from kvbm_service.replay.policies import replay_tiers
    from kvbm_service.replay.report import percent

    outcomes: list[Outcome] = []
    tiers: list[TierOutcome] = []
    quiet = not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress:
        rounds = len(shares) * (len(policies) + (disk is not None))
        task = progress.add_task(trace.name, total=len(trace.requests) * rounds)

        def advance(requests: int) -> None:
            progress.advance(task, requests)

        for share in shares:
            for policy in policies:
                progress.update(task, description=f"{trace.name}, {percent(share)}: {policy}")
                outcomes.append(replay_one(trace, policy, share, advance))
            if disk is not None:
                progress.update(task, description=f"{trace.name}, {percent(share)}: with disk")
                tiers.append(replay_tiers(trace, share, disk, advance))
    return outcomes, tiers


def _show(
    trace: Trace, outcomes: list[Outcome], tiers: list[TierOutcome], shares: Sequence[float]
) -> None:
    from rich.console import Console

    from kvbm_service.replay import report
    from kvbm_service.replay.policies import cost

    console = Console()
    console.print(report.table(outcomes))
    if len({"lru", "clairvoyant"} & {one.policy for one in outcomes}) == 2:
        typer.echo("In brackets: how much of the gap between LRU and the bound is closed.")
    if tiers:
        console.print(report.tiers_table(tiers))
    if any(one.policy == "default" for one in outcomes):
        share = shares[len(shares) // 2]
        spent = cost(trace, share)
        typer.echo(
            f"default, at {report.percent(share)}: {spent.microseconds_per_block:.2f} µs of CPU"
            f" per block of a request, {spent.bytes_per_slot:.0f} bytes per slot"
        )
    typer.echo(
        f"{len(trace.requests)} requests, {trace.blocks} blocks, {trace.unique_blocks} unique."
    )
