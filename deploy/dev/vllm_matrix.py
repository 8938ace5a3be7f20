"""Runs the connector's tests on many releases of vLLM, and tells what came of each in a table.

    python -m deploy.dev.vllm_matrix 0.26.0 0.27.1 0.32.0

Each release has an environment of its own, made the first time. The table is printed, and
written as Markdown to `build/vllm-matrix.md`; the README has a copy. Exits with 0 only if
every release has passed. Uses the standard library only.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from typing import NamedTuple

from deploy.dev.environment import VLLM
from deploy.dev.lanes import ROOT, Lane, end_with_us, fitting, run_all, vllm_lane

MARKDOWN = "build/vllm-matrix.md"
RAN_ON = re.compile(r"^vllm: (\d[\d.]*\d)", re.MULTILINE)
"""What the connector's tests say at their beginning."""
SKIPPED = re.compile(r"^SKIPPED \[(\d+)\] \S+: (.+)$", re.MULTILINE)
COLUMNS = ("vLLM", "passed", "failed", "skipped", "skipped because")


class Result(NamedTuple):
    """What came of one release."""

    release: str
    passed: int
    failed: int
    """Errors included."""
    skipped: Counter[str]
    """How many tests for which reason."""
    trouble: str
    """Why nothing of this can be believed, if so."""

    @property
    def cells(self) -> tuple[str, ...]:
        """In the order of `COLUMNS`."""
        reasons = (f"{reason} ({count})" for reason, count in sorted(self.skipped.items()))
        return (
            self.release,
            str(self.passed),
            self.trouble or str(self.failed),
            str(self.skipped.total()),
            "; ".join(reasons),
        )

    @property
    def good(self) -> bool:
        """Whether all is well."""
        return not self.failed and not self.trouble


def result(release: str, lane: Lane) -> Result:
    """What a lane that has ended says of its release."""
    counts = lane.counts
    skipped: Counter[str] = Counter()
    for number, reason in SKIPPED.findall(lane.output):
        skipped[reason] += int(number)
    failed = counts["failed"] + counts["error"]
    trouble = ""
    ran_on = RAN_ON.search(lane.output)
    if lane.status and not failed:
        trouble = "did not run to the end"
    elif ran_on is None or ran_on[1] != release:
        trouble = f"ran on {ran_on[1] if ran_on else 'nobody knows which'}"
    return Result(release, counts["passed"], failed, skipped, trouble)


def text(results: Sequence[Result]) -> str:
    """The table for a terminal."""
    rows = [COLUMNS, *(each.cells for each in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def markdown(results: Sequence[Result], seen: str) -> str:
    """The table for the README, and when it was true."""
    rows = [COLUMNS, ("---", "--:", "--:", "--:", "---"), *(each.cells for each in results)]
    lines = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([*lines, "", seen]) + "\n"


def circumstances() -> str:
    """Of today's results, as a sentence."""
    python = ".".join(map(str, sys.version_info[:2]))
    torch = version("torch").partition("+")[0]
    return f"Seen on {date.today().isoformat()} with Python {python} and torch {torch} on a CPU."


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("releases", metavar="RELEASE", nargs="+")
    parser.add_argument("--at-once", type=int, default=fitting(), help="releases side by side")
    arguments = parser.parse_args()
    lanes = {
        release: vllm_lane(release, overlay="" if release == VLLM else release)
        for release in arguments.releases
    }
    end_with_us(list(lanes.values()))
    run_all(list(lanes.values()), arguments.at_once)
    results = [result(release, lane) for release, lane in lanes.items()]
    seen = circumstances()
    file = ROOT / MARKDOWN
    file.parent.mkdir(exist_ok=True)
    file.write_text(markdown(results, seen))
    print(f"\n{text(results)}\n\n{seen} As Markdown: {MARKDOWN}", flush=True)
    return 0 if all(each.good for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
