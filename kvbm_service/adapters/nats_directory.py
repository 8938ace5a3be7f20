"""The directory on NATS: a JetStream key-value bucket whose entries live for one lease.

Anything that speaks NATS can look into it (`nats kv watch kvbm_nodes`). We use the protocol
below nats-py's key-value class: a record carries its owner in a header, and a watch notices
at once when it has missed something.

What is read stands in the subject of each request, so that a server's permissions can say who
reads what (`nats_permissions.py`); nothing here needs a permission to ask for just anything.
Nor is a record asked for by itself (`DIRECT.GET`): a server sends it as it is to wherever the
question says, be that the subject on which buckets are removed. Of the other answers, which can
be led into the bucket likewise, none has an owner: those are no records.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Any

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, Header, StorageType, StreamConfig

from kvbm_schemas.message import MAX_MESSAGE_BYTES
from kvbm_service.adapters.leased_records import Conflict, LeasedRecords, Sighting, Stored
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.errors import BusError, DirectoryError, Forbidden, SettingError

DEFAULT_BUCKET = "kvbm_nodes"
DEFAULT_LEASE_SECONDS = 10.0
MIN_LEASE_SECONDS = 0.5
"""Below, the server's shortest heartbeat and a slow network would end leases by themselves."""
MAX_ANSWER_SECONDS = 2.0
"""How long the server may take to answer, less with short leases."""
HEARTBEATS_PER_LEASE = 5
MAX_HEARTBEATS_MISSED = 3
"""A watch that hears nothing for so many heartbeats starts anew."""
MAX_WAITING_SIGHTINGS = 65_536
"""What may wait to be looked at; beyond, everything is read again."""
MAX_BUCKET_RECORDS = 65_536
"""Records that a bucket takes, removed ones included until their lease has ended."""

REPLICAS = 3
"""Servers of a cluster that keep the bucket each, so that it survives the loss of one. Where
there are fewer, one keeps it."""

_OWNER = "Kvbm-Owner"
_OPERATION = "KV-Operation"
_REMOVED = ("DEL", "PURGE")
_SERVER_REMOVED = "Nats-Marker-Reason"
_WRONG_LAST_SEQUENCE = (10071, 10164)
_EXISTS_ALREADY = 10058
_NO_SUCH_STREAM = 10059
_TOO_FEW_SERVERS = (10005, 10074)
_GONE = (
    nats.js.errors.NotFoundError,
    nats.js.errors.NoStreamResponseError,
    nats.errors.NoRespondersError,
)
"""How nats-py says that the stream may be missing."""
log = logging.getLogger(__name__)

_BUCKET = re.compile(r"[A-Za-z0-9_-]{1,64}")


class _Reader:
    """What the server pushes to one watch, in order."""

    def __init__(self, silence_seconds: float) -> None:
        self._silence_seconds = silence_seconds
        self._waiting: asyncio.Queue[Msg] = asyncio.Queue(MAX_WAITING_SIGHTINGS)
        self._lost: str | None = None
        self._last = 0

    async def take(self, message: Msg) -> None:
        """nats-py's callback."""
        try:
            self._waiting.put_nowait(message)
        except asyncio.QueueFull:
            self._lost = "messages came faster than they could be read"

    def interrupt(self, connected: bool) -> None:
        """The bus's callback."""
        self._lost = "the connection changed"
        if self._waiting.empty():
            self._waiting.put_nowait(Msg(_client=None))  # type: ignore[arg-type] # wake up

    async def next(self) -> Msg:
        """The next message of the stream.

        Raises:
            DirectoryError: the server is silent, or a message is missing.
        """
        while True:
            try:
                async with asyncio.timeout(self._silence_seconds):
                    message = await self._waiting.get()
            except TimeoutError:
                raise DirectoryError("the server has gone silent") from None
            if self._lost is not None:
                raise DirectoryError(self._lost)
            if not _is_heartbeat(message):
                self._check_order(message)
                return message

    def _check_order(self, message: Msg) -> None:
        number = message.metadata.sequence.consumer
        if number != self._last + 1:
            raise DirectoryError(f"{number - self._last - 1} changes were missed")
        self._last = number


