"""The bus port: publish, subscribe, request.

Delivery is at most once, in order per subject while connected; loss is what
(epoch, seq) is there to notice. Handlers run on the bus's event loop, one message at a time
per subscription; an exception in one is logged and does not end the subscription.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Delivery(NamedTuple):
    """A message as it arrived.

    `reply` is where an answer goes: an inbox (`kvbm_schemas.subjects`), or empty.
    """

    subject: str
    payload: bytes
    reply: str = ""


Handler = Callable[[Delivery], Awaitable[None]]
OnConnection = Callable[[bool], None]


@dataclass(slots=True)
class Troubles:
    """What went wrong on a bus since it was made."""

    errors: int = 0
    """Exceptions in handlers, and complaints of the server."""
    dropped: int = 0
    """Messages thrown away because their handler was too slow."""
    outages: int = 0
    """How often the connection was lost, or could not be made at first."""


class Subscription(Protocol):
    """Ends with `close`."""

    async def close(self) -> None: ...


class Bus(Protocol):
    """A connection to the message bus."""

    @property
    def connected(self) -> bool:
        """Whether messages can get through right now."""
        ...

    @property
    def troubles(self) -> Troubles:
        """Counters, for metrics."""
        ...

    def on_connection(self, listener: OnConnection) -> Callable[[], None]:
        """Call `listener` with every change of `connected`; the result takes it off again.

        By the time it hears True, all subscriptions are live again.
        """
        ...

    async def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        """Send, without waiting for anyone to receive.

        Raises:
            BusUnavailable: not connected. Nothing is kept for later.
            BusError: `payload` is larger than the server takes.
        """
        ...

    async def request(self, subject: str, payload: bytes, timeout_seconds: float) -> bytes:
        """Send and wait for one answer.

        Raises:
            BusUnavailable: not connected, or disconnected while waiting.
            Forbidden: we may not publish there.
            BusError: `payload` is larger than the server takes.
            NoAnswer: nobody subscribes to `subject`, or none answered in time.
        """
        ...

    def request_many(
        self, subject: str, payload: bytes, timeout_seconds: float
    ) -> AsyncGenerator[bytes, None]:
        """Send and iterate over the answers; the caller stops when it has seen enough.

        `timeout_seconds` is the longest wait for each further answer.

        Raises:
            As `request`, also between two answers.
        """
        ...

    async def subscribe(self, subject: str, handler: Handler, queue: str = "") -> Subscription:
        """Call `handler` for each message on `subject` (wildcards `*` and `>` allowed).

        Of the subscribers with the same `queue`, each message goes to one. What anyone
        publishes after this has returned arrives; made while disconnected, the
        subscription becomes live on connecting. Survives reconnects.
        """
        ...

    async def close(self) -> None:
        """Flush what was published, end all subscriptions, disconnect."""
        ...
