"""What a client sees of a router whose engines are well."""

from __future__ import annotations

import asyncio

import pytest

from kvbm_service.route import relay, service
from tests.patience import eventually
from tests.route.fake_engine import WORDS, fake_engines
from tests.route.routing import CHAT, COMPLETION, routing

CHAT_BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


async def test_a_completion_and_a_chat_are_answered_as_the_engine_answers_them() -> None:
    async with fake_engines("a") as [a], routing(a) as router:
        answer = await router.say()
        assert answer.status == 200
        assert answer.json["choices"] == [{"text": "".join(WORDS)}]
        answer = await router.post(CHAT, CHAT_BODY)
        assert answer.json["choices"] == [{"message": {"content": "".join(WORDS)}}]
        assert a.asked[-1] == CHAT_BODY


async def test_a_stream_comes_as_the_engine_sends_it() -> None:
    async with fake_engines("a") as [a], routing(a) as router:
        for path, body in ((COMPLETION, {"prompt": "x"}), (CHAT, CHAT_BODY)):
            answer = await router.post(path, {**body, "stream": True})
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            assert answer.text == "".join(WORDS)
            assert answer.events[-1] == "[DONE]"


async def test_the_first_words_of_a_stream_do_not_wait_for_the_last() -> None:
    async with fake_engines("a") as [a], routing(a) as router:
        a.hold_middle.clear()
        body = {"prompt": "x", "stream": True}
        async with router.session.post(router.url + COMPLETION, json=body) as response:
            first = await response.content.readline()
            assert b"one" in first
            a.hold_middle.set()
            assert b"four" in await response.read()


async def test_errors_come_through_with_status_and_body() -> None:
    async with fake_engines("a") as [a], routing(a) as router:
        for status in (400, 404, 422, 429, 500):
            a.status = status
            for stream in (False, True):
                answer = await router.say(stream=stream)
                assert answer.status == status
                assert answer.json["error"]["message"] == "a says no"
                assert answer.headers["Content-Type"].startswith("application/json")
        assert router.engine(a).healthy


async def test_requests_are_shared_out_among_equal_engines() -> None:
    async with fake_engines("a", "b", "c") as fakes, routing(*fakes) as router:
        for _ in range(9):
            await router.say()
        assert [len(fake.asked) for fake in fakes] == [3, 3, 3]


async def test_a_busy_engine_is_spared() -> None:
    async with fake_engines("a", "b") as fakes, routing(*fakes) as router:
        for fake in fakes:
            fake.hold.clear()
        busy = asyncio.create_task(router.say("x" * 10_000))
        await eventually(lambda: any(fake.asked for fake in fakes))
        loaded, idle = sorted(fakes, key=lambda fake: -len(fake.asked))
        more = [asyncio.create_task(router.say()) for _ in range(8)]
        await eventually(lambda: len(loaded.asked) + len(idle.asked) == 9)
        assert len(idle.asked) == 8, "eight short prompts are less to do than the long one"
        for fake in fakes:
            fake.hold.set()
        assert {(await one).status for one in (busy, *more)} == {200}


async def test_who_asks_reaches_the_engine_and_who_answered_the_client() -> None:
    async with fake_engines("a") as [a], routing(a) as router:
        answer = await router.post(
            COMPLETION, {"prompt": "x"}, Authorization="Bearer key", traceparent="00-1-2-3"
        )
        assert a.headers[-1]["Authorization"] == "Bearer key"
        assert a.headers[-1]["traceparent"] == "00-1-2-3"
        assert answer.headers["X-KVBM-Engine"] == f"127.0.0.1:{a.port}"


async def test_models_of_all_engines_are_listed_once_each() -> None:
    async with fake_engines("a", "b") as [a, b], routing(a, b) as router:
        b.models = [*b.models, {"id": "sql", "object": "model", "root": "/l/sql", "parent": "tiny"}]
        found = (await router.get("/v1/models")).json
        assert found["object"] == "list"
        assert [model["id"] for model in found["data"]] == ["tiny", "sql"]


async def test_engines_that_want_a_key_get_the_clients_and_say_no_to_others() -> None:
    async with fake_engines("a") as [a], routing(a) as router:
        a.key = "k"
        refused = await router.get("/v1/models")
        assert (refused.status, refused.json) == (401, {"error": "Unauthorized"})
        headers = {"Authorization": "Bearer k"}
        async with router.session.get(router.url + "/v1/models", headers=headers) as response:
            assert [model["id"] for model in (await response.json())["data"]] == ["tiny"]


async def test_a_request_goes_to_an_engine_that_serves_its_model() -> None:
    async with fake_engines("a", "b") as [a, b]:
        b.models = [{"id": "other", "object": "model", "root": "/m/other"}]
        async with routing(a, b) as router:
            for _ in range(4):
                await router.say(model="other")
            assert (len(a.asked), len(b.asked)) == (0, 4)
            a.status = b.status = 404
            assert (await router.say(model="nobody's")).json["error"]["message"] in (
                "a says no",
                "b says no",
            )


async def test_nonsense_is_refused_as_openai_refuses() -> None:
    async with fake_engines("a") as [a], routing(a) as router:
        for nonsense in (b"{", b"[]", b"\xff"):
            async with router.session.post(router.url + CHAT, data=nonsense) as response:
                assert response.status == 400
                assert (await response.json())["error"]["type"] == "invalid_request_error"
        assert (await router.get("/v1/nothing")).status == 404
        assert a.asked == []


async def test_many_at_once_are_all_answered() -> None:
    async with fake_engines("a", "b", "c") as fakes, routing(*fakes) as router:
        asked = (router.say(f"{number}", stream=bool(number % 2)) for number in range(150))
        answers = await asyncio.gather(*asked)
        assert {answer.status for answer in answers} == {200}
        assert sum(len(fake.asked) for fake in fakes) == 150
        assert all(len(fake.asked) > 30 for fake in fakes)
        assert all(engine.running == engine.ahead == 0 for engine in router.fleet)
        url = router.engine(fakes[0]).url
        labels = f'engine="{url}",outcome="answered",role="both"'
        assert await router.metric(f"kvbm_route_requests_total{{{labels}}}") == len(fakes[0].asked)


async def test_a_request_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_REQUEST_BYTES", 1_000)
    async with fake_engines("a") as [a], routing(a) as router:
        answer = await router.say("x" * 2_000)
        assert (answer.status, answer.json["error"]["code"]) == (413, 413)
        assert a.asked == []


async def test_a_line_without_an_end_is_sent_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "MAX_LINE_BYTES", 10)
    async with fake_engines("a") as [a], routing(a) as router:
        a.die_after, a.die_within_a_line = 1, True
        answer = await router.say(stream=True)
        assert b'data: {"choices": [{"del' in answer.body
        assert b'"engine_lost"' in answer.body
