"""What came of it, for people and, on the last line, for programs."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from tests.chaos.judges import DEADLINE_SECONDS, Verdict
from tests.chaos.trial import BY_NAME, Result


def passed(result: Result) -> bool:
    """Whether all is as it must be."""
    return not (result.wrong or result.stalls or result.leaks or result.problems)


def show(result: Result, console: Console) -> None:
    """The tables."""
    faults = Table("fault", "times", "healed within", "at most", title="Faults")
    for kind in BY_NAME:
        if result.faults[kind]:
            faults.add_row(
                kind,
                str(result.faults[kind]),
                f"{result.heal_seconds[kind]:.1f} s",
                f"{BY_NAME[kind].heal_seconds:.0f} s",
            )
    requests = Table("request", "times", title="Requests")
    for verdict in Verdict:
        requests.add_row(verdict.value, str(result.verdicts[verdict]))
    console.print(faults)
    console.print(requests)
    console.print(
        f"slowest answer {result.slowest_seconds:.1f} s of {DEADLINE_SECONDS:g} s allowed; "
        f"leaks: {result.leaks}"
    )
    for problem in result.problems:
        console.print(f"[red]{problem}", highlight=False)


def last_line(result: Result) -> str:
    """One line of JSON."""
    return json.dumps(
        {
            "requests": result.requests,
            "faults": result.faults.total(),
            "wrong": result.wrong,
            "stalls": result.stalls,
            "leaks": result.leaks,
            "heal_seconds_max": round(result.heal_seconds_max, 2),
        }
    )