class _Bucket:
    """The `RecordStore` port on one key-value bucket."""

    def __init__(
        self,
        bus: NatsBus,
        bucket: str,
        lease_seconds: float,
        storage: StorageType,
        replicas: int,
        leaders_only: bool,
    ) -> None:
        self._bus = bus
        self._leaders_only = leaders_only
        self._lease_seconds = lease_seconds
        self._answer_seconds = min(MAX_ANSWER_SECONDS, lease_seconds / 3)
        self._stream = f"KV_{bucket}"
        self._subjects = f"$KV.{bucket}."
        self._storage = storage
        self._replicas = replicas
        self._made_on: Client | None = None
        """The connection on which the bucket was last made sure of."""

    @property
    def lease_seconds(self) -> float:
        return self._lease_seconds

    async def write(self, key: str, value: bytes, owner: str, expected: int) -> int:
        return await self._publish(key, value, expected, {_OWNER: owner})

    async def remove(self, key: str, expected: int) -> None:
        await self._publish(key, b"", expected, {_OPERATION: "DEL"})

    async def read(self, key: str) -> Stored | None:
        wanted = [self._subjects + key]
        async with contextlib.aclosing(self._pushed(wanted)) as messages:
            async for message, _ in messages:
                if message is None:
                    break
                headers = message.headers or {}
                value = message.data if _is_record(headers) else None
                revision = message.metadata.sequence.stream
                return Stored(value, headers.get(_OWNER, ""), revision)
        return None

    async def follow(self, prefix: str) -> AsyncGenerator[Sighting | None, None]:
        wanted = [_leaders(prefix)] if self._leaders_only else [_everyone(prefix), _leaders(prefix)]
        filters = [self._subjects + keys for keys in wanted]
        async with contextlib.aclosing(self._pushed(filters)) as messages:
            async for message, read_at in messages:
                if message is None:
                    yield None
                    continue
                key = message.subject.removeprefix(self._subjects)
                headers = message.headers or {}
                if key.startswith(prefix) and (_is_record(headers) or _is_removal(headers)):
                    yield _sighting(key, message, read_at)

    async def _pushed(
        self, filters: list[str]
    ) -> AsyncGenerator[tuple[Msg | None, datetime], None]:
        """What is in the bucket, then None, then what is written, each with the time of asking.

        Of several `filters` the first that we are allowed counts.
        """
        jetstream = await self._jetstream()
        client = self._client()
        heartbeat = self._lease_seconds / HEARTBEATS_PER_LEASE
        reader = _Reader(heartbeat * MAX_HEARTBEATS_MISSED)
        inbox = client.new_inbox()
        forget = self._bus.on_connection(reader.interrupt)
        try:
            subscription = await client.subscribe(inbox, cb=reader.take)
            consumer = await self._consume(inbox, filters, heartbeat)
            asked_at = datetime.fromisoformat(consumer["ts"])
            try:
                async for message in self._messages(reader, consumer):
                    yield message, asked_at
            finally:
                with contextlib.suppress(OSError, nats.errors.Error):
                    await subscription.unsubscribe()
                    await jetstream.delete_consumer(self._stream, consumer["name"])
        except (OSError, nats.errors.Error) as error:
            raise DirectoryError(f"the directory cannot be watched: {error}") from error
        finally:
            forget()

    async def _messages(
        self, reader: _Reader, consumer: dict[str, Any]
    ) -> AsyncGenerator[Msg | None, None]:
        caught_up = consumer["num_pending"] == 0
        if caught_up:
            yield None
        while True:
            message = await reader.next()
            yield message
            if not caught_up and message.metadata.num_pending == 0:
                caught_up = True
                yield None

    async def _consume(self, inbox: str, filters: list[str], heartbeat: float) -> dict[str, Any]:
        """Have the server push every record, and every change, to `inbox`."""
        for subjects in filters:  # whoever may not know the ranks may still know the nodes
            try:
                return await self._consume_only(inbox, subjects, heartbeat)
            except Forbidden as error:
                refusal = error
        raise DirectoryError(f"the directory is not for us: {refusal}")

    async def _consume_only(
        self, inbox: str, filter_subject: str, heartbeat: float
    ) -> dict[str, Any]:
        name = secrets.token_hex(16)
        """Unguessable: who knows it may remove it."""
        request = {
            "stream_name": self._stream,
            "config": {
                "name": name,
                "deliver_subject": inbox,
                "deliver_policy": "last_per_subject",
                "filter_subject": filter_subject,
                "ack_policy": "none",
                "replay_policy": "instant",
                "max_deliver": 1,
                "idle_heartbeat": int(heartbeat * 1e9),
                "mem_storage": True,
                "num_replicas": 1,
            },
        }
        subject = f"$JS.API.CONSUMER.CREATE.{self._stream}.{name}.{filter_subject}"
        answer = await self._ask(subject, request)
        if "error" in answer:
            if answer["error"].get("err_code") == _NO_SUCH_STREAM:
                self._made_on = None
            raise DirectoryError(f"the directory cannot be watched: {answer['error']}")
        return answer

    async def _ask(self, subject: str, request: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = await self._bus.request(
                subject, json.dumps(request).encode(), self._answer_seconds
            )
        except Forbidden:
            raise
        except BusError as error:
            raise DirectoryError(f"the directory cannot be reached: {error}") from error
        parsed = json.loads(answer)
        assert isinstance(parsed, dict)
        return parsed

    async def _publish(self, key: str, value: bytes, expected: int, headers: dict[str, str]) -> int:
        headers[Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value] = str(expected)
        jetstream = await self._jetstream()
        try:
            done = await jetstream.publish(self._subjects + key, value, headers=headers)
        except nats.js.errors.APIError as error:
            if error.err_code in _WRONG_LAST_SEQUENCE:
                raise Conflict(f"{key} was changed by another") from error
            raise DirectoryError(f"the directory refuses {key}: {error}") from error
        except (OSError, nats.errors.Error) as error:
            self._suspect(error)
            raise DirectoryError(f"the directory cannot be reached: {error}") from error
        return done.seq

    def _suspect(self, error: Exception) -> None:
        """Make sure of the bucket again before the next step: somebody may have removed it."""
        if isinstance(error, _GONE):
            self._made_on = None

    def _client(self) -> Client:
        try:
            return self._bus.client
        except BusError as error:
            raise DirectoryError(f"the directory cannot be reached: {error}") from error

    async def _jetstream(self) -> JetStreamContext:
        """JetStream on the present connection, with the bucket there."""
        client = self._client()
        jetstream = client.jetstream(timeout=self._answer_seconds)
        if self._made_on is not client:
            await self._make(jetstream)
            self._made_on = client
        return jetstream

    async def _make(self, jetstream: JetStreamContext) -> None:
        """Have the bucket there; one that others made will do if it has our lease."""
        try:
            there = await self._find_or_add(jetstream)
        except nats.js.errors.ServiceUnavailableError as error:
            raise DirectoryError("NATS has no JetStream here: start nats-server -js") from error
        except (OSError, nats.errors.Error) as error:
            raise DirectoryError(f"the directory cannot be reached: {error}") from error
        if there.max_age != self._lease_seconds:
            raise DirectoryError(
                f"the bucket {self._stream} was made for a lease of {there.max_age:g} s, and we "
                f"have {self._lease_seconds:g} s: all nodes and registries need "
                "the same KVBM_MEMBERSHIP_SECONDS (or remove the bucket)"
            )

    async def _find_or_add(self, jetstream: JetStreamContext) -> StreamConfig:
        with contextlib.suppress(nats.js.errors.NotFoundError):
            there = await jetstream.stream_info(self._stream)
            clustered = there.cluster is not None and there.cluster.name
            if clustered and (there.config.num_replicas or 1) < self._replicas:
                await self._spread()
            return there.config
        try:
            answer = await self._create(self._replicas)
            if answer.get("error", {}).get("err_code") in _TOO_FEW_SERVERS:
                answer = await self._create(replicas=1)
        except Forbidden:
            raise DirectoryError(
                f"the bucket {self._stream} is not there, and we may not make it: "
                "run `kvbm ls` once with the operator's credentials"
            ) from None
        error = answer.get("error")
        if error is None:
            made: StreamConfig = StreamConfig.from_response(answer["config"])
            return made
        if error.get("err_code") != _EXISTS_ALREADY:
            raise DirectoryError(f"the bucket {self._stream} cannot be made: {error}")
        return (await jetstream.stream_info(self._stream)).config  # another was quicker

    async def _create(self, replicas: int) -> dict[str, Any]:
        configuration = self._configuration(replicas).as_dict()
        return await self._ask(f"$JS.API.STREAM.CREATE.{self._stream}", configuration)

    async def _spread(self) -> None:
        """Have more servers keep the bucket, if they are there by now, and if we may."""
        with contextlib.suppress(Forbidden, DirectoryError):
            found = await self._ask(f"$JS.API.STREAM.INFO.{self._stream}", {})
            wanted = found["config"] | {"num_replicas": self._replicas}
            answer = await self._ask(f"$JS.API.STREAM.UPDATE.{self._stream}", wanted)
            if "error" in answer:
                log.debug("one server alone keeps %s: %s", self._stream, answer["error"])

    def _configuration(self, replicas: int) -> StreamConfig:
        return StreamConfig(
            name=self._stream,
            subjects=[f"{self._subjects}>"],
            max_msgs_per_subject=1,
            max_age=self._lease_seconds,
            duplicate_window=self._lease_seconds,
            storage=self._storage,
            num_replicas=replicas,
            discard=DiscardPolicy.NEW,
            max_msgs=MAX_BUCKET_RECORDS,
            max_msg_size=MAX_MESSAGE_BYTES,
            # With a rollup, who may write one record could remove all of them.
            allow_rollup_hdrs=False,
            allow_direct=True,
            deny_delete=True,
            # A server that lost its storage would count from 1 again, and a node that was
            # at revision 1 before could then overwrite another's record by its revision 1.
            first_seq=int(time.time() * 1e6),
        )


class NatsDirectory(LeasedRecords):
    """The `Directory` port on a key-value bucket, which is made if it is not there.

    With `leaders_only`, keys of ranks are neither read nor reported. With `own_bus`, nobody
    else uses `bus`, and it is closed with the directory.
    """

    def __init__(
        self,
        bus: NatsBus,
        bucket: str = DEFAULT_BUCKET,
        lease_seconds: float = DEFAULT_LEASE_SECONDS,
        storage: StorageType = StorageType.FILE,
        replicas: int = REPLICAS,
        *,
        leaders_only: bool = False,
        own_bus: bool = False,
    ) -> None:
        if not _BUCKET.fullmatch(bucket):
            raise SettingError("bucket", bucket, "letters, digits, `_` and `-`")
        if lease_seconds < MIN_LEASE_SECONDS:
            raise SettingError("lease_seconds", lease_seconds, f"at least {MIN_LEASE_SECONDS} s")
        super().__init__(_Bucket(bus, bucket, lease_seconds, storage, replicas, leaders_only))
        self._own_bus = bus if own_bus else None

    async def close(self) -> None:
        await super().close()
        if self._own_bus is not None:
            await self._own_bus.close()


def _everyone(prefix: str) -> str:
    """The subject, within the bucket, of all keys that may begin with `prefix`."""
    tokens, dot, _ = prefix.rpartition(".")
    return f"{tokens}{dot}>"


def _leaders(prefix: str) -> str:
    """As `_everyone`, but of leaders' keys alone: `<namespace>.<fingerprint>.<node>`."""
    tokens = prefix.split(".")[:-1][:2]
    return ".".join([*tokens, *["*"] * (3 - len(tokens))])


def _is_removal(headers: dict[str, str]) -> bool:
    return headers.get(_OPERATION) in _REMOVED or _SERVER_REMOVED in headers


def _is_record(headers: dict[str, str]) -> bool:
    """Whether one of us has written it, and not a server that was made to answer there."""
    return _OWNER in headers and "Nats-Stream" not in headers and not _is_removal(headers)


def _is_heartbeat(message: Msg) -> bool:
    return (message.headers or {}).get(Header.STATUS.value) == "100"


def _sighting(key: str, message: Msg, read_at: datetime) -> Sighting:
    metadata = message.metadata
    age = (read_at - metadata.timestamp.astimezone(UTC)).total_seconds()
    value = None if _is_removal(message.headers or {}) else message.data
    return Sighting(key, value, metadata.sequence.stream, max(0.0, age))
