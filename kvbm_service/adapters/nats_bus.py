"""The bus on NATS, with nats-py.

nats-py can reconnect by itself, but then keeps what is published meanwhile, gives up on some
errors, cannot start without a server, and cannot be subscribed before. So here each of its
clients lives for one connection; we keep the subscriptions, and put them on the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import ssl
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as ClientSubscription

from kvbm_schemas.subjects import COMMAND_INBOX
from kvbm_service.adapters.background import Background
from kvbm_service.adapters.bus import Delivery, Handler, OnConnection, Troubles
from kvbm_service.adapters.mailbox import Mailbox, Questions, Turn
from kvbm_service.adapters.nats_login import (
    CA_SETTING,
    CERTIFICATE_SETTING,
    CREDENTIALS_SETTING,
    NO_TLS_FILES,
    URL_SETTING,
    Login,
    TlsFiles,
    parse_login,
)
from kvbm_service.errors import BusError, BusUnavailable, Forbidden, SettingError

CONNECT_SECONDS = 2.0
"""How long one server may take to answer an attempt to connect."""
FIRST_RETRY_SECONDS = 0.1
MAX_RETRY_SECONDS = 2.0
"""Attempts are this far apart at most, and go on for ever."""
PING_SECONDS = 5.0
MAX_PINGS_UNANSWERED = 2
"""A server that has not answered this many pings is taken for lost."""
FLUSH_SECONDS = 5.0
"""A server that takes nothing from us for so long is taken for lost."""
CLOSE_SECONDS = 1.0
"""How long nats-py may take to let go of a connection. Its socket it closes first."""
LOOK_SECONDS = 0.5
"""How often to look whether a connection that told us nothing is still there."""
MAX_COMPLAINTS_LOGGED = 64
"""Different complaints of the server (a forbidden subject, say) that are logged, once each."""

FAILURES = (OSError, nats.errors.Error)
"""What nats-py raises when a connection cannot be made or used."""

_FORBIDDEN = re.compile(r"permissions violation for publish to .?\"?([^\s\"]+)\"?", re.IGNORECASE)

log = logging.getLogger(__name__)


class _NotOurs(logging.Filter):
    """Keeps out what asyncio remarks at the end of every TLS connection that nats-py has made."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("returning true from eof_received()")


logging.getLogger("asyncio").addFilter(_NotOurs())


class _UnfitGreeting(nats.errors.Error):
    """What a server says of itself before anything of ours is sent rules it out."""

    def __init__(self, what: str, todo: str) -> None:
        super().__init__(what)
        self.what = what
        self.todo = todo


class _Client(Client):
    """nats-py's client, which by itself encrypts only if the server's greeting says so.

    And which, by itself, would keep the loop for as long as messages come.
    """

    def __init__(self, login: Login) -> None:
        super().__init__()
        self._login = login
        self._turn = Turn()

    async def _process_msg(self, *message: Any) -> None:
        # nats-py parses all that has arrived before anyone else gets a turn.
        await super()._process_msg(*message)
        if self._turn.is_over:
            await asyncio.sleep(0)
            self._turn.begin()

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection:
            self._check(info)
        await super()._process_info(info, initial_connection)  # type: ignore[no-untyped-call,unused-ignore]

    def _check(self, greeting: dict[str, Any]) -> None:
        # Whoever is between us and the server could have written it, too.
        if self._login.must_encrypt and not greeting.get("tls_required"):
            raise _UnfitGreeting(
                "offers no TLS, and nothing is sent to it in the clear",
                f"give it a certificate, or unset {CA_SETTING} and {CERTIFICATE_SETTING} and take "
                f"tls:// out of {URL_SETTING}",
            )
        if greeting.get("tls_verify") and not self._login.tls.certificate:
            raise _UnfitGreeting("wants a certificate of us", f"set {CERTIFICATE_SETTING}")


