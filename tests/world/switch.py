"""The network: a program that passes IP packets between hosts, and drops or delays some.

    python -m tests.world.switch SEED NAME=FD=ADDRESS ...

Each FD is a TUN device in a namespace of its own. Lines of JSON come in, `[source, target, line]`,
and for each one goes out: what that direction has passed and dropped so far.
"""

from __future__ import annotations

import os
import random
import select
import socket
import sys
import time
from collections import deque

import msgspec

from tests.world.line import Line

QUEUE_BYTES = 256 << 10
"""What may wait for a line's bandwidth; beyond, packets are dropped, as a router would."""
MAX_WAITING_PACKETS = 16_384
"""What may be under way on a line that delays."""
PACKETS_PER_TURN = 64
MAX_PACKET_BYTES = 65_536
_TARGET = slice(16, 20)
"""Where an IPv4 header has the address that the packet is for."""


Order = tuple[str, str, Line | None]


class Direction:
    """Packets on their way from one host to another."""

    def __init__(self, target: int, chance: random.Random) -> None:
        self.line = Line()
        self.passed = 0
        self.dropped = 0
        self._target = target
        self._chance = chance
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._free_at = 0.0
        """When the line has sent all that it took on, if it has a bandwidth."""
        self._last_due = 0.0

    @property
    def due(self) -> float | None:
        """When the next packet arrives, if any is under way."""
        return self._waiting[0][0] if self._waiting else None

    def take(self, packet: bytes, now: float) -> None:
        """A packet is sent."""
        line = self.line
        if line.cut or (line.loss and self._chance.random() < line.loss):
            self.dropped += 1
            return
        due = now + line.delay_seconds + line.jitter_seconds * self._chance.random()
        if line.bytes_per_second:
            backlog = max(0.0, self._free_at - now)
            if backlog * line.bytes_per_second + len(packet) > QUEUE_BYTES:
                self.dropped += 1
                return
            self._free_at = now + backlog + len(packet) / line.bytes_per_second
            due += self._free_at - now
        due = max(due, self._last_due)
        if due <= now and not self._waiting:
            self._put(packet)
        elif len(self._waiting) < MAX_WAITING_PACKETS:
            self._waiting.append((due, packet))
            self._last_due = due
        else:
            self.dropped += 1

    def deliver(self, now: float) -> None:
        """Hand over what has arrived by now."""
        while self._waiting and self._waiting[0][0] <= now:
            self._put(self._waiting.popleft()[1])

    def change(self, line: Line) -> None:
        """From now on it is like this. What is under way is lost if it is cut, else it arrives."""
        self.line = line
        if line.cut:
            self.dropped += len(self._waiting)
            self._waiting.clear()
        self.deliver(float("inf"))
        self._free_at = self._last_due = 0.0

    def _put(self, packet: bytes) -> None:
        try:
            os.write(self._target, packet)
            self.passed += 1
        except OSError:  # the host has no room for it
            self.dropped += 1


class Switch:
    """All directions between some hosts, given the device and the address of each."""

    def __init__(self, seed: int, hosts: dict[str, tuple[int, str]]) -> None:
        chance = random.Random(seed)
        self._directions = {
            (source, target): Direction(device, chance)
            for target, (device, _) in hosts.items()
            for source in hosts
            if source != target
        }
        self._ways = {
            device: {
                socket.inet_aton(address): self._directions[source, target]
                for target, (_, address) in hosts.items()
                if target != source
            }
            for source, (device, _) in hosts.items()
        }
        """By the device that a packet comes from, and by its target."""

    def run(self, orders: int, answers: int) -> None:
        """Work until nobody is there any more to give orders."""
        poll = select.epoll()
        for device in self._ways:
            poll.register(device, select.EPOLLIN)
        poll.register(orders, select.EPOLLIN)
        decoder = msgspec.json.Decoder(Order)
        unread = b""
        while True:
            for ready, _ in poll.poll(self._patience()):
                if ready != orders:
                    self._drain(ready)
                    continue
                said = os.read(orders, MAX_PACKET_BYTES)
                if not said:
                    return
                *lines, unread = (unread + said).split(b"\n")
                for line in lines:
                    os.write(answers, self._obey(*decoder.decode(line)))
            now = time.monotonic()
            for direction in self._directions.values():
                direction.deliver(now)

    def _patience(self) -> float:
        """Seconds until a packet arrives by itself; -1: none will."""
        due = [direction.due for direction in self._directions.values()]
        soonest = min((each for each in due if each is not None), default=None)
        return -1 if soonest is None else max(0.0, soonest - time.monotonic())

    def _drain(self, device: int) -> None:
        ways = self._ways[device]
        for _ in range(PACKETS_PER_TURN):
            try:
                packet = os.read(device, MAX_PACKET_BYTES)
            except BlockingIOError:
                return
            direction = ways.get(packet[_TARGET])
            if direction is not None and packet[0] >> 4 == 4:
                direction.take(packet, time.monotonic())

    def _obey(self, source: str, target: str, line: Line | None) -> bytes:
        direction = self._directions[source, target]
        if line is not None:
            direction.change(line)
        return msgspec.json.encode([direction.passed, direction.dropped]) + b"\n"


def main() -> None:
    seed, *described = sys.argv[1:]
    hosts = {}
    for host in described:
        name, device, address = host.split("=")
        hosts[name] = int(device), address
    Switch(int(seed), hosts).run(orders=0, answers=1)


if __name__ == "__main__":
    main()
