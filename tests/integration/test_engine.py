"""The engine and the model that all comparisons rest on, without our connector."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvbm_service.demo.engine import Engine, EngineFailed, share_cores
from kvbm_service.demo.model import make_model
from kvbm_service.demo.process_group import end_group, members
from tests.integration.conftest import Reference
from tests.patience import PATIENCE_SECONDS

TAIL = list(range(40))


def prompt(seed: int, tokens: int = 300) -> list[int]:
    """A random prompt that always ends in the same way."""
    return [random.Random(seed * 1_000 + at).randrange(256) for at in range(tokens)] + TAIL


@pytest.fixture(scope="module")
def engine(reference: Reference) -> Engine:
    return reference.engine.wait_ready()


def test_the_answer_from_the_engines_own_cache_is_the_computed_one(engine: Engine) -> None:
    computed = engine.ask(prompt(1))
    reused = engine.ask(prompt(1))
    assert (computed.cached_tokens, reused.cached_tokens) == (0, 320)
    assert reused.tokens == computed.tokens
    assert reused.logprobs == pytest.approx(computed.logprobs, abs=1e-4)


def test_a_reset_cache_is_empty(engine: Engine) -> None:
    engine.ask(prompt(2))
    assert engine.reset_prefix_cache()
    assert engine.ask(prompt(2)).cached_tokens == 0


def test_every_prefix_gives_its_own_answer(engine: Engine) -> None:
    answers = [engine.ask(prompt(seed)) for seed in range(10, 20)]
    assert len({tuple(answer.tokens) for answer in answers}) == len(answers)
    assert len({answer.tokens[0] for answer in answers}) > len(answers) // 2


def test_one_token_far_back_changes_the_answer(engine: Engine) -> None:
    changed = prompt(3)
    changed[0] ^= 1
    one, other = engine.ask(prompt(3)), engine.ask(changed)
    differences = [abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)]
    assert one.tokens != other.tokens or max(differences) > 1e-2


def test_another_salt_shares_nothing(engine: Engine) -> None:
    engine.ask(prompt(4), cache_salt="ours")
    assert engine.ask(prompt(4), cache_salt="theirs").cached_tokens == 0
    assert engine.ask(prompt(4), cache_salt="ours").cached_tokens > 0


def test_questions_are_answered_side_by_side(engine: Engine) -> None:
    alone = [engine.ask(prompt(seed)).tokens for seed in range(30, 36)]
    engine.reset_prefix_cache()
    together = [engine.submit(prompt(seed)) for seed in range(30, 36)]
    assert [future.result(60).tokens for future in together] == alone


def test_a_cancelled_question_is_aborted_and_the_next_one_answered(engine: Engine) -> None:
    running = engine.submit(prompt(5), max_tokens=1_000)
    assert running.cancel()
    assert engine.ask(prompt(6)).tokens
    deadline = time.monotonic() + 10
    while not engine.reset_prefix_cache() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert engine.reset_prefix_cache()  # refused while anything runs


def test_a_prompt_that_is_too_long_is_refused_and_says_why(engine: Engine) -> None:
    with pytest.raises(EngineFailed, match="maximum context length"):
        engine.ask([1] * 10_000)
    assert engine.alive


def test_a_killed_engine_tells_whoever_waits(engines) -> None:  # type: ignore[no-untyped-def]
    engine = engines.start("killed", device_blocks=64).wait_ready()
    waiting = engine.submit(prompt(1), max_tokens=1_000)
    engine.kill()
    with pytest.raises(EngineFailed, match="has ended"):
        waiting.result(10)
    with pytest.raises(EngineFailed, match="has ended"):
        engine.ask(prompt(1))
    assert members(engine.pid) == []


def test_an_engine_that_cannot_start_says_why(engines) -> None:  # type: ignore[no-untyped-def]
    engine = engines.start("broken", device_blocks=64, arguments={"max_model_len": 8_000})
    with pytest.raises(EngineFailed, match="max seq len"):
        engine.wait_ready()


STARTER = """
import os, signal, sys
from pathlib import Path
from kvbm_service.demo.engine import Engine, EngineOptions
engine = Engine(EngineOptions(model=Path(sys.argv[1]), log=Path(sys.argv[2]), device_blocks=64))
engine.wait_ready()
print(engine.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_engine_ends_with_the_program_that_started_it(model: Path, tmp_path: Path) -> None:
    starter = subprocess.run(
        [sys.executable, "-c", STARTER, model, tmp_path / "orphan.log"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert starter.returncode == -signal.SIGKILL, starter.stderr
    group = int(starter.stdout)
    deadline = time.monotonic() + 10
    while (left := members(group)) and time.monotonic() < deadline:
        time.sleep(0.05)
    end_group(group)
    assert left == []


SPEAKER = """
import sys, time
from kvbm_service.demo.engine_process import Line
from kvbm_service.demo.talk import Stage
line = Line(int(sys.argv[1]))
line.listen(print)
line.say(Stage(0, "nobody will read this"))
time.sleep(60)
"""


@pytest.mark.parametrize("last_words", [b"", b'{"type": "As'], ids=["none", "half a line"])
def test_an_engine_ends_with_its_starter_though_that_has_not_heard_or_said_everything(
    last_words: bytes,
) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        engine = subprocess.Popen(
            [sys.executable, "-c", SPEAKER, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    try:
        assert ours.recv(1, socket.MSG_PEEK)
        ours.sendall(last_words)
        ours.close()
        assert engine.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    finally:
        end_group(engine.pid)
        engine.wait()


def test_the_model_is_made_once_and_the_same_everywhere(model: Path, tmp_path: Path) -> None:
    another = make_model(tmp_path / "model")
    weights = "model.safetensors"
    assert (another / weights).read_bytes() == (model / weights).read_bytes()
    made = (another / weights).stat().st_mtime_ns
    make_model(another)
    assert (another / weights).stat().st_mtime_ns == made


def test_an_unfinished_model_is_made_again(model: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    made = make_model(tmp_path / "model")
    assert (made / "config.json").read_text() == (model / "config.json").read_text()


def test_each_rank_of_each_engine_gets_cores_of_its_own_while_there_are_enough() -> None:
    cores = sorted(os.sched_getaffinity(0))
    shares = [rank.split(",") for share in share_cores(2, 2) for rank in share.split("|")]
    assert len(shares) == 4
    assert all(shares)
    if len(cores) >= 4:
        assert len({core for share in shares for core in share}) == sum(map(len, shares))
