"""Every kind of fault: whom it may befall, how it strikes, and how it is healed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from kvbm_schemas.requests import Acquire
from kvbm_service.adapters.etcd_server import EmbeddedEtcd
from kvbm_service.adapters.nats_server import EmbeddedNats
from tests.chaos.arena import Arena
from tests.chaos.member import LEADER, WORKER, Member
from tests.chaos.passage import OPEN, Way

Heal = Callable[[], object]
Strike = Callable[[Arena, str], Heal]

READ_SECONDS = 5.0
"""How long to wait for someone to read from the node that is to die meanwhile."""
HOUR_SECONDS = 3600
SLOW_SECONDS = 0.05
FULL_BYTES = 256 << 10
"""Of any file: what a node says goes into one, too, and is heard as long as it is shorter."""
GIVEN_UP = "the disk tier is given up"
HEAL_SECONDS = 60.0
"""A few seconds on a quiet machine: a lease on a membership, a retry, a snapshot."""


class Fault(NamedTuple):
    """A kind of fault."""

    name: str
    victims: Callable[[Arena], list[str]]
    shortest_seconds: float
    longest_seconds: float
    strike: Strike
    """Called with the arena and the victim; what it returns heals."""
    heal_seconds: float
    """How soon after healing everyone agrees again. An engine's start is not counted."""
    says: str = ""
    """What a node that is struck must say, lest it was not struck at all."""
    restarts: bool = False
    """Whether an engine has to be started to heal it, which takes long."""


# -- whom ------------------------------------------------------------------------------------


def nodes(arena: Arena) -> list[str]:
    """All of them."""
    return list(arena.members)


def sharers(arena: Arena) -> list[str]:
    """Nodes from which others can read."""
    scopes = list(arena.scopes.values())
    return [name for name, scope in arena.scopes.items() if scopes.count(scope) > 1]


def with_disk(arena: Arena) -> list[str]:
    """Nodes with a disk tier."""
    return [name for name, member in arena.members.items() if member.has_disk]


def ranks(arena: Arena) -> list[str]:
    """All ranks of all nodes, as in `wim/1`."""
    return [
        f"{name}/{rank}" for name, member in arena.members.items() for rank in range(member.ranks)
    ]


def registries(arena: Arena) -> list[str]:
    """All of them."""
    return list(arena.registries)


def server(name: str, arena: Arena) -> list[str]:
    """This one, if it is there."""
    return [name] if name in arena.servers else []


def clocks(arena: Arena) -> list[str]:
    """Those whose wall clock can be shifted; nobody's where there is no C compiler."""
    return [name for name, clock in arena.clocks.items() if clock.works]


# -- how -------------------------------------------------------------------------------------


def kill_engine(arena: Arena, victim: str) -> Heal:
    """All its processes at once."""
    member = arena.members[victim]
    member.kill()
    return member.restart


def kill_rank(arena: Arena, victim: str) -> Heal:
    """One worker's process; vLLM then gives up the engine, and an operator starts another."""
    member, process = _rank(arena, victim)
    member.strike(process)
    return member.restart


def kill_while_read(arena: Arena, victim: str) -> Heal:
    """As soon as somebody has asked for a lease, its workers die, and then the rest."""
    member = arena.members[victim]
    workers = member.processes(WORKER)
    report = arena.witness.listen()

    def wait_and_kill() -> None:
        with contextlib.suppress(AssertionError):  # nobody reads; it dies nevertheless
            arena.witness.wait("a lease", lambda: report.of(Acquire, victim), READ_SECONDS)
        for process in workers:
            member.strike(process)
        member.kill()

    thread = threading.Thread(target=wait_and_kill)
    thread.start()

    def heal() -> None:
        thread.join()
        member.restart()

    return heal


def stop_leader(arena: Arena, victim: str) -> Heal:
    """The process of scheduler and leader."""
    member = arena.members[victim]
    (process,) = member.processes(LEADER)
    return member.stop(process)


def stop_rank(arena: Arena, victim: str) -> Heal:
    """One worker's process."""
    member, process = _rank(arena, victim)
    return member.stop(process)


def kill_registry(arena: Arena, victim: str) -> Heal:
    """Another one takes its place."""
    arena.registries[victim].kill()
    return arena.registries[victim].start


