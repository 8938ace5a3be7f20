"""Hosts that are cut off from each other: network namespaces, and a network between them.

    with World("nats", "a", "b") as world:
        server = world["nats"].start([binary, "-a", world["nats"].address, ...], log)
        witness = world["a"].run(Witness, url, lease_seconds)   # its sockets are host a's
        world.cut("a", "b")                                     # both ways
        world.cut_one_way("a", "nats")                          # what a says is lost
        world.isolate("b")
        world.set_line("a", "nats", Line(delay_seconds=0.1, loss=0.05))
        world.heal()

Whatever runs on a host is a real process with real sockets; every packet between two hosts goes
through one small program (switch.py) that drops, delays or passes it. Nothing has a name outside
this process, so worlds can exist beside each other, and nothing of one stays behind, however the
process that made it ends.

It takes root: `World` raises `NotPermitted`, which says what is missing; tests skip then.
"""

from tests.world.hosts import Host, NotPermitted, World
from tests.world.line import Line

__all__ = ["Host", "Line", "NotPermitted", "World"]
