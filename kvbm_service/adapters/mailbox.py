"""What every bus adapter does with what has arrived: hand it to handlers, or to whoever asked."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from kvbm_schemas.subjects import INBOXES
from kvbm_service.adapters.background import Background
from kvbm_service.adapters.bus import Delivery, Handler, Troubles
from kvbm_service.errors import BusError, NoAnswer

MAX_WAITING_MESSAGES = 65_536
"""Messages that may wait for one handler. Further ones are dropped and counted."""
MAX_WAITING_BYTES = 64 << 20
"""Bytes that may wait for one handler, likewise."""
MAX_WAITING_ANSWERS = 4_096
"""Answers that may wait for one asker, likewise."""

log = logging.getLogger(__name__)


class Mailbox:
    """One subscription's messages on their way to its handler: in order, one at a time."""

    def __init__(self, subject: str, handler: Handler, troubles: Troubles) -> None:
        self._subject = subject
        self._handler = handler
        self._troubles = troubles
        self._waiting: asyncio.Queue[Delivery] = asyncio.Queue(MAX_WAITING_MESSAGES)
        self._waiting_bytes = 0
        self._dropping = False
        self._closed = False
        self._work = Background(self._handle_all(), f"handler of {subject}")

    def put(self, delivery: Delivery) -> None:
        """Queue a message for the handler, or drop it when too many wait already."""
        if self._closed:
            return
        if delivery.reply and not delivery.reply.startswith(INBOXES):
            # Whoever asks chooses where the answer goes, and a server lets us answer anywhere:
            # answered elsewhere, a question would have us publish what only we may publish.
            delivery = delivery._replace(reply="")
        size = len(delivery.payload)
        if self._waiting.full() or self._waiting_bytes + size > MAX_WAITING_BYTES:
            self._drop()
            return
        self._waiting_bytes += size
        self._waiting.put_nowait(delivery)

    async def close(self) -> None:
        """Drop what waits, and stop the handler unless this is called from within it."""
        self._closed = True
        await self._work.end()

    async def _handle_all(self) -> None:
        while not self._closed:
            delivery = await self._waiting.get()
            self._waiting_bytes -= len(delivery.payload)
            if self._waiting.empty():
                self._dropping = False
            try:
                await self._handler(delivery)
            except Exception:  # the one place where handlers are supervised
                self._troubles.errors += 1
                log.exception("handler of %s failed on %s", self._subject, delivery.subject)

    def _drop(self) -> None:
        self._troubles.dropped += 1
        if not self._dropping:
            self._dropping = True
            log.warning(
                "messages on %s arrive faster than they are handled: dropping some (%d so far)",
                self._subject,
                self._troubles.dropped,
            )


class Question:
    """A request under way: where its answers go, and those that have come."""

    def __init__(self, address: str, subject: str) -> None:
        self.address = address
        self.subject = subject
        self._answers: asyncio.Queue[bytes | BusError] = asyncio.Queue(MAX_WAITING_ANSWERS)

    async def answer(self, timeout_seconds: float) -> bytes:
        """The next answer.

        Raises:
            BusUnavailable: the connection was lost meanwhile.
            NoAnswer: nobody listens there, or none came in time.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                answer = await self._answers.get()
        except TimeoutError:
            raise NoAnswer(f"no answer on {self.subject} within {timeout_seconds:g} s") from None
        if isinstance(answer, BusError):
            raise answer
        return answer

    def nobody(self) -> None:
        """Nobody listens where this was asked."""
        self.put(NoAnswer(f"nobody listens on {self.subject}"))

    def put(self, answer: bytes | BusError) -> None:
        """An answer, or the reason why none will come."""
        if not self._answers.full():
            self._answers.put_nowait(answer)


class Questions:
    """The requests of one bus that wait for answers. Addresses are `<inbox>.<number>`."""

    def __init__(self, inbox: str) -> None:
        self.inbox = inbox
        self._numbers = itertools.count(1)
        self._open: dict[str, Question] = {}

    @contextmanager
    def ask(self, subject: str) -> Iterator[Question]:
        """A new question, forgotten at the end of the block."""
        question = Question(f"{self.inbox}.{next(self._numbers)}", subject)
        self._open[question.address] = question
        try:
            yield question
        finally:
            del self._open[question.address]

    def find(self, address: str) -> Question | None:
        """Who waits at `address`, if anyone still does."""
        return self._open.get(address)

    def forbidden(self, subject: str, error: BusError) -> None:
        """Nothing that is asked on `subject` (in any case) reaches anyone."""
        for question in self._open.values():
            if question.subject.lower() == subject.lower():
                question.put(error)

    def fail(self, error: BusError) -> None:
        """No answer will come to any of them."""
        for question in self._open.values():
            question.put(error)
