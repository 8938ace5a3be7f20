"""Engines that die, fall ill, leave, and come back; clients that go away."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.patience import eventually
from tests.route.fake_engine import WORDS, fake_engines
from tests.route.routing import COMPLETION, PATIENT, routing


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_dies_before_its_first_byte_is_replaced_by_another(
    stream: bool,
) -> None:
    async with fake_engines("a", "b") as [a, b], routing(a, b) as router:
        a.die_before_first = True
        for _ in range(4):
            answer = await router.say(stream=stream)
            assert answer.status == 200
        assert a.asked
        assert len(b.asked) == 4
        assert await router.metric("kvbm_route_retries_total") == len(a.asked)


async def test_an_engine_that_is_gone_is_replaced_and_left_alone_until_it_is_back() -> None:
    async with fake_engines("a", "b") as [a, b], routing(a, b) as router:
        await a.stop()
        for _ in range(6):
            assert (await router.say()).status == 200
        assert len(b.asked) == 6
        assert not router.engine(a).healthy
        await a.start()
        await router.until_ready(a, b)
        for _ in range(4):
            await router.say()
        assert len(a.asked) == 2


async def test_an_engine_that_dies_in_the_middle_ends_the_stream_with_an_error_event() -> None:
    async with fake_engines("a", "b") as [a, b], routing(a, b) as router:
        for fake in (a, b):
            fake.die_after = 2
        answer = await router.say(stream=True)
        assert answer.status == 200
        *words, error = answer.events
        assert "".join(event["choices"][0]["text"] for event in words) == "".join(WORDS[:2])
        assert error["error"]["type"] == "engine_lost"
        assert "127.0.0.1:" in error["error"]["message"]
        assert len(a.asked) + len(b.asked) == 1


async def test_half_a_line_is_not_sent_when_an_engine_dies_within_it() -> None:
    async with fake_engines("a") as [a], routing(a) as router:
        a.die_after, a.die_within_a_line = 1, True
        answer = await router.say(stream=True)
        assert [list(event) for event in answer.events] == [["choices", "engine"], ["error"]]


async def test_a_request_that_kills_engines_does_not_kill_all_of_them() -> None:
    async with fake_engines("a", "b", "c", "d", "e") as fakes, routing(*fakes) as router:
        for fake in fakes:
            fake.die_before_first = True
        answer = await router.say()
        assert answer.status == 502
        error = answer.json["error"]
        assert error["type"] == "engine_lost"
        assert "engine 127.0.0.1:" in error["message"]
        assert sum(len(fake.asked) for fake in fakes) == 3


async def test_an_engine_that_says_it_cannot_serve_is_passed_over() -> None:
    async with fake_engines("a", "b") as [a, b], routing(a, b) as router:
        a.status = 503
        for _ in range(4):
            assert (await router.say()).json["engine"] == "b"
        b.status = 503
        answer = await router.say()
        assert answer.status == 503
        assert "says no" in answer.json["error"]["message"]


async def test_an_engine_that_calls_itself_ill_gets_nothing_until_it_is_well() -> None:
    async with fake_engines("a", "b") as [a, b], routing(a, b) as router:
        a.health = 503
        await eventually(lambda: not router.engine(a).healthy)
        for _ in range(4):
            await router.say()
        assert not a.asked
        assert (await router.get("/health")).status == 200
        a.health = 200
        await router.until_ready(a, b)
        await asyncio.gather(*(router.say() for _ in range(8)))
        assert a.asked


async def test_without_any_engine_a_client_is_told_to_come_again() -> None:
    async with fake_engines("a") as [a]:
        await a.stop()
        async with routing(a, ready=False) as router:
            answer = await router.say()
            assert answer.status == 503
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json["error"]["type"] == "service_unavailable"
            assert (await router.get("/health")).status == 503
            assert (await router.get("/v1/models")).status == 503
            await a.start()
            await router.until_ready(a)
            assert (await router.say()).status == 200


async def test_more_requests_than_allowed_are_turned_away_at_once() -> None:
    options = replace(PATIENT, max_requests=2)
    async with fake_engines("a") as [a], routing(a, options=options) as router:
        a.hold.clear()
        waiting = [asyncio.create_task(router.say()) for _ in range(2)]
        await eventually(lambda: len(a.asked) == 2)
        answer = await router.say()
        assert answer.status == 503
        assert "Retry-After" in answer.headers
        a.hold.set()
        assert {(await one).status for one in waiting} == {200}
        assert (await router.say()).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_cancels_its_request_at_the_engine(stream: bool) -> None:
    async with fake_engines("a") as [a], routing(a) as router:
        a.hold.clear()
        waiting = asyncio.create_task(router.say(stream=stream))
        await eventually(lambda: a.running == 1)
        waiting.cancel()
        await eventually(lambda: a.running == 0)
        assert a.cancelled == 1
        await eventually(lambda: router.engine(a).running == router.engine(a).ahead == 0)
        labels = f'engine="{a.url}",outcome="cancelled",role="both"'
        assert await router.metric(f"kvbm_route_requests_total{{{labels}}}") == 1


async def test_a_client_that_goes_away_in_the_middle_cancels_it_too() -> None:
    async with fake_engines("a") as [a], routing(a) as router:
        a.hold_middle.clear()
        body = {"prompt": "x", "stream": True}
        async with router.session.post(router.url + COMPLETION, json=body) as response:
            await response.content.readline()
        await eventually(lambda: a.running == 0)
        assert a.cancelled == 1
        await eventually(lambda: router.engine(a).running == 0)


async def test_an_engine_that_stays_silent_is_given_up() -> None:
    options = replace(PATIENT, idle_seconds=1.0)
    async with fake_engines("a", "b") as [a, b], routing(a, b, options=options) as router:
        a.hold.clear()
        b.hold.clear()
        waiting = asyncio.create_task(router.say())
        await eventually(lambda: a.asked or b.asked)
        silent, other = (a, b) if a.asked else (b, a)
        other.hold.set()
        assert (await waiting).json["engine"] == other.name or silent.asked[1:]
        await eventually(lambda: silent.running == 0)


async def test_a_client_that_takes_nothing_does_not_hold_an_engine_for_ever() -> None:
    options = replace(PATIENT, idle_seconds=1.0)
    async with fake_engines("a") as [a], routing(a, options=options) as router:
        a.chatter = 32 << 20
        host, port = router.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 10)
        body = b'{"prompt": "x", "stream": true}'
        head = f"POST {COMPLETION} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await reader.readline()
        await eventually(lambda: a.running == 0 and not router.engine(a).running)
        assert a.cancelled == 1
        assert router.engine(a).healthy
        labels = f'engine="{a.url}",outcome="cancelled",role="both"'
        assert await router.metric(f"kvbm_route_requests_total{{{labels}}}") == 1
        writer.close()


async def test_requests_at_an_engine_that_answers_no_more_are_sent_to_another() -> None:
    async with fake_engines("a", "b") as [a, b], routing(a, b) as router:
        a.hold.clear()
        a.hold_middle.clear()
        b.hold_middle.clear()
        requests = [asyncio.create_task(router.say(stream=True)) for _ in range(2)]
        await eventually(lambda: a.asked and b.asked)
        a.health = 500
        b.hold_middle.set()
        answers = [await one for one in requests]
        assert {answer.events[0]["engine"] for answer in answers} == {"b"}
        assert a.cancelled == 1


async def test_at_a_stop_requests_come_to_their_end_and_no_new_ones_begin() -> None:
    async with fake_engines("a") as [a]:
        async with routing(a) as router:
            a.hold_middle.clear()
            waiting = asyncio.create_task(router.say(stream=True))
            await eventually(lambda: a.running == 1)
            service = router.service
            asyncio.get_running_loop().call_later(0.5, a.hold_middle.set)
        assert service._stopping
        assert (await waiting).text == "".join(WORDS)


async def test_a_stop_does_not_wait_for_ever() -> None:
    async with fake_engines("a") as [a]:
        async with routing(a, options=replace(PATIENT, drain_seconds=0.2)) as router:
            a.hold.clear()
            waiting = asyncio.create_task(router.say())
            await eventually(lambda: a.running == 1)
        await eventually(lambda: a.running == 0)
        with pytest.raises(Exception, match=r".*"):
            await waiting
