"""`kvbm demo` and `kvbm bench`: see it work, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbm_service.bench import GROUPS
from kvbm_service.errors import SettingError


def demo() -> None:
    """Let one vLLM engine reuse what another has computed, and show it.

    Needs vLLM. The last line of the output is JSON; exit status 0 only if the tokens are identical.
    """
    from kvbm_service.demo.show import main

    raise typer.Exit(main())


def bench(
    groups: Annotated[
        list[str] | None,
        typer.Argument(metavar="GROUP", help=f"{', '.join(GROUPS)}. Default: all."),
    ] = None,
    output: Annotated[
        Path, typer.Option(metavar="FILE", dir_okay=False, help="Where the rows go, as JSON.")
    ] = Path("build/bench.json"),
) -> None:
    """Measure speeds, each beside a yardstick from the same run."""
    wanted = groups or list(GROUPS)
    for group in wanted:
        if group not in GROUPS:
            raise SettingError("GROUP", group, ", ".join(GROUPS))
    from kvbm_service.bench.run import run

    run(wanted, output)
