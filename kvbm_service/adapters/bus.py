"""The bus port: publish, subscribe, request. And the in-memory adapter.

Delivery is at most once, in order per subscription while connected; loss is what
(epoch, seq) is there to notice. Handlers run on the bus's event loop, one message at a time
per subscription; an exception in one is logged and does not end the subscription.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple, Protocol


class Delivery(NamedTuple):
    """A message as it arrived. `reply` is where an answer goes, or empty."""

    subject: str
    payload: bytes
    reply: str = ""


Handler = Callable[[Delivery], Awaitable[None]]


class Subscription(Protocol):
    """Ends with `close`."""

    async def close(self) -> None: ...


class Bus(Protocol):
    """A connection to the message bus."""

    @property
    def connected(self) -> bool:
        """Whether messages can get through right now."""
        ...

    async def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        """Send, without waiting for anyone to receive.

        Raises:
            BusUnavailable: not connected. Nothing is kept for later.
        """
        ...

    async def request(self, subject: str, payload: bytes, timeout_seconds: float) -> bytes:
        """Send and wait for one answer.

        Raises:
            BusUnavailable: not connected.
            NoAnswer: nobody subscribes to `subject`, or none answered in time.
        """
        ...

    def request_many(
        self, subject: str, payload: bytes, timeout_seconds: float
    ) -> AsyncIterator[bytes]:
        """Send and iterate over the answers; the caller stops when it has seen enough.

        `timeout_seconds` is the longest wait for each further answer.

        Raises:
            BusUnavailable: not connected.
            NoAnswer: as for `request`, also between two answers.
        """
        ...

    async def subscribe(self, subject: str, handler: Handler, queue: str = "") -> Subscription:
        """Call `handler` for each message on `subject` (wildcards `*` and `>` allowed).

        Of the subscribers with the same `queue`, each message goes to one.
        Survives reconnects.
        """
        ...

    async def close(self) -> None:
        """Flush what was published, end all subscriptions, disconnect."""
        ...
