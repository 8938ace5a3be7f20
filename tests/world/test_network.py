"""The network between hosts does what it is told, and nothing of it stays behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.world import Host, Line, World
from tests.world.skipping import world_or_skip

PATIENCE_SECONDS = 20.0
SOON_SECONDS = 1.0
"""For what must not arrive: on this network everything that arrives does so in a millisecond."""

SAME_PATH = {"PYTHONPATH": os.pathsep.join(sys.path)}


def network() -> str:
    """Which network the calling thread is in."""
    return str(Path("/proc/thread-self/ns/net").readlink())


class Ear:
    """A host's UDP socket."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.socket = host.run(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.socket.bind((host.address, 0))

    def say(self, to: Ear, what: bytes = b"hello") -> None:
        self.socket.sendto(what, to.socket.getsockname())

    def hears(self, seconds: float = PATIENCE_SECONDS) -> bytes | None:
        """What comes next, if anything does in time."""
        self.socket.settimeout(seconds)
        try:
            return self.socket.recv(1 << 16)
        except TimeoutError:
            return None


@pytest.fixture
def ears(world: World) -> Iterator[list[Ear]]:
    world.heal()
    ears = [Ear(world[name]) for name in "abc"]
    yield ears
    for ear in ears:
        ear.socket.close()


def test_hosts_hear_each_other_and_nobody_else(ears: list[Ear]) -> None:
    a, b, c = ears
    a.say(b, b"1")
    b.say(c, b"2")
    assert (b.hears(), c.hears()) == (b"1", b"2")
    with pytest.raises(OSError, match="unreachable"):
        a.socket.sendto(b"", ("192.0.2.1", 9))


def test_what_is_cut_passes_nothing_and_passes_again_once_healed(
    world: World, ears: list[Ear]
) -> None:
    a, b, c = ears
    world.cut("a", "b")
    a.say(b)
    b.say(a)
    a.say(c)
    assert c.hears() == b"hello"
    assert a.hears(SOON_SECONDS) is b.hears(SOON_SECONDS) is None
    world.heal()
    a.say(b)
    assert b.hears() == b"hello"


def test_a_cut_one_way_leaves_the_other(world: World, ears: list[Ear]) -> None:
    a, b, _ = ears
    world.cut_one_way("a", "b")
    a.say(b)
    b.say(a)
    assert a.hears() == b"hello"
    assert b.hears(SOON_SECONDS) is None
    assert world.traffic("a", "b").dropped > 0


def test_an_isolated_host_hears_nobody(world: World, ears: list[Ear]) -> None:
    a, b, c = ears
    world.isolate("a")
    b.say(a)
    c.say(a)
    b.say(c)
    assert c.hears() == b"hello"
    assert a.hears(SOON_SECONDS) is None


def test_packets_are_late_by_the_delay_and_in_order(world: World, ears: list[Ear]) -> None:
    a, b, _ = ears
    world.set_line("a", "b", Line(delay_seconds=0.2, jitter_seconds=0.1))
    began = time.monotonic()
    for number in range(50):
        a.say(b, str(number).encode())
    assert [b.hears() for _ in range(50)] == [str(number).encode() for number in range(50)]
    assert time.monotonic() - began >= 0.2


def test_what_is_under_way_when_a_line_is_cut_is_lost(world: World, ears: list[Ear]) -> None:
    a, b, _ = ears
    world.set_line("a", "b", Line(delay_seconds=2.0))
    a.say(b)
    time.sleep(0.1)
    world.cut_one_way("a", "b")
    world.heal()
    assert b.hears(2.5) is None


def test_a_lossy_line_drops_its_share(world: World, ears: list[Ear]) -> None:
    a, b, _ = ears
    before = world.traffic("a", "b")
    world.set_line("a", "b", Line(loss=0.3))
    deadline = time.monotonic() + PATIENCE_SECONDS
    for sent in range(1, 1001):
        a.say(b)
        while sum(world.traffic("a", "b")) - sum(before) < sent:  # queues are short
            assert time.monotonic() < deadline
    assert 200 < world.traffic("a", "b").dropped - before.dropped < 400


def test_a_narrow_line_takes_its_time_and_drops_what_does_not_fit(
    world: World, ears: list[Ear]
) -> None:
    a, b, _ = ears
    before = world.traffic("a", "b").dropped
    world.set_line("a", "b", Line(bytes_per_second=400e3))
    began = time.monotonic()
    for _ in range(100):
        a.say(b, bytes(4000))
    heard = 0
    while heard + world.traffic("a", "b").dropped - before < 100:
        assert time.monotonic() < began + PATIENCE_SECONDS, "some are neither here nor lost"
        heard += b.hears(SOON_SECONDS) is not None
    assert heard < 100
    assert time.monotonic() - began >= heard * 4000 / 400e3 * 0.9


def test_a_process_is_on_its_host_and_ends_with_the_world(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = "from tests.world.test_network import *; print(network(), flush=True); "
    with world_or_skip("only") as world:
        command = [sys.executable, "-c", program + "time.sleep(600)"]
        process = world["only"].start(command, log, SAME_PATH)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not log.read_text().endswith("\n"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert log.read_text().strip() == world["only"].run(network) != network()
    assert process.returncode is not None


def test_who_may_not_make_hosts_is_told_what_is_missing() -> None:
    program = "from tests.world import World; import os; os.setuid(65534); World('a').__enter__()"
    said = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | SAME_PATH,
        check=False,
    )
    assert "NotPermitted: CAP_SYS_ADMIN is missing" in said.stderr
