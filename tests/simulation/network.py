"""The simulated bus: what is sent arrives late, out of order, twice, or never.

Places have names. Messages go through the real codec, so each one is also tried as bytes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Protocol

from kvbm_schemas.codec import AnyMessage, Decoder, Wire, encode
from kvbm_schemas.message import Message
from tests.simulation.timeline import Process, Timeline
from tests.simulation.weather import Weather

Answer = Callable[[Message], None]
"""Sends a message back to whoever asked."""

_decoder: Decoder[Message] = Decoder(AnyMessage)  # type: ignore[arg-type]


class Place(Protocol):
    """Somebody on the bus."""

    name: str
    process: Process

    @property
    def online(self) -> bool: ...

    def receive(self, sender: str, message: Message, answer: Answer) -> None: ...


class Network:
    """All places, and what stands between them."""

    def __init__(self, timeline: Timeline, chance: random.Random, weather: Weather) -> None:
        self._timeline = timeline
        self._wire = Process()
        self._chance = chance
        self.weather = weather
        self.places: dict[str, Place] = {}
        self.cut: set[frozenset[str]] = set()
        """Pairs that cannot hear each other."""
        self.sent: dict[str, int] = {}
        """How many messages of each type were sent."""

    def send(self, sender: Place, target: str, message: Message) -> None:
        """Say something to `target`, which need not be there."""
        self._deliver(sender, target, message, lambda _: None)

    def ask(
        self,
        sender: Place,
        target: str,
        message: Message,
        patience: float,
        then: Callable[[Message | None], None],
    ) -> None:
        """Ask for one answer; `then` gets the first, or None when there is none in time."""
        waiting = [True]

        def settle(answer: Message | None) -> None:
            if waiting:
                waiting.clear()
                then(answer)

        self._timeline.after(patience, sender.process, lambda: settle(None))
        self._deliver(sender, target, message, settle)

    def ask_many(self, sender: Place, target: str, message: Message, then: Answer) -> None:
        """Ask; `then` gets every answer."""
        self._deliver(sender, target, message, then)

    def reachable(self, one: str, other: str) -> bool:
        """Whether nothing stands between two places."""
        return frozenset((one, other)) not in self.cut

    def _deliver(self, sender: Place, target: str, message: Message, hear: Answer) -> None:
        kind = type(message).__name__
        self.sent[kind] = self.sent.get(kind, 0) + 1
        self._carry(sender, target, message, lambda place, arrived: place.receive(
            sender.name, arrived, lambda answer: self._reply(place, sender, answer, hear)
        ))  # fmt: skip

    def _reply(self, sender: Place, asker: Place, message: Message, hear: Answer) -> None:
        """Bring an answer back; only to the very process that asked."""

        def hand_over(place: Place, answer: Message) -> None:
            if place is asker:
                hear(answer)

        self._carry(sender, asker.name, message, hand_over)

    def _carry(
        self, sender: Place, target: str, message: Message,
        hand_over: Callable[[Place, Message], None],
    ) -> None:  # fmt: skip
        place = self.places.get(target)
        if place is None or not (sender.online and place.online):
            return
        if not self.reachable(sender.name, target):
            return
        weather, chance = self.weather, self._chance
        arrived = _decoder.decode(encode(message, Wire.MSGPACK))
        copies = 1 + (chance.random() < weather.duplication) - (chance.random() < weather.loss)
        for _ in range(copies):
            delay = weather.longest_delay * (chance.random() if not weather.calm else 1.0)
            self._timeline.after(
                delay, self._wire, lambda: self._arrive(target, arrived, hand_over)
            )

    def _arrive(
        self, target: str, message: Message, hand_over: Callable[[Place, Message], None]
    ) -> None:
        """It reaches whoever has the name by now."""
        place = self.places[target]
        self._timeline.after(0.0, place.process, lambda: hand_over(place, message))
