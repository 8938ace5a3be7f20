"""Runs all tests in lanes: pytests that need nothing of each other, a few of them at a time.

    python deploy/dev/lanes.py --older 0.29.0 0.31.0

What a lane prints is shown whole when it has ended; until then a line now and then says how far
each one is. The last lines sum up all lanes, in pytest's words. Uses the standard library only.

Tests start real servers and engines, and lanes take each other's processors. So a few that failed
beside others are asked once more, with the machine to themselves: who fails then has failed, and
who passes is named as unsteady. Many failures are no accident, and are not asked again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
LOGS = Path("build", "tests")
WIDTH = 100
PROGRESS_SECONDS = 10.0

APART = ("tests/contracts", "tests/faults", "tests/connectors", "tests/security")
"""Folders whose tests take minutes without engines: a lane each. All others share one, so that a
new folder cannot be forgotten."""
OLDER_FOLDER = "tests/connectors"
"""What has to work with older releases of vLLM, too."""
WITHOUT_ENGINES = "not engine and not gpu"
NOT_AGAIN = f"{WITHOUT_ENGINES} and not once"
"""What is run on every release."""

MAX_ASKED_AGAIN = 12
"""More failures than this, in all lanes together, are what they are."""

PERCENT = re.compile(r"\[ *(\d+)%\]$", re.MULTILINE)
CLOSING = re.compile(r"^=+ (?:.*\d+ \w+.*) in \d+\.\d+s.*=+$", re.MULTILINE)
COUNT = re.compile(r"(\d+) ([a-z]+)")
BAD = re.compile(r"^(?:FAILED|ERROR) tests/.*$", re.MULTILINE)
COUNTED = ("failed", "passed", "skipped", "xfailed", "error")
"""In the order in which they are told."""


@dataclass
class Lane:
    """Some of the tests, what came of them, and how long that took."""

    name: str
    arguments: tuple[str, ...]
    release: str = ""
    """An older vLLM to run them on, which is set up first."""
    started: float = 0.0
    seconds: float = 0.0
    status: int | None = None
    """0: all is well. None: it has not ended."""
    output: str = ""
    unsteady: int = 0
    """Tests that failed beside others and passed by themselves."""
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _stopped: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return ROOT / LOGS / f"{self.name.replace(' ', '-')}.log"

    def run(self) -> None:
        """Run it to its end."""
        self.started = time.monotonic()
        self._run()
        self.seconds = time.monotonic() - self.started

    def ask_again(self) -> None:
        """Run once more what has failed; in the end only that counts."""
        failed, first = self.bad, self.output
        self._run("--last-failed", "--last-failed-no-failures=none")
        self.unsteady = failed - self.bad if self.status in (0, 1) else 0
        again = " what failed, asked again ".center(WIDTH, "-")
        self.output = f"{first.rstrip()}\n{again}\n{self.output}"

    @property
    def bad(self) -> int:
        """How many tests have failed."""
        return self.counts["failed"] + self.counts["error"]

    def _run(self, *more: str) -> None:
        environment = dict(os.environ)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)  # another `make test` may be writing to it
        with self.log.open("w+b") as log:
            status = 0
            if self.release:
                status = self._call(log.fileno(), environment, *set_up(self.release))
                overlay = ROOT / ".venvs" / f"vllm-{self.release}"
                others = filter(None, [environment.get("PYTHONPATH")])
                environment["PYTHONPATH"] = os.pathsep.join([str(overlay), *others])
            if status == 0:
                remembered = f"cache_dir={self.log.with_suffix('.cache')}"
                command = (sys.executable, "-m", "pytest", "-o", remembered, *self.arguments, *more)
                status = self._call(log.fileno(), environment, *command)
            log.seek(0)
            self.output = log.read().decode(errors="replace")
        self.status = status

    def _call(self, log: int, environment: dict[str, str], *command: str) -> int:
        with self._lock:
            if self._stopped:
                return 1
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C is ours to pass on, once
            )
        return self._process.wait()

    def stop(self) -> None:
        """Interrupt it: pytest then ends what its tests have started."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGINT)

    @property
    def progress(self) -> str:
        """How far it is."""
        if not self.started:
            return f"{self.name} waits"
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        percent = PERCENT.findall(text)
        return f"{self.name} {percent[-1] if percent else 0} %"

    @property
    def counts(self) -> Counter[str]:
        """How many tests passed, failed and so on; empty if pytest never got that far.

        Of those that were asked again, what came of it then.
        """
        closing = CLOSING.findall(self.output)
        found: Counter[str] = Counter()
        for at, line in enumerate(closing):
            if at:
                found["failed"] = found["error"] = 0
            for number, what in COUNT.findall(line.partition(" in ")[0]):
                found[what.removesuffix("s") if what == "errors" else what] += int(number)
        return +found


