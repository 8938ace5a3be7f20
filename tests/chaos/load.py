"""Load: threads that ask the members for answers, and note what came of it."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

from kvbm_service.demo.engine import EngineFailed
from kvbm_service.demo.talk import Answer
from tests.chaos.judges import DEADLINE_SECONDS, Asked
from tests.chaos.member import Member
from tests.chaos.questions import ANSWER_TOKENS, SALTS, Conversation, Question

THREADS_PER_MEMBER = 2
THINKING_SECONDS = 0.5
"""At most, before each question: what else runs on this machine needs its share, too."""
CROWDED_SECONDS = 1.0
"""The same, while an engine starts: that takes all of the cores that it can get."""
HANDED_OVER_SHARE = 0.3
"""Of the questions, another member computes the prompt, and hands it over."""
FORGOTTEN_SHARE = 0.1
"""Of those, nobody ever asks for."""
ABORTED_SHARE = 0.1
LONG_ANSWER_TOKENS = 64
ABORTED_WITHIN_SECONDS = 0.3
LOOK_SECONDS = 0.5
PATIENCE_SECONDS = 3 * DEADLINE_SECONDS
"""What is not answered by then, halts not counted, is given up."""

HandOver = dict[str, Any]
"""`kv_transfer_params` of an answer."""


class Load:
    """Asks all members, again and again, until it is ended. A context manager."""

    def __init__(
        self, members: Sequence[Member], talks: Sequence[Conversation], seed: int = 0
    ) -> None:
        self._members = members
        self._talks = talks
        self._asked: list[Asked] = []
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        self._ended = threading.Event()
        self._idle = threading.Semaphore(0)
        self._threads = [
            threading.Thread(
                target=self._work,
                args=(member, random.Random(f"{seed} {member.name} {number}")),
                name=f"load of {member.name}",
            )
            for member in members
            for number in range(THREADS_PER_MEMBER)
        ]

    def asked(self, start: int = 0) -> list[Asked]:
        """Everything whose fate is known, without the first `start`."""
        with self._lock:
            return self._asked[start:]

    def begin(self) -> None:
        """Go to work."""
        self._wanted.set()

    def pause(self) -> None:
        """Ask no more; returns when every answer has come."""
        self._wanted.clear()
        self._wait_idle()

    def _wait_idle(self) -> None:
        for _ in self._threads:
            self._idle.acquire()

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self._wait_idle()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._wanted.set()
        for thread in self._threads:
            thread.join()

    # -- a thread ----------------------------------------------------------------------------

    def _work(self, member: Member, chooser: random.Random) -> None:
        while not self._ended.is_set():
            if not self._wanted.is_set():
                self._idle.release()
                self._wanted.wait()
                continue
            talk = chooser.choice(self._talks)
            salt = chooser.choice(SALTS)
            for question in talk:
                if not (self._wanted.is_set() and member.wait_up(LOOK_SECONDS)):
                    break
                time.sleep(chooser.uniform(0, self._longest_thought()))
                if chooser.random() < HANDED_OVER_SHARE:
                    told = self._have_prefilled(member, question, salt, chooser)
                    if chooser.random() < FORGOTTEN_SHARE:
                        continue
                else:
                    told = None
                if chooser.random() < ABORTED_SHARE:
                    self._note(self._abort(member, question, salt, told, chooser))
                else:
                    self._note(self._ask(member, question, salt, told))

    def _longest_thought(self) -> float:
        all_up = all(member.up for member in self._members)
        return THINKING_SECONDS if all_up else CROWDED_SECONDS

    def _note(self, asked: Asked) -> None:
        with self._lock:
            self._asked.append(asked)

    def _have_prefilled(
        self, member: Member, question: Question, salt: str | None, chooser: random.Random
    ) -> HandOver | None:
        """Have another member compute the prompt; returns what `member` is to be told."""
        other = chooser.choice([one for one in self._members if one is not member])
        if not other.up:
            return None
        future = other.engine.submit(question.prompt, 1, salt, {"do_remote_decode": True})
        asked, answer = self._wait(other, future, question.is_begun_by)
        self._note(asked)
        return answer.kv_transfer_params if answer else None

    def _ask(
        self, member: Member, question: Question, salt: str | None, told: HandOver | None
    ) -> Asked:
        future = member.engine.submit(question.prompt, ANSWER_TOKENS, salt, told)
        asked, _ = self._wait(member, future, question.is_answered_by)
        return asked

    def _wait(
        self, member: Member, future: Future[Answer], is_right: Callable[[Answer], bool]
    ) -> tuple[Asked, Answer | None]:
        began = time.monotonic()
        while True:
            try:
                answer = future.result(LOOK_SECONDS)
            except TimeoutError:
                now = time.monotonic()
                waited = now - began - member.halted(began, now)
                if waited < PATIENCE_SECONDS and not self._ended.is_set():
                    continue
                future.cancel()
                return Asked(member.name, began, now, False, why_not=f"{waited:.1f} s"), None
            except EngineFailed as error:
                now = time.monotonic()
                time.sleep(LOOK_SECONDS)  # the next one would fail as soon
                return Asked(member.name, began, now, False, why_not=str(error)), None
            return Asked(member.name, began, time.monotonic(), True, is_right(answer)), answer

    def _abort(
        self,
        member: Member,
        question: Question,
        salt: str | None,
        told: HandOver | None,
        chooser: random.Random,
    ) -> Asked:
        began = time.monotonic()
        future = member.engine.submit(question.prompt, LONG_ANSWER_TOKENS, salt, told)
        time.sleep(chooser.uniform(0, ABORTED_WITHIN_SECONDS))
        future.cancel()
        with contextlib.suppress(EngineFailed, CancelledError, TimeoutError):
            future.result(0)
        return Asked(member.name, began, time.monotonic(), False, aborted=True)
