"""Runs the table's rows, one after the other, and prints the table.

`python -m tests.models hybrid mla` runs some of them; without names it is all of it, some ten
minutes on a quiet machine.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.models.outcome import faults
from tests.models.rows import ROWS
from tests.models.run import RowFailed, run


def line(name: str) -> tuple[str, bool]:
    """The row of this name, run, as a line of the table; and whether it holds."""
    row = ROWS[name]
    try:
        outcome = run(name)
    except RowFailed as failure:
        return f"| {name} | {row.what} | **{failure}** | | | |", False
    found = faults(row, outcome)
    said = f"**{'; '.join(found)}**" if found else "same answers"
    blocks = f"{outcome.our_blocks} of {outcome.expected_blocks}"
    computed = f"{outcome.ours_as_computed} of {outcome.prompts}"
    own = f"{outcome.own_as_computed} of {outcome.prompts}"
    return f"| {name} | {row.what} | {said} | {blocks} | {computed} | {own} |", not found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.models", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"some of: {', '.join(ROWS)}")
    names = parser.parse_args().rows or list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"no row {unknown[0]!r}: choose from {', '.join(ROWS)}")
    print("| row | what | result | blocks reused | as computed | vLLM's own reuse as computed |")
    print("|---|---|---|--:|--:|--:|", flush=True)
    good = True
    for name in names:
        began = time.monotonic()
        text, holds = line(name)
        print(text, flush=True)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        good &= holds
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