def set_up(release: str) -> tuple[str, ...]:
    """The command that sets up an older vLLM."""
    return (sys.executable, str(ROOT / "deploy" / "dev" / "environment.py"), "--older", release)


def all_lanes(older: Sequence[str]) -> list[Lane]:
    """Every test once, and most of the connector's once more for each older release."""
    rest = tuple(f"--ignore={folder}" for folder in APART)
    return [
        Lane("engines", ("-m", "engine and not gpu")),
        Lane("everything else", ("-m", WITHOUT_ENGINES, *rest)),
        *(Lane(Path(folder).name, ("-m", WITHOUT_ENGINES, folder)) for folder in APART),
        *(vllm_lane(release, overlay=release, marked=NOT_AGAIN) for release in older),
    ]


def vllm_lane(release: str, overlay: str, marked: str = WITHOUT_ENGINES) -> Lane:
    """The connector's tests on this vLLM, which lies in that overlay; "": in `.venv` itself."""
    return Lane(f"vLLM {release}", ("-m", marked, OLDER_FOLDER), overlay)


def run_all(lanes: Sequence[Lane], at_once: int) -> int:
    """Run them, tell how far they are and what came of it. Returns 0 if all is well."""
    began = time.monotonic()
    print(f"tests in {len(lanes)} lanes, {at_once} at a time", flush=True)
    with ThreadPoolExecutor(at_once) as threads:
        running = {threads.submit(lane.run): lane for lane in lanes}
        left = set(running)
        while left:
            done, left = wait(left, PROGRESS_SECONDS, FIRST_COMPLETED)
            for future in done:
                future.result()
                show(running[future])
            if left:
                told = ", ".join(lane.progress for lane in lanes if lane.status is None)
                print(f"  {time.monotonic() - began:4.0f} s: {told}", flush=True)
    ask_again(lanes)
    sum_up(lanes, time.monotonic() - began)
    return 0 if all(lane.status == 0 for lane in lanes) else 1


def ask_again(lanes: Sequence[Lane]) -> None:
    """Give what failed in the crowd another chance, one lane after the other."""
    failed = [lane for lane in lanes if lane.status]
    told = all(lane.status == 1 and lane.bad for lane in failed)
    if not told or sum(lane.bad for lane in failed) > MAX_ASKED_AGAIN:
        return
    for lane in failed:
        print(f"  {lane.name}: {lane.bad} failed beside others, and are asked again", flush=True)
        lane.ask_again()
        print(lane.output.rpartition(" what failed, asked again ")[2].rstrip(), flush=True)


def show(lane: Lane) -> None:
    """Print everything that a lane that has ended had to say."""
    how = "passed" if lane.status == 0 else "FAILED"
    print(f" lane {lane.name}: {how} after {lane.seconds:.0f} s ".center(WIDTH, "#"))
    print(lane.output.rstrip(), flush=True)


def sum_up(lanes: Sequence[Lane], seconds: float) -> None:
    """Print a line for each lane, every failure once more, and pytest's closing line for all."""
    print(" lanes ".center(WIDTH, "#"))
    total: Counter[str] = Counter()
    for lane in lanes:
        total += lane.counts
        how = words(lane.counts) + ("" if lane.status == 0 else f" (exit status {lane.status})")
        how += f"; UNSTEADY: {lane.unsteady}" if lane.unsteady else ""
        print(f"  {lane.name:<20} {lane.seconds:5.0f} s  {how}")
    for lane in lanes:
        for line in BAD.findall(lane.output):
            print(f"{line}  [{lane.name}]")
        if lane.unsteady and lane.status == 0:
            print(f"  … all of {lane.name} passed when they were asked again, by themselves")
    print(f" {words(total)} in {seconds:.2f}s ".center(WIDTH, "="), flush=True)


def words(counts: Counter[str]) -> str:
    """As pytest says it."""
    told = [f"{counts[what]} {what}" for what in COUNTED if counts[what]]
    return ", ".join(told) or "no tests counted"


def fitting() -> int:
    """How many lanes run well side by side on this machine."""
    cores = len(os.sched_getaffinity(0))
    return 3 if cores >= 8 else 2


def end_with_us(lanes: Sequence[Lane]) -> None:
    """Let Ctrl-C and SIGTERM end all lanes; what they have found until then is told."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        for lane in lanes:
            lane.stop()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--older", metavar="RELEASE", nargs="*", default=[])
    parser.add_argument("--only-older", action="store_true", help="leave the present release out")
    parser.add_argument("--at-once", type=int, default=fitting(), help="lanes side by side")
    arguments = parser.parse_args()
    lanes = [
        lane for lane in all_lanes(arguments.older) if lane.release or not arguments.only_older
    ]
    end_with_us(lanes)
    return run_all(lanes, arguments.at_once)


if __name__ == "__main__":
    sys.exit(main())
