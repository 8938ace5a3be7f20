"""A bus within one event loop: for tests, simulations, and single processes.

Buses made on the same `Hub` hear each other. `cut` takes one off it, as a lost connection
would; `heal` puts it back.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from functools import partial

from kvbm_service.adapters.bus import Delivery, Handler, OnConnection, Troubles
from kvbm_service.adapters.mailbox import Mailbox, Questions
from kvbm_service.errors import BusError, BusUnavailable

MAX_PAYLOAD_BYTES = 1 << 20
"""As nats-server has it by default."""

_numbers = itertools.count(1)


def matches(pattern: str, subject: str) -> bool:
    """Whether `pattern`, with `*` for one token and a final `>` for all others, hears `subject`."""
    wanted = pattern.split(".")
    tokens = subject.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(tokens) <= len(wanted):
            return False
        tokens = tokens[: len(wanted)]
    return len(wanted) == len(tokens) and all(
        want in ("*", token) for want, token in zip(wanted, tokens, strict=True)
    )


class MemorySubscription:
    """One handler's interest in a pattern."""

    def __init__(self, bus: MemoryBus, pattern: str, mailbox: Mailbox, queue: str) -> None:
        self.bus = bus
        self.pattern = pattern
        self.mailbox = mailbox
        self.queue = queue

    async def close(self) -> None:
        self.bus.hub.subscriptions.pop(self, None)
        await self.mailbox.close()


class Hub:
    """What the buses of one event loop have in common."""

    def __init__(self) -> None:
        self.subscriptions: dict[MemorySubscription, None] = {}
        """In the order made."""
        self.questions: dict[str, Questions] = {}
        self._turn = itertools.count()

    def route(self, delivery: Delivery) -> bool:
        """Hand a message to all that should hear it. False if nobody does."""
        inbox = delivery.subject.rsplit(".", 3)[0]
        if inbox in self.questions:
            question = self.questions[inbox].find(delivery.subject)
            if question is not None:
                question.put(delivery.payload)
            return True
        groups: dict[tuple[str, str], list[MemorySubscription]] = defaultdict(list)
        heard = False
        for each in list(self.subscriptions):
            if not each.bus.connected or not matches(each.pattern, delivery.subject):
                continue
            heard = True
            if each.queue:
                groups[each.pattern, each.queue].append(each)
            else:
                each.mailbox.put(delivery)
        for members in groups.values():
            members[next(self._turn) % len(members)].mailbox.put(delivery)
        return heard


class MemoryBus:
    """The `Bus` port on a `Hub`."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self._connected = True
        self._closed = False
        self._troubles = Troubles()
        self._listeners: dict[OnConnection, None] = {}
        self._questions = Questions(f"_INBOX.{next(_numbers)}")
        hub.questions[self._questions.inbox] = self._questions

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def troubles(self) -> Troubles:
        return self._troubles

    def on_connection(self, listener: OnConnection) -> Callable[[], None]:
        self._listeners[listener] = None
        return partial(self._listeners.pop, listener, None)

    def cut(self) -> None:
        """Lose the connection: nothing gets in or out until `heal`."""
        if self._connected:
            self._troubles.outages += 1
            self._turn(connected=False)

    def heal(self) -> None:
        """Have the connection again."""
        if not self._connected and not self._closed:
            self._turn(connected=True)

    async def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        self._send(Delivery(subject, payload, reply))

    async def request(self, subject: str, payload: bytes, timeout_seconds: float) -> bytes:
        with self._questions.ask(subject) as question:
            if not self._send(Delivery(subject, payload, question.address)):
                question.nobody()
            return await question.answer(timeout_seconds)

    async def request_many(
        self, subject: str, payload: bytes, timeout_seconds: float
    ) -> AsyncGenerator[bytes, None]:
        with self._questions.ask(subject) as question:
            if not self._send(Delivery(subject, payload, question.address)):
                question.nobody()
            while True:
                yield await question.answer(timeout_seconds)

    async def subscribe(
        self, subject: str, handler: Handler, queue: str = ""
    ) -> MemorySubscription:
        mailbox = Mailbox(subject, handler, self._troubles)
        subscription = MemorySubscription(self, subject, mailbox, queue)
        self.hub.subscriptions[subscription] = None
        return subscription

    async def close(self) -> None:
        self._closed = True
        if self._connected:
            self._turn(connected=False)
        self.hub.questions.pop(self._questions.inbox, None)
        for subscription in [each for each in self.hub.subscriptions if each.bus is self]:
            await subscription.close()

    def _send(self, delivery: Delivery) -> bool:
        if not self._connected:
            raise BusUnavailable("the bus is cut off")
        if len(delivery.payload) > MAX_PAYLOAD_BYTES:
            raise BusError(
                f"a message of {len(delivery.payload)} bytes on {delivery.subject} is larger "
                f"than the {MAX_PAYLOAD_BYTES} the bus takes"
            )
        return self.hub.route(delivery)

    def _turn(self, *, connected: bool) -> None:
        self._connected = connected
        if not connected:
            self._questions.fail(BusUnavailable("the bus was cut off while waiting"))
        for listener in list(self._listeners):
            listener(connected)
