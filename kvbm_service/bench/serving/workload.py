"""Who asks what and when: pure, the same for the same parameters.

There are so many seats, and on each a user who asks a question every now and then: all together
`qps` of them per second. A conversation begins with what all users share, then a long text of
this user's own, then question after question, each with all answers so far before it. After its
rounds a user leaves, and a new one takes the seat. Those who sit there at the beginning leave
earlier, one after the other: so there are old and young conversations from the first minute on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

QUESTION_WORDS = 12
_TEXT = (
    "about after again air all along also answer any around ask back because before began "
    "below book both bring call change city close could country course cut day does door "
    "down draw early earth end enough even every eye face family far feet find fire first "
    "follow food form found friend garden give good great ground grow hand hard head hear "
    "help here high home house idea keep kind know land large last late learn leave left "
    "letter life light line listen little long look made make many mark mean might mile "
    "mother mountain move much music name near need never next night nothing number often "
    "oil old once only open order other own page paper part people place plant play point "
    "press quick quiet reach read rest river road room run said same school sea second "
    "seem sentence set ship short show side simple sleep small song soon sound space "
    "spell stand star start stay still stone stop story street strong study such sun "
    "table take talk tell these thing think though thought three time together took town "
    "travel tree true turn under until voice walk warm watch water while white whole wind "
    "window wonder wood word work world write year young "
)
_WORDS = _TEXT.split()
"""Of which most vocabularies make one token each."""


@dataclass(frozen=True)
class Workload:
    """How many talk, about how much, how fast. A word is about a token."""

    users: int = 15
    rounds: int = 20
    qps: float = 1.0
    system_words: int = 1000
    history_words: int = 20_000
    question_words: int = QUESTION_WORDS
    answer_tokens: int = 100
    seed: int = 0

    @property
    def pause_seconds(self) -> float:
        """Between two questions of one user."""
        return self.users / self.qps


@dataclass
class Conversation:
    """One user's. `messages` is what the next request holds, as OpenAI's interface has it."""

    user: int
    rounds: int
    messages: list[dict[str, str]] = field(default_factory=list)
    asked: int = 0

    @property
    def over(self) -> bool:
        """Whether the user has asked everything."""
        return self.asked >= self.rounds


class Turn(NamedTuple):
    """The `number`-th question of a user, counted from 0, at `seconds` after the beginning."""

    user: int
    rounds: int
    number: int
    seconds: float


def seat(workload: Workload, index: int) -> Iterator[Turn]:
    """All questions from one seat, for ever; the first users have fewer rounds left."""
    user, rounds = index, workload.rounds - workload.rounds * index // workload.users
    seconds = index / workload.qps
    while True:
        for number in range(rounds):
            yield Turn(user, rounds, number, seconds)
            seconds += workload.pause_seconds
        user, rounds = user + workload.users, workload.rounds


def begin(workload: Workload, turn: Turn) -> Conversation:
    """What a user has to say before the first question."""
    shared = _text(workload, "everybody", workload.system_words)
    own = _text(workload, f"user {turn.user}", workload.history_words)
    conversation = Conversation(turn.user, turn.rounds)
    if shared:
        conversation.messages.append({"role": "system", "content": shared})
    if own:
        conversation.messages.append({"role": "user", "content": own})
        conversation.messages.append({"role": "assistant", "content": "I have read it."})
    return conversation


def ask(workload: Workload, conversation: Conversation) -> None:
    """Add the next question."""
    about = f"user {conversation.user}, question {conversation.asked}"
    question = _text(workload, about, workload.question_words)
    conversation.messages.append({"role": "user", "content": f"{question}?"})
    conversation.asked += 1


def answered(conversation: Conversation, text: str) -> None:
    """Add what the model said."""
    conversation.messages.append({"role": "assistant", "content": text})


def _text(workload: Workload, about: str, words: int) -> str:
    chooser = random.Random(f"{workload.seed}/{about}")
    return " ".join(chooser.choices(_WORDS, k=words))