class NatsSubscription:
    """One handler's interest in a pattern, over any number of connections."""

    def __init__(self, bus: NatsBus, pattern: str, mailbox: Mailbox, queue: str) -> None:
        self._bus = bus
        self._pattern = pattern
        self._mailbox = mailbox
        self._queue = queue
        self._client: Client | None = None
        self._live: ClientSubscription | None = None

    async def attach(self, client: Client) -> None:
        """Become live on `client`, unless it is so already."""
        if self._client is not client:
            self._client = client
            self._live = await client.subscribe(self._pattern, queue=self._queue, cb=self._take)

    async def close(self) -> None:
        self._bus.forget(self)
        live, self._live = self._live, None
        if live is not None:
            # An error means that the connection is gone, and the subscription with it.
            with contextlib.suppress(nats.errors.Error):
                await live.unsubscribe()
        await self._mailbox.close()

    async def _take(self, message: Msg) -> None:
        if _is_jetstreams(message):
            self._bus.troubles.errors += 1
            return
        self._mailbox.put(Delivery(message.subject, message.data, message.reply))


class _Connection:
    """One life of a connection: opened once, ended once."""

    def __init__(self, login: Login, troubled: Callable[[Exception], None]) -> None:
        self.client: Client = _Client(login)
        self._login = login
        self.ended = asyncio.Event()
        self._troubled = troubled
        self._opened = False
        self._first_error: Exception | None = None

    async def open(self, name: str, inbox: str) -> None:
        """Connect.

        Raises:
            The first thing that went wrong: one of FAILURES, or ValueError.
        """
        servers = [server.url for server in self._login.servers]
        try:
            # One try per server takes CONNECT_SECONDS at most; a second, which nats-py would
            # go on with, is ours to time.
            async with asyncio.timeout(CONNECT_SECONDS * len(servers) + 0.5):
                await self.client.connect(
                    servers,
                    name=name,
                    inbox_prefix=inbox,
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,  # type: ignore[arg-type,unused-ignore]
                    connect_timeout=CONNECT_SECONDS,  # type: ignore[arg-type]
                    ping_interval=PING_SECONDS,  # type: ignore[arg-type]
                    max_outstanding_pings=MAX_PINGS_UNANSWERED,
                    flush_timeout=FLUSH_SECONDS,
                    error_cb=self._error,
                    closed_cb=self._closed,
                    **self._login.options(),
                )
            if not self.client.is_connected:
                raise nats.errors.UnexpectedEOF
        except (*FAILURES, ValueError) as error:  # ValueError: what answers is not NATS
            await self.close()
            raise (self._first_error or error) from None
        self._opened = True

    @property
    def usable(self) -> bool:
        """Whether it has not ended yet, as far as one can know."""
        return self.client.is_connected and not self.ended.is_set()

    async def wait_until_ended(self) -> None:
        """Return when nothing can get through any more."""
        # nats-py does not always call back: not when its last flush to a dead socket fails.
        while self.usable:
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self.ended.wait()
            except TimeoutError:
                continue

    async def close(self) -> None:
        """Let go of the socket. Never raises."""
        try:
            # After a handshake for TLS that failed, nats-py waits for an end that is past.
            async with asyncio.timeout(CLOSE_SECONDS):
                await self.client.close()
        except FAILURES as error:
            log.debug("closing a connection to NATS: %s", error)
        await asyncio.sleep(0)  # nats-py's tasks see their cancellation

    async def _error(self, error: Exception) -> None:
        if not self._opened:
            self._first_error = self._first_error or error
            return
        if isinstance(error, OSError | nats.errors.FlushTimeoutError):
            self.ended.set()
        elif not isinstance(error, nats.errors.UnexpectedEOF):
            self._troubled(error)

    async def _closed(self) -> None:
        self.ended.set()


