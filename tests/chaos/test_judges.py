"""The judges: whatever must not be is noticed."""

from __future__ import annotations

import json
from collections import Counter

from kvbm_schemas.block import Tier
from kvbm_schemas.records import TierStatus
from kvbm_schemas.requests import Holder
from kvbm_service.demo.talk import Answer
from tests.chaos.judges import DEADLINE_SECONDS, Asked, Verdict, disagreement, heal, judge, leaked
from tests.chaos.questions import Question
from tests.chaos.report import last_line, passed
from tests.chaos.trial import Result

LONG = DEADLINE_SECONDS + 1.0
ONE, OTHER = b"1" * 16, b"2" * 16
QUESTION = Question((1, 2, 3), Answer(0, [4, 5], [-0.5, -1.5], 0, 0.1, 0.1))


def asked(seconds: float, answered: bool = True, right: bool = True) -> Asked:
    return Asked("ann", 100.0, 100.0 + seconds, answered, right)


def held(*copies: tuple[bytes, Tier]) -> dict[str, set[tuple[bytes, Tier]]]:
    return {"ann": set(copies), "bob": set()}


def test_an_answer_is_right_only_if_every_token_and_its_likelihood_are() -> None:
    assert QUESTION.is_answered_by(Answer(9, [4, 5], [-0.5, -1.5], 64, 0.2, 0.2))
    assert not QUESTION.is_answered_by(Answer(9, [4, 6], [-0.5, -1.5], 64, 0.2, 0.2))
    assert not QUESTION.is_answered_by(Answer(9, [4, 5], [-0.5, -1.4], 64, 0.2, 0.2))


def test_a_wrong_answer_is_wrong_whatever_befell_the_engine() -> None:
    assert judge(asked(1.0, right=False), 1.0, struck=True) is Verdict.WRONG


def test_an_answer_after_the_deadline_is_late_unless_the_engine_was_halted_meanwhile() -> None:
    assert judge(asked(LONG), 0.0, struck=False) is Verdict.LATE
    assert judge(asked(LONG), 0.0, struck=True) is Verdict.LATE
    assert judge(asked(LONG), 2.0, struck=True) is Verdict.RIGHT


def test_a_request_may_only_be_lost_with_its_engine_and_not_long_after() -> None:
    assert judge(asked(1.0, answered=False), 0.0, struck=False) is Verdict.LOST
    assert judge(asked(1.0, answered=False), 0.5, struck=True) is Verdict.STRUCK
    assert judge(asked(LONG, answered=False), 0.5, struck=True) is Verdict.LOST


def test_a_pinned_slot_is_a_leak_and_so_is_one_that_nobody_knows_to_hold() -> None:
    blocks = {(ONE, Tier.HOST), (OTHER, Tier.HOST), (ONE, Tier.DISK)}

    def tiers(used: int, pinned: int) -> list[TierStatus]:
        disk = TierStatus(Tier.DISK, capacity=8, used=1, pinned=0)
        return [TierStatus(Tier.HOST, capacity=8, used=used, pinned=pinned), disk]

    assert leaked(tiers(used=2, pinned=0), blocks) == 0
    assert leaked(tiers(used=2, pinned=1), blocks) == 1
    assert leaked(tiers(used=4, pinned=0), blocks) == 2


def test_a_registry_that_says_more_or_less_than_the_nodes_is_noticed() -> None:
    said = [(Holder("ann", Tier.HOST),), ()]
    host = held((ONE, Tier.HOST))
    both = held((ONE, Tier.HOST), (OTHER, Tier.DISK))
    assert disagreement([ONE, OTHER], said, host, host) == ""
    assert "not known" in disagreement([ONE, OTHER], said, both, both)
    assert "is said" in disagreement([ONE, OTHER], said, held(), held())
    assert "is said" in disagreement([ONE], [(Holder("bob", Tier.HOST),) + said[0]], host, host)


def test_what_changed_while_it_was_looked_at_may_be_said_or_not() -> None:
    host = held((ONE, Tier.HOST))
    for said in ([(Holder("ann", Tier.HOST),)], [()]):
        assert disagreement([ONE], said, host, held()) == ""
        assert disagreement([ONE], said, held(), host) == ""


def test_what_has_gone_and_come_back_while_it_was_looked_at_may_be_said_or_not() -> None:
    host = held((ONE, Tier.HOST))
    assert disagreement([ONE], [()], host, host) != ""
    assert disagreement([ONE], [()], host, host, restless={ONE}) == ""


def test_healing_is_over_at_the_first_moment_without_an_untruth() -> None:
    told = iter(["no registry answers", "no registry answers", "bob says nothing", ""])
    healed = heal(lambda: next(told), patience_seconds=60.0)
    assert healed.done
    assert healed.untruths == ("no registry answers", "bob says nothing")
    assert 0 < healed.seconds < 60


def test_what_does_not_heal_in_time_is_not_healed() -> None:
    healed = heal(lambda: "bob says nothing", patience_seconds=0.2)
    assert not healed.done
    assert healed.seconds > 0.2


def test_a_run_passes_only_if_nothing_is_wrong_late_leaking_or_otherwise_amiss() -> None:
    fine = Result(Counter({"NATS killed": 2}), Counter({Verdict.RIGHT: 5, Verdict.ABORTED: 1}))
    fine.heal_seconds["NATS killed"] = 1.234
    assert passed(fine)
    assert json.loads(last_line(fine)) == {
        "requests": 6, "faults": 2, "wrong": 0, "stalls": 0, "leaks": 0, "heal_seconds_max": 1.23
    }  # fmt: skip
    for verdict in (Verdict.WRONG, Verdict.LATE, Verdict.LOST):
        assert not passed(Result(verdicts=Counter({verdict: 1})))
    assert not passed(Result(leaks=1))
    assert not passed(Result(problems=["not healed"]))