def stop_registry(arena: Arena, victim: str) -> Heal:
    """It still gets its share of questions."""
    arena.registries[victim].stop()
    return arena.registries[victim].go_on


def kill_server(arena: Arena, victim: str) -> Heal:
    """It comes back with all it had stored."""
    arena.servers[victim].kill()
    return arena.servers[victim].start


def wipe_nats(arena: Arena, victim: str) -> Heal:
    """It comes back with nothing."""
    arena.nats.kill()

    def heal() -> None:
        shutil.rmtree(arena.memory / "nats")
        arena.nats.start()

    return heal


def stop_server(arena: Arena, victim: str) -> Heal:
    """Connections stay, and nothing comes."""
    process = arena.servers[victim].pid
    assert process is not None
    os.kill(process, signal.SIGSTOP)
    return partial(os.kill, process, signal.SIGCONT)


def fill_disk(arena: Arena, victim: str) -> Heal:
    """No worker of it can write beyond the first few blocks of its file."""
    member = arena.members[victim]
    member.limit_files(FULL_BYTES)
    return partial(member.limit_files, -1)


def shift_clock(seconds: int, arena: Arena, victim: str) -> Heal:
    """Its processes' wall clock jumps, and later jumps back."""
    clock = arena.clocks[victim]
    clock.shift(seconds)
    return partial(clock.shift, 0)


def change_way(way: Way, arena: Arena, victim: str) -> Heal:
    """Its connections to all servers."""
    member = arena.members[victim]
    for passage in member.passages:
        passage.become(way)

    def heal() -> None:
        for passage in member.passages:
            passage.become(OPEN)

    return heal


def _rank(arena: Arena, victim: str) -> tuple[Member, int]:
    name, _, rank = victim.partition("/")
    member = arena.members[name]
    return member, member.processes(WORKER)[int(rank)]


# -- all of them -----------------------------------------------------------------------------

NATS = partial(server, EmbeddedNats.NAME)
ETCD = partial(server, EmbeddedEtcd.NAME)

FAULTS = (
    Fault("leader stopped", nodes, 1, 6, stop_leader, HEAL_SECONDS),
    Fault("rank stopped", ranks, 1, 6, stop_rank, HEAL_SECONDS),
    Fault("registry killed", registries, 0.5, 4, kill_registry, HEAL_SECONDS),
    Fault("registry stopped", registries, 1, 6, stop_registry, HEAL_SECONDS),
    Fault("NATS killed", NATS, 0.5, 4, kill_server, HEAL_SECONDS),
    Fault("NATS killed and wiped", NATS, 0.5, 4, wipe_nats, 2 * HEAL_SECONDS),
    Fault("NATS stopped", NATS, 1, 6, stop_server, HEAL_SECONDS),
    Fault("etcd killed", ETCD, 0.5, 4, kill_server, HEAL_SECONDS),
    Fault("etcd stopped", ETCD, 1, 6, stop_server, HEAL_SECONDS),
    Fault("connection cut", nodes, 1, 6, partial(change_way, Way(cut=True)), HEAL_SECONDS),
    Fault("nothing gets in", nodes, 1, 6, partial(change_way, Way(deaf=True)), HEAL_SECONDS),
    Fault("nothing gets out", nodes, 1, 6, partial(change_way, Way(mute=True)), HEAL_SECONDS),
    Fault(
        "connection slow",
        nodes,
        1,
        6,
        partial(change_way, Way(delay_seconds=SLOW_SECONDS)),
        HEAL_SECONDS,
    ),
    Fault("clock goes ahead", clocks, 1, 5, partial(shift_clock, HOUR_SECONDS), HEAL_SECONDS),
    Fault("clock goes back", clocks, 1, 5, partial(shift_clock, -HOUR_SECONDS), HEAL_SECONDS),
    Fault("disk full", with_disk, 3, 8, fill_disk, HEAL_SECONDS, says=GIVEN_UP),
    Fault("rank killed", ranks, 1, 3, kill_rank, HEAL_SECONDS, restarts=True),
    Fault("engine killed", nodes, 0.5, 3, kill_engine, HEAL_SECONDS, restarts=True),
    Fault("killed while read from", sharers, 1, 3, kill_while_read, HEAL_SECONDS, restarts=True),
)
