"""What every bus adapter does with what has arrived: hand it to handlers, or to whoever asked."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvbm_schemas.subjects import INBOXES, asked
from kvbm_service.adapters.background import Background
from kvbm_service.adapters.bus import Delivery, Handler, Troubles
from kvbm_service.adapters.lines import Lines
from kvbm_service.errors import BusError, NoAnswer

MAX_WAITING_MESSAGES = 65_536
"""Messages that may wait for one handler. Further ones are dropped and counted."""
MAX_WAITING_BYTES = 64 << 20
"""Bytes that may wait for one handler, likewise."""
MAX_SHARE_OF_ONE = 0.125
"""Of both, what one subject may have where a subscription has many."""
TURN_SECONDS = 0.001
"""How long a flood is taken in before other tasks get a turn."""
MAX_WAITING_ANSWERS = 4_096
"""Answers that may wait for one asker. Further ones are dropped, logged once for each asker."""
MAX_WAITING_ANSWER_BYTES = 64 << 20
"""Bytes that may wait for one asker, likewise."""

log = logging.getLogger(__name__)


class Turn:
    """How long one task has had its loop for itself: many messages are no reason to keep it."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Others have just had theirs."""
        self._ends_at = time.monotonic() + TURN_SECONDS

    @property
    def is_over(self) -> bool:
        """Whether it is time to let others go on."""
        return time.monotonic() >= self._ends_at


class Mailbox:
    """One subscription's messages on their way to its handler: one at a time.

    Those on one subject come in order; where they come on many, each subject has its turn, so
    that whoever floods one delays and loses nothing that comes on the others.
    """

    def __init__(self, subject: str, handler: Handler, troubles: Troubles) -> None:
        self._subject = subject
        self._handler = handler
        self._troubles = troubles
        share = MAX_SHARE_OF_ONE if subject.endswith(">") or "*" in subject else 1.0
        self._waiting: Lines[Delivery] = Lines(MAX_WAITING_MESSAGES, MAX_WAITING_BYTES, share)
        self._arrived = asyncio.Event()
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
        if self._waiting.put(delivery.subject, delivery, len(delivery.payload)):
            self._arrived.set()
        else:
            self._drop()

    async def close(self) -> None:
        """Drop what waits, and stop the handler unless this is called from within it."""
        self._closed = True
        await self._work.end()

    async def _handle_all(self) -> None:
        turn = Turn()
        while not self._closed:
            if not self._waiting:
                self._dropping = False
                self._arrived.clear()
                await self._arrived.wait()
                turn.begin()
                continue
            delivery = self._waiting.take()
            try:
                await self._handler(delivery)
            except Exception:  # the one place where handlers are supervised
                self._troubles.errors += 1
                log.exception("handler of %s failed on %s", self._subject, delivery.subject)
            if turn.is_over:
                await asyncio.sleep(0)
                turn.begin()

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
        self._waiting_bytes = 0
        self._dropping = False

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
        self._waiting_bytes -= len(answer)
        return answer

    def nobody(self) -> None:
        """Nobody listens where this was asked."""
        self.put(NoAnswer(f"nobody listens on {self.subject}"))

    def put(self, answer: bytes | BusError) -> None:
        """An answer, or the reason why none will come."""
        size = 0 if isinstance(answer, BusError) else len(answer)
        if self._answers.full() or self._waiting_bytes + size > MAX_WAITING_ANSWER_BYTES:
            self._drop()
            return
        self._waiting_bytes += size
        self._answers.put_nowait(answer)

    def _drop(self) -> None:
        if not self._dropping:
            self._dropping = True
            log.warning("answers on %s come faster than they are read: dropping some", self.subject)


class Questions:
    """The requests of one bus that wait for answers. Addresses are `<inbox>.<asked>.<number>`."""

    def __init__(self, inbox: str) -> None:
        self.inbox = inbox
        self._numbers = itertools.count(1)
        self._open: dict[str, Question] = {}

    @contextmanager
    def ask(self, subject: str) -> Iterator[Question]:
        """A new question, forgotten at the end of the block."""
        question = Question(f"{self.inbox}.{asked(subject)}.{next(self._numbers)}", subject)
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
