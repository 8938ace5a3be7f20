"""Load: threads that ask the members for answers, and note what came of it."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError

from kvbm_service.demo.engine import EngineFailed
from tests.chaos.judges import DEADLINE_SECONDS, Asked
from tests.chaos.member import Member
from tests.chaos.questions import ANSWER_TOKENS, SALTS, Conversation, Question

THREADS_PER_MEMBER = 2
THINKING_SECONDS = 0.5
"""At most, before each question: what else runs on this machine needs its share, too."""
CROWDED_SECONDS = 1.0
"""The same, while an engine starts: that takes all of the cores that it can get."""
ABORTED_SHARE = 0.1
LONG_ANSWER_TOKENS = 64
ABORTED_WITHIN_SECONDS = 0.3
LOOK_SECONDS = 0.5
PATIENCE_SECONDS = 3 * DEADLINE_SECONDS
"""What is not answered by then, halts not counted, is given up."""


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
                if chooser.random() < ABORTED_SHARE:
                    self._note(self._abort(member, question, salt, chooser))
                else:
                    self._note(self._ask(member, question, salt))

    def _longest_thought(self) -> float:
        all_up = all(member.up for member in self._members)
        return THINKING_SECONDS if all_up else CROWDED_SECONDS

    def _note(self, asked: Asked) -> None:
        with self._lock:
            self._asked.append(asked)

    def _ask(self, member: Member, question: Question, salt: str | None) -> Asked:
        began = time.monotonic()
        future = member.engine.submit(question.prompt, ANSWER_TOKENS, salt)
        while True:
            try:
                answer = future.result(LOOK_SECONDS)
            except TimeoutError:
                now = time.monotonic()
                waited = now - began - member.halted(began, now)
                if waited < PATIENCE_SECONDS and not self._ended.is_set():
                    continue
                future.cancel()
                return Asked(member.name, began, now, False, why_not=f"{waited:.1f} s")
            except EngineFailed as error:
                time.sleep(LOOK_SECONDS)  # the next one would fail as soon
                return Asked(member.name, began, time.monotonic(), False, why_not=str(error))
            right = question.is_answered_by(answer)
            return Asked(member.name, began, time.monotonic(), True, right)

    def _abort(
        self, member: Member, question: Question, salt: str | None, chooser: random.Random
    ) -> Asked:
        began = time.monotonic()
        future = member.engine.submit(question.prompt, LONG_ANSWER_TOKENS, salt)
        time.sleep(chooser.uniform(0, ABORTED_WITHIN_SECONDS))
        future.cancel()
        with contextlib.suppress(EngineFailed, CancelledError, TimeoutError):
            future.result(0)
        return Asked(member.name, began, time.monotonic(), False, aborted=True)