class NatsBus:
    """The `Bus` port on a NATS server, there or not. Made with `connect`."""

    def __init__(self, login: Login, name: str, inbox: str) -> None:
        self._login = login
        self._name = name
        self._inbox = inbox
        self._troubles = Troubles()
        self._complaints: set[str] = set()
        self._listeners: dict[OnConnection, None] = {}
        self._subscriptions: dict[NatsSubscription, None] = {}
        self._questions = Questions(f"{inbox}.{secrets.token_hex(16)}")
        self._connection: _Connection | None = None
        """What subscriptions are put on."""
        self._live = False
        """Whether all of them are."""
        self._absence = f"not connected to NATS at {login} yet"
        self._refused = False
        self._logged: set[bool] = set()
        """What this outage has logged: that we are away (False), that we are refused (True)."""
        self._tried = asyncio.Event()
        self._work = Background(self._stay_connected(), "connection to NATS")

    @classmethod
    async def connect(
        cls,
        url: str,
        credentials: str = "",
        name: str = "kvbm",
        *,
        tls: TlsFiles = NO_TLS_FILES,
        inbox: str = COMMAND_INBOX,
    ) -> NatsBus:
        """A bus on the server(s) at `url`; returns after the first attempt to connect.

        If no server is there, it goes on trying in the background for ever. `credentials`:
        see `parse_login`. `name` is what the server's monitoring shows. `inbox`: where our
        answers come, one of those in `kvbm_schemas.subjects`.

        Raises:
            SettingError: `url`, `credentials` or a file of `tls` cannot be understood.
            BusUnavailable: a server is there and refuses us.
        """
        bus = cls(parse_login(url, credentials, tls), name, inbox)
        try:
            await bus._tried.wait()
        except asyncio.CancelledError:
            await bus.close()
            raise
        if bus._refused:
            refusal = BusUnavailable(bus._absence)
            await bus.close()
            raise refusal
        return bus

    @property
    def connected(self) -> bool:
        return self._live and self._connection is not None and self._connection.usable

    @property
    def troubles(self) -> Troubles:
        return self._troubles

    @property
    def client(self) -> Client:
        """nats-py's client of the present connection, for what this port does not offer.

        Raises:
            BusUnavailable: not connected.
        """
        if self._connection is None or not self.connected:
            raise BusUnavailable(self._absence)
        return self._connection.client

    def on_connection(self, listener: OnConnection) -> Callable[[], None]:
        self._listeners[listener] = None
        return partial(_discard, self._listeners, listener)

    async def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        client = self.client
        try:
            await client.publish(subject, payload, reply)
        except nats.errors.MaxPayloadError:
            raise BusError(
                f"a message of {len(payload)} bytes on {subject} is larger than the "
                f"{client.max_payload} that NATS at {self._login} takes (its `max_payload`)"
            ) from None
        except nats.errors.Error as error:
            raise BusUnavailable(f"NATS at {self._login}: {_words(error)}") from error

    async def request(self, subject: str, payload: bytes, timeout_seconds: float) -> bytes:
        with self._questions.ask(subject) as question:
            await self.publish(subject, payload, question.address)
            return await question.answer(timeout_seconds)

    async def request_many(
        self, subject: str, payload: bytes, timeout_seconds: float
    ) -> AsyncGenerator[bytes, None]:
        with self._questions.ask(subject) as question:
            await self.publish(subject, payload, question.address)
            while True:
                yield await question.answer(timeout_seconds)

    async def subscribe(self, subject: str, handler: Handler, queue: str = "") -> NatsSubscription:
        mailbox = Mailbox(subject, handler, self._troubles)
        subscription = NatsSubscription(self, subject, mailbox, queue)
        self._subscriptions[subscription] = None
        if self._connection is not None and self._connection.usable:
            await self._put_on(self._connection, subscription)
        return subscription

    def forget(self, subscription: NatsSubscription) -> None:
        """Do not put `subscription` on further connections."""
        self._subscriptions.pop(subscription, None)

    async def close(self) -> None:
        if self.connected:
            try:
                await self.client.flush(FLUSH_SECONDS)  # type: ignore[arg-type]
            except FAILURES as error:
                log.debug("flushing to NATS before closing: %s", error)
        self._absence = "the bus is closed"
        await self._work.end()
        for subscription in list(self._subscriptions):
            await subscription.close()

    async def _stay_connected(self) -> None:
        """Connect, wait for the end of the connection, and so on until cancelled."""
        pause = FIRST_RETRY_SECONDS
        while True:
            connection = _Connection(self._login, self._complain)
            try:
                await self._open(connection)
                pause = FIRST_RETRY_SECONDS
                await self._use(connection)
            except BusUnavailable as error:
                self._absence = str(error)
                if self._refused and not self._tried.is_set():
                    return  # `connect` raises it
                self._lost(self._absence)
            finally:
                self._tried.set()
                await connection.close()
            await asyncio.sleep(pause)
            pause = min(pause * 2, MAX_RETRY_SECONDS)

    async def _open(self, connection: _Connection) -> None:
        self._refused = False
        try:
            await connection.open(self._name, self._inbox)
            await connection.client.subscribe(f"{self._questions.inbox}.>", cb=self._take_answer)
        except SettingError as error:
            raise BusUnavailable(str(error)) from error
        except (*FAILURES, ValueError) as error:
            raise BusUnavailable(self._explain(error)) from error

    async def _use(self, connection: _Connection) -> None:
        """What happens between connecting and losing the connection."""
        self._connection = connection
        try:
            await self._put_on(connection, *self._subscriptions)
            if connection.usable:
                self._live = True
                self._logged.clear()
                log.info("connected to NATS at %s", self._login)
                self._tell(connected=True)
                self._tried.set()
            await connection.wait_until_ended()
            self._lost(f"lost the connection to NATS at {self._login}")
        finally:
            was_live, self._live, self._connection = self._live, False, None
            self._questions.fail(BusUnavailable(self._absence))
            if was_live:
                self._tell(connected=False)

    async def _put_on(self, connection: _Connection, *subscriptions: NatsSubscription) -> None:
        """Make subscriptions live, and wait until the server knows of them."""
        try:
            for subscription in subscriptions:
                await subscription.attach(connection.client)
            await asyncio.sleep(0)  # our SUBs leave before the PING whose PONG we wait for
            await connection.client.flush(FLUSH_SECONDS)  # type: ignore[arg-type]
        except FAILURES as error:
            # The next connection will have them. This one is spoilt: nats-py stops reading
            # at a PONG for which nobody waits any more.
            log.debug("subscribing: %s", error)
            connection.ended.set()

    async def _take_answer(self, message: Msg) -> None:
        question = self._questions.find(message.subject)
        if question is None:
            return  # too late
        if message.headers and message.headers.get("Status") == "503":
            question.nobody()
        else:
            question.put(message.data)

    def _lost(self, absence: str) -> None:
        """Remember why we are not connected, and say so once per outage."""
        self._absence = absence
        if not self._logged:
            self._troubles.outages += 1
        if not self._logged or (self._refused and True not in self._logged):
            self._logged.add(self._refused)
            log.warning("%s; trying again in the background", absence)

    def _complain(self, error: Exception) -> None:
        self._troubles.errors += 1
        words = _words(error)
        forbidden = _FORBIDDEN.search(words)
        if forbidden is not None:
            self._questions.forbidden(
                forbidden[1], Forbidden(f"NATS at {self._login} does not let us: {words}")
            )
        if words not in self._complaints and len(self._complaints) < MAX_COMPLAINTS_LOGGED:
            self._complaints.add(words)
            log.warning("NATS at %s: %s", self._login, words)

    def _tell(self, *, connected: bool) -> None:
        for listener in list(self._listeners):
            try:
                listener(connected)
            except Exception:  # the one place where listeners are supervised
                log.exception("a listener to the connection failed")

    def _explain(self, error: Exception) -> str:
        words = _words(error)
        if "authorization" in words.lower() or "authentication" in words.lower():
            self._refused = True
            todo = "set" if self._login.anonymous else "check"
            return (
                f"NATS at {self._login} refuses us ({words}): {todo} user and password in "
                f"{URL_SETTING}, or {CREDENTIALS_SETTING}"
            )
        if isinstance(error, ssl.SSLCertVerificationError):
            return (
                f"NATS at {self._login} cannot prove who it is ({error.verify_message}): "
                f"check {CA_SETTING}, and the name in {URL_SETTING}"
            )
        if isinstance(error, ssl.SSLError):
            return (
                f"no TLS with NATS at {self._login} ({words}): "
                f"check {CERTIFICATE_SETTING} and {CA_SETTING}"
            )
        if isinstance(error, _UnfitGreeting):
            return f"NATS at {self._login} {error.what}: {error.todo}"
        certificate = f" and {CERTIFICATE_SETTING}" if self._login.tls.certificate else ""
        return (
            f"no connection to NATS at {self._login} ({words}): check {URL_SETTING}{certificate}, "
            "or start a server there"
        )


def _is_jetstreams(message: Msg) -> bool:
    """Whether it comes from JetStream, which nobody of us asks to say anything here.

    Where its answers go, whoever asks it decides, and no permission limits that: so it would say
    for a node what that one may not say itself.
    """
    return message.reply.startswith("$JS.") or "Nats-Stream" in (message.headers or {})


def _discard(listeners: dict[OnConnection, None], listener: OnConnection) -> None:
    listeners.pop(listener, None)


def _words(error: Exception) -> str:
    """An error's reason in a few words."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error).removeprefix("nats: ").strip("'\" ") or type(error).__name__
