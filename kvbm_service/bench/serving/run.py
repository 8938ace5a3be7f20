"""Carrying a workload out: each seat asks when its time has come, and waits for its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from kvbm_service.bench.serving.client import Asked, Server
from kvbm_service.bench.serving.workload import (
    Conversation,
    Workload,
    answered,
    ask,
    begin,
    seat,
)

OnAsked = Callable[[Asked], None]


async def talk(
    server: Server, workload: Workload, seconds: float, on_asked: OnAsked
) -> tuple[list[Asked], float]:
    """All questions that fall due within `seconds`, and how long it took to have them answered.

    A user whose last answer is not there yet asks as soon as it is: a slow server is asked less.
    `on_asked` hears of each answer.
    """
    began = time.perf_counter()
    done: list[Asked] = []

    async def sit(index: int) -> None:
        conversation: Conversation | None = None
        for turn in seat(workload, index):
            if turn.seconds >= seconds:
                return
            await asyncio.sleep(began + turn.seconds - time.perf_counter())
            now = time.perf_counter() - began
            if now >= seconds:
                return
            if conversation is None or conversation.user != turn.user:
                conversation = begin(workload, turn)
            ask(workload, conversation)
            asked = Asked(user=turn.user, round=turn.number, asked_at=now)
            text, asked = await server.ask(
                conversation.messages, workload.answer_tokens, asked, began
            )
            answered(conversation, text)
            done.append(asked)
            on_asked(asked)

    async with asyncio.TaskGroup() as seats:
        for index in range(workload.users):
            seats.create_task(sit(index))
    done.sort(key=lambda one: one.asked_at)
    return done, time.perf_counter() - began
