"""The guides' request through a prefill and a decode engine that a launch script has started."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.launch.plan import free_ports
from kvbm_schemas.block import Tier
from kvbm_schemas.events import Loaded
from kvbm_service.demo.engine import BLOCK_TOKENS
from tests.integration.witness import Witness
from tests.launch.script import Script, ask, nobody_listens, running

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

CHAT = "/v1/chat/completions"
START_SECONDS = 600.0
PATIENT = {
    "KVBM_LOOKUP_DEADLINE_MS": "10000",
    "KVBM_ROUTE_DEADLINE_MS": "5000",
    "KVBM_TRANSFER_TIMEOUT_SECONDS": "60",
    "CUDA_VISIBLE_DEVICES": "",
}
"""Nothing may depend on how fast the machine is."""


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    arguments = ["--port", str(free_ports(1)[0]), "--nats-port", "0", "--trial-model", "tiny"]
    arguments += ["--logs", str(tmp_path / "logs")]
    with running("disagg_kvbm.sh", *arguments, folder=tmp_path, environment=PATIENT) as script:
        script.wait_until_ready(START_SECONDS)
        yield script


def test_the_guides_request_is_answered_by_two_engines_as_by_one(script: Script) -> None:
    """And nothing is left when the script has ended."""
    nats_url = re.findall(r"export KVBM_NATS_URL=(\S+)", script.said)[0]
    witness = Witness(nats_url, membership_seconds=10.0)
    try:
        ask_both_ways(script, witness)
    finally:
        witness.close()
    ports = [int(url.rpartition(":")[2]) for url in (nats_url, *script.engines.values())]
    assert script.stop() == 0
    assert script.processes() == []
    assert all(nobody_listens(port) for port in (int(script.port), *ports))


def ask_both_ways(script: Script, witness: Witness) -> None:
    """In one piece and as a stream; each prompt comes from the prefill engine's device."""
    router = f"http://127.0.0.1:{script.port}"
    guides: dict[str, Any] = json.loads(re.findall(r"-d '(\{.*?\})'", script.said, re.DOTALL)[0])
    guides |= {"temperature": 0}
    other = [{"role": "user", "content": "Another prompt, " + guides["messages"][0]["content"]}]
    for body in (guides, guides | {"messages": other, "stream": True}):
        ask_once(script, witness, router, body)


def ask_once(script: Script, witness: Witness, router: str, body: dict[str, Any]) -> None:
    report = witness.listen()
    text, prompt_tokens = answer(router, body)
    alone = {**body, "cache_salt": "so that nothing is reused"}
    assert text == answer(script.engines["prefill-1"], alone)[0]
    loads = witness.wait("decode-1 says what it loaded", lambda: report.of(Loaded, "decode-1"))
    sources = [source for load in loads for source in load.sources]
    blocks = (prompt_tokens - 1) // BLOCK_TOKENS
    assert [(s.node, s.tier, s.blocks) for s in sources] == [("prefill-1", Tier.DEVICE, blocks)]
    assert report.failed("decode-1") == 0


def answer(url: str, body: dict[str, Any]) -> tuple[str, int]:
    """The text, and how many tokens the prompt had."""
    if not body["stream"]:
        whole = json.loads(ask(url, CHAT, body))
        return whole["choices"][0]["message"]["content"], whole["usage"]["prompt_tokens"]
    body = body | {"stream_options": {"include_usage": True}}
    lines = ask(url, CHAT, body).decode().splitlines()
    chunks = [json.loads(line[5:]) for line in lines if line.startswith("data: {")]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas), chunks[-1]["usage"][
        "prompt_tokens"
    ]
