"""Prompts computed by one engine and answered by another."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.patience import eventually
from tests.route.fake_engine import WORDS, fake_engines
from tests.route.routing import CHAT, PATIENT, routing

LONG = "x" * 1_000


async def test_a_prompt_is_computed_by_one_engine_and_answered_by_another() -> None:
    async with fake_engines("p", "d") as [p, d], routing(prefill=[p], decode=[d]) as router:
        answer = await router.say(LONG, stream=True, max_tokens=4, temperature=0)
        assert answer.text == "".join(WORDS)
        assert answer.events[0]["engine"] == "d"
        assert p.asked == [
            {
                "prompt": LONG,
                "stream": False,
                "max_tokens": 1,
                "n": 1,
                "temperature": 0,
                "kv_transfer_params": {"do_remote_decode": True},
            }
        ]
        assert d.asked == [
            {
                "prompt": LONG,
                "stream": True,
                "max_tokens": 4,
                "temperature": 0,
                "kv_transfer_params": p.params,
            }
        ]


async def test_a_chat_is_asked_for_one_token_in_both_of_its_ways() -> None:
    async with fake_engines("p", "d") as [p, d], routing(prefill=[p], decode=[d]) as router:
        body = {
            "messages": [{"role": "user", "content": LONG}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_completion_tokens": 30,
            "min_tokens": 5,
            "n": 2,
        }
        assert (await router.post(CHAT, body)).status == 200
        [asked] = p.asked
        assert asked["max_tokens"] == asked["max_completion_tokens"] == asked["n"] == 1
        assert not {"min_tokens", "stream_options"} & set(asked)
        assert d.asked == [{**body, "kv_transfer_params": p.params}]


@pytest.mark.parametrize("trouble", ["dies", "ill", "gone", "none"])
async def test_a_prefill_engine_that_fails_is_replaced_by_another(trouble: str) -> None:
    async with (
        fake_engines("p", "q", "d") as [p, q, d],
        routing(prefill=[p, q], decode=[d]) as router,
    ):
        p.die_before_first = trouble == "dies"
        p.status = 500 if trouble == "ill" else 200
        p.params = None if trouble == "none" else p.params
        if trouble == "gone":
            await p.stop()
        q.params = {"from": "q"}
        for _ in range(2):
            assert (await router.say(LONG)).json["engine"] == "d"
        assert [asked["kv_transfer_params"] for asked in d.asked] == [q.params, q.params]


@pytest.mark.parametrize("trouble", ["dies", "none", "not there"])
async def test_without_a_prefill_engine_the_decode_engine_does_it_all(trouble: str) -> None:
    async with fake_engines("p", "d") as [p, d], routing(prefill=[p], decode=[d]) as router:
        p.die_before_first = trouble == "dies"
        p.params = None
        if trouble == "not there":
            await p.stop()
        answer = await router.say(LONG)
        assert answer.json["engine"] == "d"
        assert d.asked == [{"prompt": LONG, "stream": False}]


async def test_what_a_prefill_engine_refuses_the_decode_engine_refuses_to_the_client() -> None:
    async with (
        fake_engines("p", "q", "d") as [p, q, d],
        routing(prefill=[p, q], decode=[d]) as router,
    ):
        for fake in (p, q, d):
            fake.status = 400
        answer = await router.say(LONG)
        assert (answer.status, answer.json["error"]["message"]) == (400, "d says no")
        assert len(p.asked) + len(q.asked) == 1


async def test_a_short_prompt_is_not_worth_a_hand_over() -> None:
    async with fake_engines("p", "d") as [p, d], routing(prefill=[p], decode=[d]) as router:
        assert (await router.say("hi")).status == 200
        assert p.asked == []
        assert await router.metric('kvbm_route_prefills_total{outcome="not worth it"}') == 1


async def test_several_prompts_in_one_request_are_not_handed_over() -> None:
    async with fake_engines("p", "d") as [p, d], routing(prefill=[p], decode=[d]) as router:
        body = {"prompt": [LONG, LONG]}
        assert (await router.post("/v1/completions", body)).status == 200
        assert p.asked == []
        assert d.asked == [body]


async def test_what_engines_say_to_each_other_cannot_be_said_by_a_client() -> None:
    async with fake_engines("p", "d") as [p, d], routing(prefill=[p], decode=[d]) as router:
        p.params = None
        await router.say(LONG, kv_transfer_params={"remote": "evil"})
        await router.say("hi", kv_transfer_params={"remote": "evil"})
        assert p.asked[0]["kv_transfer_params"] == {"do_remote_decode": True}
        assert not any("kv_transfer_params" in asked for asked in d.asked)


async def test_a_decode_engine_that_dies_in_between_is_replaced() -> None:
    async with (
        fake_engines("p", "d", "e") as [p, d, e],
        routing(prefill=[p], decode=[d, e]) as router,
    ):
        d.die_before_first = True
        for _ in range(2):
            assert (await router.say(LONG)).json["engine"] == "e"
        assert d.asked
        assert all(asked["kv_transfer_params"] == p.params for asked in e.asked)


async def test_a_client_that_goes_away_between_prefill_and_decode_leaves_nothing_behind() -> None:
    async with fake_engines("p", "d") as [p, d], routing(prefill=[p], decode=[d]) as router:
        p.hold.clear()
        waiting = asyncio.create_task(router.say(LONG))
        await eventually(lambda: p.running == 1)
        waiting.cancel()
        await eventually(lambda: p.running == 0)
        assert p.cancelled == 1
        assert d.asked == []
        await eventually(lambda: all(not one.running and not one.ahead for one in router.fleet))


async def test_prefill_engines_alone_answer_nobody() -> None:
    async with fake_engines("p") as [p], routing(prefill=[p]) as router:
        assert (await router.say(LONG)).status == 503
        assert p.asked == []


async def test_prompts_are_shared_out_among_prefill_and_decode_engines() -> None:
    async with (
        fake_engines("p", "q", "d", "e") as [p, q, d, e],
        routing(
            prefill=[p, q], decode=[d, e], options=replace(PATIENT, prefill_blocks=1)
        ) as router,
    ):
        answers = await asyncio.gather(*(router.say(LONG, stream=True) for _ in range(20)))
        assert {answer.text for answer in answers} == {"".join(WORDS)}
        assert min(len(fake.asked) for fake in (p, q, d, e)) > 5
