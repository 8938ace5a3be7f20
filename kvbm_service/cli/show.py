"""`kvbm demo`: see it work."""

from __future__ import annotations

import typer


def demo() -> None:
    """Let one vLLM engine reuse what another has computed, and show it.

    Needs vLLM. The last line of the output is JSON; exit status 0 only if the tokens are identical.
    """
    from kvbm_service.demo.show import main

    raise typer.Exit(main())
