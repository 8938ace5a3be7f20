"""One who hears and remembers everything on the bus, and can ask the directory and the registry."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

from kvbm_schemas.block import Tier, count, unpack
from kvbm_schemas.codec import AnyMessage, Decoder, Malformed, encode
from kvbm_schemas.events import Loaded, Removed, Stored
from kvbm_schemas.message import Message
from kvbm_schemas.records import DirectoryRecord, NodeRecord
from kvbm_schemas.requests import Holder, Locate, Placements, Resync, SnapshotChunk
from kvbm_schemas.subjects import EVERYTHING, REGISTRY_NODE, Scope, Subject, parse
from kvbm_service.adapters.bus import Delivery
from kvbm_service.adapters.directory import Directory
from kvbm_service.adapters.etcd_directory import EtcdDirectory
from kvbm_service.adapters.etcd_login import parse_login
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_directory import NatsDirectory
from kvbm_service.errors import BusError, DirectoryError

T = TypeVar("T")
M = TypeVar("M", bound=Message)

PATIENCE_SECONDS = 30.0
ANSWER_SECONDS = 1.0
SNAPSHOT_SECONDS = 3.0
POLL_SECONDS = 0.05

_messages: Decoder[AnyMessage] = Decoder(AnyMessage)
_records: Decoder[DirectoryRecord] = Decoder(DirectoryRecord)
_placements = Decoder(Placements)
_chunks = Decoder(SnapshotChunk)


class Heard(NamedTuple):
    """One message on the bus."""

    subject: Subject
    message: Message


class Witness:
    """Listens to `url` from when it is made until `close`, on a thread of its own."""

    def __init__(self, url: str, membership_seconds: float, directory_url: str = "") -> None:
        """`directory_url`: of the etcd that is the directory, where it is not NATS itself."""
        self._heard: list[Heard] = []
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="witness")
        self._thread.start()
        self._bus = self._run(NatsBus.connect(url, name="kvbm test"))
        self._directory: Directory = (
            EtcdDirectory(parse_login(directory_url), membership_seconds)
            if directory_url
            else NatsDirectory(self._bus, lease_seconds=membership_seconds)
        )
        self._run(self._bus.subscribe(EVERYTHING, self._take))

    def close(self) -> None:
        """Stop listening."""
        self._run(self._directory.close())
        self._run(self._bus.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- the bus ---------------------------------------------------------------------------

    def listen(self) -> Report:
        """What is heard from now on."""
        with self._changed:
            return Report(self, len(self._heard))

    def since(self, start: int) -> list[Heard]:
        """What was heard after the first `start` messages."""
        with self._changed:
            return self._heard[start:]

    def wait(self, what: str, happened: Callable[[], T], seconds: float = PATIENCE_SECONDS) -> T:
        """Wait until `happened` answers something true, asked at each message and in between."""
        deadline = time.monotonic() + seconds
        while not (answer := happened()):
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
            with self._changed:
                self._changed.wait(POLL_SECONDS)
        return answer

    # -- the registry and the directory ------------------------------------------------------

    def holders(self, scope: Scope, blocks: Sequence[bytes]) -> list[set[str]]:
        """Which nodes hold each block, as a registry says; empty if none answers."""
        placed = self.placements(scope, blocks)
        return [{holder.node for holder in holders} for holders in placed]

    def placements(self, scope: Scope, blocks: Sequence[bytes]) -> list[tuple[Holder, ...]]:
        """Where each block is, as a registry says; empty if none answers."""
        question = encode(Locate(hashes=b"".join(blocks)))
        try:
            subject = scope.of(REGISTRY_NODE, "locate")
            answer = self._run(self._bus.request(subject, question, ANSWER_SECONDS))
        except BusError:
            return []
        return list(_placements.decode(answer).holders)

    def snapshot(self, scope: Scope, node: str) -> set[tuple[bytes, Tier]] | None:
        """What the node says that it holds, and in which tiers; None if it does not answer."""
        try:
            chunks = self._run(self._snapshot(scope.of(node, "snapshot")))
        except BusError:
            return None
        return {(name, chunk.tier) for chunk in chunks for name in unpack(chunk.hashes)}

    def wait_until_located(
        self,
        scope: Scope,
        blocks: Sequence[bytes],
        node: str,
        seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """Wait until a registry says that `node` holds all these blocks."""

        def located() -> bool:
            found = self.holders(scope, blocks)
            return bool(found) and all(node in nodes for nodes in found)

        self.wait(f"a registry knows that {node} holds {len(blocks)} blocks", located, seconds)

    def wait_until_forgotten(self, scope: Scope, blocks: Sequence[bytes], node: str) -> None:
        """Wait until a registry says that `node` holds none of these blocks."""

        def forgotten() -> bool:
            found = self.holders(scope, blocks)
            return bool(found) and not any(node in nodes for nodes in found)

        self.wait(f"a registry knows that {node} holds nothing", forgotten)

    def nodes(self, younger_than: float = float("inf")) -> dict[str, NodeRecord]:
        """The nodes in the directory whose record was written within the last seconds."""
        try:
            entries = self._run(self._directory.entries())
        except DirectoryError:
            return {}
        records = [_records.decode(entry.value) for entry in entries
                   if entry.age_seconds < younger_than]  # fmt: skip
        return {record.node: record for record in records if isinstance(record, NodeRecord)}

    def pinned(self, node: str, younger_than: float) -> int | None:
        """Blocks that the node has pinned; None if it said nothing that recently."""
        record = self.nodes(younger_than).get(node)
        return None if record is None else sum(tier.pinned for tier in record.tiers)

    # -- inside ------------------------------------------------------------------------------

    async def _snapshot(self, subject: str) -> list[SnapshotChunk]:
        chunks: list[SnapshotChunk] = []
        answers = self._bus.request_many(subject, encode(Resync()), SNAPSHOT_SECONDS)
        async with contextlib.aclosing(answers):
            async for payload in answers:
                chunks.append(_chunks.decode(payload))
                if len(chunks) >= chunks[-1].total:
                    break
        return chunks

    async def _take(self, delivery: Delivery) -> None:
        subject = parse(delivery.subject)
        if subject is None:
            return
        with contextlib.suppress(Malformed):
            message = _messages.decode(delivery.payload)
            with self._changed:
                self._heard.append(Heard(subject, message))
                self._changed.notify_all()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_SECONDS)


class Report:
    """What was said since some moment."""

    def __init__(self, witness: Witness, start: int) -> None:
        self._witness = witness
        self._start = start

    def of(self, kind: type[M], node: str | None = None) -> list[M]:
        """The messages of one kind, on the subjects of one node."""
        return [
            heard.message
            for heard in self._witness.since(self._start)
            if isinstance(heard.message, kind) and node in (None, heard.subject.node)
        ]

    def scope(self, node: str) -> Scope:
        """Where the node's messages went."""
        subjects = [heard.subject for heard in self._witness.since(self._start)]
        return next(Scope(s.namespace, s.fingerprint) for s in subjects if s.node == node)

    def stored(self, node: str) -> list[bytes]:
        """The blocks that the node has come to hold, in order."""
        return [name for event in self.of(Stored, node) for name in unpack(event.hashes)]

    def removed(self, node: str) -> int:
        """How many blocks the node has evicted."""
        return sum(count(event.hashes) for event in self.of(Removed, node))

    def sources(self, node: str) -> dict[str, int]:
        """How many blocks the node has loaded, by the node they came from."""
        found: dict[str, int] = {}
        for loaded in self.of(Loaded, node):
            for source in loaded.sources:
                found[source.node] = found.get(source.node, 0) + source.blocks
        return found

    def failed(self, node: str) -> int:
        """How many blocks did not arrive."""
        return sum(loaded.failed for loaded in self.of(Loaded, node))
