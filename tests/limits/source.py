"""A node that publishes more events than anyone can take, and knows what it holds after each."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import time
from urllib.parse import urlsplit

from kvbm_schemas.block import HASH_BYTES, Tier
from kvbm_schemas.codec import Decoder, encode
from kvbm_schemas.events import Beat, Removed, Stored
from kvbm_schemas.message import Message
from kvbm_schemas.records import NodeRecord
from kvbm_schemas.requests import Holder, Locate, Placements, SnapshotChunk
from kvbm_schemas.subjects import REGISTRY_NODE, Scope
from kvbm_service.adapters.bus import Delivery
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_directory import NatsDirectory
from kvbm_service.errors import BusError

SCOPE = Scope("default", "0123456789abcdef")
NODE = "source"
GROUPS = 32
"""Of blocks. Each event stores one of them, or removes it: in turn all, then again all."""
BEAT_SECONDS = 0.2
ANSWER_SECONDS = 2.0
MESSAGES_PER_SEND = 1_000
FIRST_SEQ = 1 << 16
"""From here on, sequence numbers have the same size in messages up to 2 ** 32."""

_placements = Decoder(Placements)


class Source:
    """The node. Made with `join`; its events go over a socket of their own."""

    def __init__(self, url: str, bus: NatsBus, group_blocks: int) -> None:
        self.seq = FIRST_SEQ
        self.bus = bus
        self._url = url
        self._groups = [secrets.token_bytes(group_blocks * HASH_BYTES) for _ in range(GROUPS)]
        self._events = [_template(kind, g) for kind in (Stored, Removed) for g in self._groups]
        self._beating: asyncio.Task[None] | None = None

    @classmethod
    async def join(cls, url: str, group_blocks: int) -> Source:
        """Become a member, and answer whoever asks for a snapshot."""
        bus = await NatsBus.connect(url, name=NODE)
        source = cls(url, bus, group_blocks)
        await bus.subscribe(SCOPE.of(NODE, "snapshot"), source._answer)
        record = NodeRecord(node=NODE, epoch=1, world_size=1, block_bytes=1)
        await NatsDirectory(bus).join(".".join([*SCOPE, NODE]), encode(record))
        source._beating = asyncio.create_task(source._beat())
        return source

    async def close(self) -> None:
        assert self._beating is not None
        self._beating.cancel()
        await self.bus.close()

    async def publish(self, events: int, per_second: float = 1e9) -> None:
        """Publish so many events, as fast as the server takes them or as told."""
        await asyncio.to_thread(self._publish, events, per_second)

    def _publish(self, events: int, per_second: float) -> None:
        subject = SCOPE.of(NODE, "events").encode()
        address = urlsplit(self._url)
        heads = [(_header(subject, h, t) + h, t + b"\r\n") for h, t in self._events]
        with socket.create_connection((address.hostname, address.port), 30.0) as server:
            server.sendall(b'CONNECT {"verbose":false}\r\n')
            began, sent = time.monotonic(), 0
            while sent < events:
                parts = []
                count = min(MESSAGES_PER_SEND, events - sent)
                for seq in range(self.seq + 1, self.seq + 1 + count):
                    head, tail = heads[seq % len(heads)]
                    parts += (head, seq.to_bytes(4, "big"), tail)
                server.sendall(b"".join(parts))
                self.seq += count
                sent += count
                time.sleep(max(0.0, began + sent / per_second - time.monotonic()))
            server.sendall(b"PING\r\n")
            while b"PONG" not in server.recv(65_536):
                pass

    @property
    def stored(self) -> list[bool]:
        """Which groups are held after event `seq`."""
        held = [False] * GROUPS
        for seq in range(max(FIRST_SEQ + 1, self.seq - 2 * GROUPS), self.seq + 1):
            number = seq % len(self._events)
            held[number % GROUPS] = number < GROUPS
        return held

    async def _answer(self, delivery: Delivery) -> None:
        seq, held = self.seq, self.stored
        groups = [group for group, there in zip(self._groups, held, strict=True) if there] or [b""]
        for index, hashes in enumerate(groups):
            chunk = SnapshotChunk(
                epoch=1, seq=seq, index=index, total=len(groups), tier=Tier.HOST, hashes=hashes
            )
            await self.bus.publish(delivery.reply, encode(chunk))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            with contextlib.suppress(BusError):
                await self._tell(Beat(epoch=1, seq=self.seq))

    async def _tell(self, event: Message) -> None:
        await self.bus.publish(SCOPE.of(NODE, "events"), encode(event))

    async def is_known(self) -> bool:
        """Whether the registry says of every block just what is true."""
        subject = SCOPE.of(REGISTRY_NODE, "locate")
        for hashes, there in zip(self._groups, self.stored, strict=True):
            try:
                reply = await self.bus.request(
                    subject, encode(Locate(hashes=hashes)), ANSWER_SECONDS
                )
            except BusError:
                return False
            right = (Holder(node=NODE, tier=Tier.HOST),) if there else ()
            if any(holders != right for holders in _placements.decode(reply).holders):
                return False
        return True

    async def seconds_until_known(self, limit_seconds: float) -> float:
        """How long it takes until the registry knows all; fails at the limit."""
        began = time.monotonic()
        while not await self.is_known():
            assert time.monotonic() - began < limit_seconds, f"not healed in {limit_seconds:g} s"
            await asyncio.sleep(0.02)
        return time.monotonic() - began


def _template(kind: type[Stored] | type[Removed], hashes: bytes) -> tuple[bytes, bytes]:
    """What comes before the sequence number in an event's payload, and what behind."""
    mark = 0xFEDCBA98
    payload = encode(kind(epoch=1, seq=mark, tier=Tier.HOST, hashes=hashes))
    head, found, tail = payload.partition(mark.to_bytes(4, "big"))
    assert found
    return head, tail


def _header(subject: bytes, head: bytes, tail: bytes) -> bytes:
    return b"PUB %s %d\r\n" % (subject, len(head) + 4 + len(tail))
