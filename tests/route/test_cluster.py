"""Engines from membership, and prompts that go where their prefix is: nothing is played but the
engines themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from kvbm_service.route.vllm_names import Adapter
from tests.patience import eventually
from tests.route.cluster import BLOCK, Cluster, chain_of, clustered
from tests.route.fake_engine import WORDS, fake_engines
from tests.route.routing import CHAT, PATIENT, routing

BLOCKS = 30
PROMPT = "".join(f"{number:>15} " for number in range(BLOCKS))
assert len(PROMPT) == BLOCKS * BLOCK


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with clustered() as cluster:
        yield cluster


async def test_engines_are_found_by_membership_and_drained_when_they_leave(
    cluster: Cluster,
) -> None:
    async with (
        fake_engines("a", "b") as [a, b],
        routing(network=await cluster.network(), ready=False) as router,
    ):
        assert (await router.say()).status == 503
        node = await cluster.join(a)
        await cluster.join(b)
        await router.until_ready(a, b)
        a.hold_middle.clear()
        b.hold_middle.clear()
        running = [asyncio.create_task(router.say(stream=True)) for _ in range(2)]
        await eventually(lambda: a.running == b.running == 1)
        await node.leave()
        await eventually(lambda: not router.engine(a).listed)
        b.hold_middle.set()
        router.engine(b).ahead += 10_000
        for _ in range(4):
            assert (await router.say()).json["engine"] == "b"
        a.hold_middle.set()
        assert {(await one).text for one in running} == {"".join(WORDS)}
        await a.stop()
        await eventually(lambda: [engine.url for engine in router.fleet] == [b.url])
        await a.start()
        await cluster.join(a)
        await router.until_ready(a, b)


async def test_a_prompt_goes_to_the_engine_whose_tiers_hold_its_prefix(cluster: Cluster) -> None:
    async with (
        fake_engines("a", "b", "c") as fakes,
        routing(network=await cluster.network(), ready=False) as router,
    ):
        nodes = [await cluster.join(fake) for fake in fakes]
        await router.until_ready(*fakes)
        nodes[1].save(chain_of(PROMPT)[:20])
        nodes[2].save(chain_of(PROMPT)[:10])
        nodes[0].save(chain_of(PROMPT, salt="mine")[:20])
        await cluster.until_known(50)
        answer = await router.say(PROMPT)
        assert (answer.json["engine"], answer.headers["X-KVBM-Engine"]) == ("b", "b")
        assert (await router.say(PROMPT, cache_salt="mine")).json["engine"] == "a"
        page = (await router.get("/metrics")).body.decode()
        assert "kvbm_route_prefix_blocks_sum 40.0" in page
        tokens = list(PROMPT.encode())
        asked = sum(len(fake.tokenized) for fake in fakes)
        assert (await router.post("/v1/completions", {"prompt": tokens})).json["engine"] == "b"
        assert sum(len(fake.tokenized) for fake in fakes) == asked, "tokens need no tokenising"
        assert fakes[2].asked == []


async def test_a_chat_is_tokenised_as_the_engine_would(cluster: Cluster) -> None:
    async with (
        fake_engines("a", "b") as [a, b],
        routing(network=await cluster.network(), ready=False) as router,
    ):
        await cluster.join(a)
        (await cluster.join(b)).save(chain_of(PROMPT))
        await router.until_ready(a, b)
        await cluster.until_known(BLOCKS)
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": PROMPT}],
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "reasoning_effort": "low",
            "temperature": 0,
        }
        assert (await router.post(CHAT, body)).json["engine"] == "b"
        assert [*a.tokenized, *b.tokenized] == [
            {
                "model": "tiny",
                "messages": body["messages"],
                "tools": body["tools"],
                "chat_template_kwargs": {"reasoning_effort": "low"},
            }
        ]


async def test_an_adapters_blocks_are_not_those_of_its_model(cluster: Cluster) -> None:
    sql = {"id": "sql", "object": "model", "root": "/adapters/sql", "parent": "tiny"}
    async with fake_engines("a", "b") as [a, b]:
        for fake in (a, b):
            fake.models.append(sql)
        async with routing(network=await cluster.network(), ready=False) as router:
            (await cluster.join(a)).save(chain_of(PROMPT))
            (await cluster.join(b)).save(chain_of(PROMPT, "", Adapter("sql", "/adapters/sql")))
            await router.until_ready(a, b)
            await cluster.until_known(2 * BLOCKS)
            assert (await router.say(PROMPT, model="sql")).json["engine"] == "b"
            assert (await router.say(PROMPT, model="tiny")).json["engine"] == "a"


async def test_what_an_engine_was_sent_draws_the_next_rounds_of_a_conversation(
    cluster: Cluster,
) -> None:
    async with (
        fake_engines("a", "b") as fakes,
        routing(network=await cluster.network(), ready=False) as router,
    ):
        for fake in fakes:
            await cluster.join(fake)
        await router.until_ready(*fakes)
        first = (await router.say(PROMPT)).json["engine"]
        for _ in range(3):
            assert (await router.say(PROMPT + "and more")).json["engine"] == first


async def test_a_load_outweighs_a_prefix(cluster: Cluster) -> None:
    async with (
        fake_engines("a", "b") as [a, b],
        routing(network=await cluster.network(), ready=False) as router,
    ):
        (await cluster.join(a)).save(chain_of(PROMPT))
        await cluster.join(b)
        await router.until_ready(a, b)
        await cluster.until_known(BLOCKS)
        router.engine(a).ahead += 10_000
        assert (await router.say(PROMPT)).json["engine"] == "b"


async def test_a_decode_engine_that_has_the_prompt_needs_no_prefill(cluster: Cluster) -> None:
    async with (
        fake_engines("p", "d") as [p, d],
        routing(network=await cluster.network(), ready=False) as router,
    ):
        await cluster.join(p, "prefill")
        node = await cluster.join(d, "decode")
        await router.until_ready(p, d)
        other = PROMPT[::-1]
        assert (await router.say(other)).json["engine"] == "d"
        assert len(p.asked) == 1
        node.save(chain_of(PROMPT))
        await cluster.until_known(BLOCKS)
        assert (await router.say(PROMPT)).json["engine"] == "d"
        assert (await router.say(other)).json["engine"] == "d"
        assert len(p.asked) == 1, "it has it in its tiers, and was sent the other before"


async def test_without_registry_and_nats_requests_go_by_load(cluster: Cluster) -> None:
    async with (
        fake_engines("a", "b") as [a, b],
        routing(network=await cluster.network(), ready=False) as router,
    ):
        await cluster.join(a)
        await cluster.join(b)
        await router.until_ready(a, b)
        await cluster.close_registry()
        assert (await router.say(PROMPT)).status == 200
        await asyncio.to_thread(cluster.server.kill)
        network = router.service.network
        assert network is not None
        await eventually(lambda: not network.bus.connected)
        await eventually(lambda: not any(engine.listed for engine in router.fleet))
        for number in range(8):
            assert (await router.say(f"{number} {PROMPT}")).status == 200
        assert min(len(a.asked), len(b.asked)) >= 3


async def test_a_slow_tokeniser_costs_the_deadline_and_no_more(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    options = replace(PATIENT, deadline_seconds=0.05)
    async with (
        fake_engines("a", "b") as [a, b],
        routing(network=await cluster.network(), ready=False, options=options) as router,
    ):
        for fake in (a, b):
            fake.tokenize_seconds = 60.0
            await cluster.join(fake)
        await router.until_ready(a, b)
        for _ in range(3):
            assert (await router.say(PROMPT)).status == 200
        said = [line for line in caplog.messages if "KVBM_ROUTE_DEADLINE_MS" in line]
        assert len(said) == 1
        assert a.asked
        assert b.asked


async def test_engines_that_name_blocks_in_ways_unknown_go_by_load_which_is_said_once(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        fake_engines("a") as [a],
        routing(network=await cluster.network(), ready=False) as router,
    ):
        await cluster.join(a, names="")
        await router.until_ready(a)
        for _ in range(3):
            assert (await router.say(PROMPT)).status == 200
        assert [line for line in caplog.messages if "by load alone" in line] == [
            "engine a is chosen by load alone: how it names blocks is not known"
        ]
        assert a.tokenized == []


async def test_nothing_is_routed_to_records_that_make_no_sense(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        fake_engines("king", "nowhere", "c") as [king, nowhere, c],
        routing(network=await cluster.network(), ready=False) as router,
    ):
        await cluster.join(king, role="king")
        await cluster.join(nowhere, url="ftp://x")
        await cluster.join(c)
        await router.until_ready(c)
        await eventually(lambda: sum("nothing is routed" in line for line in caplog.messages) == 2)
        assert [engine.url for engine in router.fleet] == [c.url]
