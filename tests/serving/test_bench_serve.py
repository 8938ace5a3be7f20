"""`kvbm bench serve` against a server of OpenAI's interface."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from kvbm_service.bench.serving import figures
from kvbm_service.bench.serving.client import Asked, Server
from kvbm_service.bench.serving.run import talk
from kvbm_service.bench.serving.workload import Workload
from tests.serving.served import Served, serving

QUICK = Workload(users=3, rounds=4, qps=30.0, system_words=5, history_words=40, answer_tokens=7)


async def run(served: Served, seconds: float = 1.0) -> list[Asked]:
    heard: list[Asked] = []
    async with Server(served.url, "tiny", "secret", 10) as server:
        asked, _ = await talk(server, QUICK, seconds, heard.append)
    assert sorted(heard, key=lambda one: one.asked_at) == asked
    return asked


async def test_each_question_brings_the_conversation_so_far() -> None:
    async with serving() as served:
        asked = await run(served)
        assert not any(one.error for one in asked)
        assert 15 <= len(asked) <= 31
        for request in served.requests:
            said = [m["content"] for m in request["messages"] if m["role"] == "assistant"][1:]
            assert said == ["three words said"] * len(said)
            assert request["max_tokens"] == 7
        assert {one.round for one in asked} == set(range(QUICK.rounds))


async def test_the_time_to_the_first_token_is_the_servers() -> None:
    async with serving() as served:
        served.seconds_to_first_token = 0.2
        asked = await run(served)
        summary = figures.sum_up(asked, 1.0)
        assert summary.ttft_p50 is not None
        assert 0.2 <= summary.ttft_p50 < 2.0
        assert summary.hit_share == pytest.approx(0.5, abs=0.01)
        assert summary.prompt_tokens_per_second == sum(one.prompt_tokens for one in asked)


async def test_a_share_that_the_server_does_not_tell_is_not_made_up() -> None:
    async with serving() as served:
        served.tells_of_cache = False
        assert figures.sum_up(await run(served), 1.0).hit_share is None


async def test_refused_questions_are_counted_and_say_why() -> None:
    async with serving() as served:
        served.refuse = lambda request: len(request["messages"]) > 4
        asked = await run(served)
        failed = [one for one in asked if one.error]
        assert failed
        assert all("HTTP 400" in one.error and "too long" in one.error for one in failed)
        assert figures.sum_up(asked, 1.0).failed == len(failed)


async def test_a_server_that_is_gone_is_an_error_of_each_question() -> None:
    async with serving() as served:
        pass
    asked = await run(served, 0.2)
    assert asked
    assert all("Connect" in one.error for one in asked)


async def test_the_command_prints_the_figures_and_draws_them(tmp_path: Path) -> None:
    async with serving() as served:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "kvbm_service.cli", "bench", "serve", "--url", f"{served.url}/v1",
            "--users", "2", "--rounds", "2", "--qps", "20", "--history", "10", "--seconds", "1",
            "--output", str(tmp_path / "asked.jsonl"), "--plot", str(tmp_path / "ttft.png"),
            "--json", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    summary = json.loads(out)
    assert summary["requests"] == len((tmp_path / "asked.jsonl").read_text().splitlines())
    assert summary["failed"] == 0
    assert (tmp_path / "ttft.png").read_bytes().startswith(b"\x89PNG")


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = [float(number) for number in range(1, 101)]
    assert figures.percentile(values, 0.5) == 50.0
    assert figures.percentile(values, 0.9) == 90.0
    assert figures.percentile(values, 0.99) == 99.0
    assert figures.percentile([1.0], 0.99) == 1.0
    assert figures.percentile([], 0.5) is None
