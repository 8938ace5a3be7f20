"""What the load asks, and the right answers: computed beforehand, without any cache."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from kvbm_service.demo.engine import BLOCK_TOKENS
from kvbm_service.demo.model import VOCABULARY
from kvbm_service.demo.talk import Answer
from tests.integration.conftest import Reference
from tests.integration.node import same

BOOKS, READERS, TURNS = 5, 3, 3
BOOK_BLOCKS, OPENING_BLOCKS = 4, 2
REPLY_TOKENS = 40
ANSWER_TOKENS = 8
SALTS = (None, None, "one tenant", "another tenant")
"""The right answer is the same under each; the blocks are not."""


class Question(NamedTuple):
    """A prompt and its right answer."""

    prompt: tuple[int, ...]
    right: Answer

    def is_answered_by(self, answer: Answer) -> bool:
        """Whether this is the right answer."""
        return same(answer, self.right)

    def is_begun_by(self, answer: Answer) -> bool:
        """Whether this is the first token of the right answer."""
        right = self.right
        first = msgspec.structs.replace(right, tokens=right.tokens[:1], logprobs=right.logprobs[:1])
        return same(answer, first)


Conversation = Sequence[Question]
"""Questions of which each goes on where the answer to the one before has ended."""


def conversations(reference: Reference, seed: int = 0) -> list[Conversation]:
    """Readers talk about books: those of one book share its blocks. The same for each seed."""
    chooser = random.Random(seed)
    talks: list[Conversation] = []
    for _ in range(BOOKS):
        book = _words(chooser, BOOK_BLOCKS * BLOCK_TOKENS)
        for _ in range(READERS):
            said = book + _words(chooser, OPENING_BLOCKS * BLOCK_TOKENS + BLOCK_TOKENS // 2)
            talk = []
            for _ in range(TURNS):
                right = reference.answer(said, ANSWER_TOKENS)
                talk.append(Question(tuple(said), right))
                said = said + right.tokens + _words(chooser, REPLY_TOKENS)
            talks.append(talk)
    return talks


def _words(chooser: random.Random, tokens: int) -> list[int]:
    return [chooser.randrange(VOCABULARY // 2) for _ in range(tokens)]
