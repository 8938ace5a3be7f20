"""The command line: `python -m tests.chaos --seconds 120 --seed 1`."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from pathlib import Path

from rich.console import Console

from kvbm_service.demo.model import make_model
from tests.chaos.arena import Arena
from tests.chaos.fault import FAULTS
from tests.chaos.load import Load
from tests.chaos.report import last_line, passed, show
from tests.chaos.schedule import schedule
from tests.chaos.trial import Result, cards, play

ROOT = Path(__file__).parents[2]
INTERRUPTED = 130
"""Exit status after Ctrl-C."""
EXAMPLES = """\
examples:
  python -m tests.chaos                        two minutes
  python -m tests.chaos --seconds 600 --seed 7
  python -m tests.chaos --only "NATS killed"   no other kind of fault

kinds of faults:
""" + "\n".join(f"  {fault.name}" for fault in FAULTS)


def arguments() -> argparse.Namespace:
    """What the user wants."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Faults at random, in real vLLM engines under load. Ends with 1 if any answer "
        "is wrong or late, anything leaks, or the cluster does not heal in time. "
        "The same seed gives the same schedule.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=120, help="begin no round after that")
    parser.add_argument("--seed", type=int, default=1, help="of the schedule and of the load")
    parser.add_argument(
        "--directory", choices=("nats", "etcd"), default="nats", help="where the nodes meet"
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="KIND",
        choices=[fault.name for fault in FAULTS],
        help="no other kind of fault",
    )
    parser.add_argument(
        "--logs", type=Path, default=ROOT / "build" / "chaos" / "logs", help="replaced at start"
    )
    return parser.parse_args()


def main() -> int:
    """Run until the time is over."""
    chosen = arguments()
    console = Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    shutil.rmtree(chosen.logs, ignore_errors=True)
    model = make_model(ROOT / "build" / "models" / "tiny")
    on_etcd = chosen.directory == "etcd"
    result, ended_early = Result(), False
    try:
        with Arena(model, chosen.logs, console.out, on_etcd=on_etcd) as arena:
            kinds = [c for c in cards(arena) if not chosen.only or c.kind in chosen.only]
            for card in kinds:
                if not card.victims:
                    console.out(f"left out, for nobody here can be struck: {card.kind}")
            if not any(card.victims for card in kinds):
                sys.exit("nothing is left to be done")
            with Load(list(arena.members.values()), arena.talks, chosen.seed) as load:
                rounds = schedule(chosen.seed, kinds)
                for outcome in play(arena, load, rounds, chosen.seconds, console.out):
                    result.add(outcome)
    except KeyboardInterrupt:
        ended_early = True
        console.out("ended early")
    show(result, console)
    print(last_line(result))
    if ended_early:
        return INTERRUPTED
    return 0 if passed(result) else 1


if __name__ == "__main__":
    sys.exit(main())
