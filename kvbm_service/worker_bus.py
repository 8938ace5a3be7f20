"""What a worker does on the bus: its record in the directory, and what is done for others' sake."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from kvbm_schemas.codec import Decoder, Malformed, encode
from kvbm_schemas.records import RankRecord
from kvbm_schemas.step import Expect, Fetch, Lend, Moved
from kvbm_schemas.subjects import Scope, rank_what
from kvbm_service.adapters.bus import Bus, Delivery
from kvbm_service.errors import BusError
from kvbm_service.network import Connect
from kvbm_service.presence import join, stop_if_cancelled

_log = logging.getLogger(__name__)

MAX_UNANSWERED = 256
"""Orders whose outcome is still to be told. Beyond, nothing is said, and the leader asks again."""

ExpectReaders = Callable[[float], None]
"""Is told for how many seconds."""

CarryOut = Callable[[Fetch | Lend, Callable[[Moved], None]], bool]
"""Whether what it was given will be told of the outcome."""


class WorkerBus:
    """One rank's presence among the others, on a loop of its own."""

    def __init__(
        self,
        record: RankRecord,
        scope: Scope,
        connect: Connect,
        carry_out: CarryOut,
        expect_readers: ExpectReaders,
    ) -> None:
        self._record = record
        self._scope = scope
        self._connect = connect
        self._carry_out = carry_out
        self._expect_readers = expect_readers
        self._answers: asyncio.Queue[tuple[str, Moved]] = asyncio.Queue(MAX_UNANSWERED)
        self._unanswered = 0
        """Orders that were told by the bus, and of which the bus has not been told yet."""
        self.rejected = 0
        """Messages that were no order."""

    async def run(self) -> None:
        """Keep the rank in the directory, whenever that can be reached; until cancelled."""
        network = await self._connect()
        try:
            subject = self._scope.of(self._record.node, rank_what(self._record.rank))
            await network.bus.subscribe(subject, self._on_order)
            key = ".".join([*self._scope, self._record.node, str(self._record.rank)])
            membership, _ = await join(network, key, lambda _: encode(self._record))
            try:
                stop_if_cancelled()
                await self._answer(network.bus)
            finally:
                await membership.leave()
        finally:
            await network.close()

    async def _on_order(self, delivery: Delivery) -> None:
        try:
            order = _orders.decode(delivery.payload)
        except Malformed as error:
            if not self.rejected:
                _log.warning("rejected a message on %s: %s (said once)", delivery.subject, error)
            self.rejected += 1
            return
        if order.instance != self._record.instance:
            return  # of another life of this node, or of another engine that claims its name
        if isinstance(order, Expect):
            self._expect_readers(order.seconds)
        elif delivery.reply:
            self._begin(order, delivery.reply)

    def _begin(self, order: Fetch | Lend, reply: str) -> None:
        if self._unanswered >= MAX_UNANSWERED:
            return
        loop = asyncio.get_running_loop()

        def tell(moved: Moved) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._put, reply, moved)

        self._unanswered += self._carry_out(order, tell)

    def _put(self, reply: str, moved: Moved) -> None:
        self._unanswered -= 1
        if not self._answers.full():
            self._answers.put_nowait((reply, moved))

    async def _answer(self, bus: Bus) -> None:
        while True:
            reply, moved = await self._answers.get()
            with contextlib.suppress(BusError):  # the leader asks again, by the engine's step
                await bus.publish(reply, encode(moved))


_orders: Decoder[Fetch | Lend | Expect] = Decoder(Fetch | Lend | Expect)  # type: ignore[arg-type]
