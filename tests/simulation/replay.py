"""Run one seed again: python -m tests.simulation.replay SEED"""

from __future__ import annotations

import sys

from tests.simulation.world import World


def main() -> None:
    """Show the world of this seed, run it, and let its failure speak."""
    world = World(int(sys.argv[1]))
    print(world.weather)
    world.run()
    sent = sorted(world.network.sent.items())
    print("all is well;", ", ".join(f"{count} {kind}" for kind, count in sent))


if __name__ == "__main__":
    main()
