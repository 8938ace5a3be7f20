"""`kvbm tap`: what goes over the bus, live."""

from __future__ import annotations

import asyncio
import json
import signal

from kvbm_schemas.block import BlockHash, Tier, pack
from kvbm_schemas.codec import Wire, encode
from kvbm_schemas.events import Beat, Removed, Stored
from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_server import EmbeddedNats

HASHES = pack(BlockHash(bytes([n]) * 16) for n in range(1, 6))
STORED = Stored(epoch=1732, seq=1, tier=Tier.HOST, hashes=HASHES)
REMOVED = Removed(epoch=1732, seq=2, tier=Tier.HOST, hashes=HASHES[:16])
BEAT = Beat(epoch=1732, seq=2)
SUBJECT = Scope("default", "f00d").of("node-a", "events")


def publish(nats: EmbeddedNats, *messages: tuple[str, bytes]) -> None:
    async def send() -> None:
        bus = await NatsBus.connect(nats.url)
        for subject, payload in messages:
            await bus.publish(subject, payload)
        await bus.close()

    asyncio.run(send())


def test_events_are_shown_as_they_come(start, nats) -> None:
    tap = start("tap", "--nats-url", nats.url, "--count", "2")
    tap.wait_for("listening on kvbm.>")
    publish(nats, (SUBJECT, encode(STORED)), (SUBJECT, encode(REMOVED, Wire.JSON)))
    stored = tap.wait_for("stored")
    assert "node-a" in stored
    assert "tier G2" in stored
    assert "(5) 01010101 02020202 03030303 …" in stored
    tap.wait_for("removed")
    assert tap.wait() == 0


def test_only_the_types_asked_for_are_shown_and_counted(start, nats) -> None:
    tap = start("tap", "--nats-url", nats.url, "--type", "stored,Removed", "--count", "2")
    tap.wait_for("listening")
    publish(nats, *((SUBJECT, encode(one)) for one in (BEAT, STORED, BEAT, BEAT, REMOVED)))
    assert tap.wait() == 0
    assert sum("node-a" in line for line in tap.seen) == 2
    assert not any("beat" in line for line in tap.seen)


def test_only_the_subjects_asked_for_are_shown(start, nats) -> None:
    other = Scope("other", "f00d").of("node-b", "events")
    for wanted in (["--subject", "kvbm.*.*.node-b.events"], ["--namespace", "other"]):
        tap = start("tap", "--nats-url", nats.url, "--count", "1", *wanted)
        tap.wait_for("listening")
        publish(nats, (SUBJECT, encode(STORED)), (other, encode(STORED)))
        assert tap.wait() == 0
        assert "node-b" in tap.seen[-1]


def test_json_is_one_object_per_line(start, nats) -> None:
    tap = start("tap", "--json", "--nats-url", nats.url, "--count", "2")
    tap.wait_for("listening")
    publish(nats, (SUBJECT, encode(STORED)), (SUBJECT, b"\xffgarbage"))
    assert tap.wait() == 0
    good, bad = (json.loads(line) for line in tap.seen[1:])
    assert good["subject"] == SUBJECT
    assert (good["namespace"], good["fingerprint"]) == ("default", "f00d")
    assert (good["node"], good["what"]) == ("node-a", "events")
    assert good["message"]["type"] == "stored"
    assert good["message"]["hashes"][0] == "01" * 16
    assert "malformed" in bad


def test_a_malformed_message_is_shown_as_such_and_ends_nothing(start, nats) -> None:
    tap = start("tap", "--nats-url", nats.url, "--count", "2")
    tap.wait_for("listening")
    publish(nats, (SUBJECT, b"\x1b[2J not ours"), (SUBJECT, encode(STORED)))
    tap.wait_for("malformed: ")
    tap.wait_for("stored")
    assert tap.wait() == 0


def test_ctrl_c_and_sigterm_end_it_without_a_word(start, nats) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        tap = start("tap", "--nats-url", nats.url)
        tap.wait_for("listening")
        assert tap.stop(number) == 0
        assert len(tap.seen) == 1
