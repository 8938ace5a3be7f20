"""`kvbm decode`: one payload in, one readable line out."""

from __future__ import annotations

import json

import pytest

from kvbm_schemas.block import BlockHash, Tier, pack
from kvbm_schemas.codec import Wire, encode
from kvbm_schemas.events import Stored
from kvbm_schemas.message import Message
from kvbm_schemas.records import NodeRecord, RankRecord, SlabRecord, TierStatus
from kvbm_schemas.requests import Holder, Leased, Lookup, Placements, Refused

HASHES = pack(BlockHash(bytes([n]) * 16) for n in range(1, 6))
STORED = Stored(epoch=1732, seq=12, tier=Tier.HOST, hashes=HASHES)


@pytest.mark.parametrize("wire", list(Wire))
def test_a_payload_in_either_wire_format_becomes_a_line(kvbm, wire: Wire) -> None:
    done = kvbm("decode", stdin=encode(STORED, wire))
    assert done.returncode == 0
    assert done.stderr == b""
    line = done.stdout.decode()
    assert line.count("\n") == 1
    assert line.startswith("stored ")
    assert "seq 12" in line
    assert "tier G2" in line
    assert "epoch 1732" in line
    assert "(5) 01010101 02020202 03030303 …" in line


def test_full_shows_every_hash_whole(kvbm) -> None:
    line = kvbm("decode", "--full", stdin=encode(STORED)).stdout.decode()
    assert "05" * 16 in line
    assert "…" not in line


def test_json_has_every_field_with_hashes_in_hex(kvbm) -> None:
    data = json.loads(kvbm("decode", "--json", stdin=encode(STORED)).stdout)
    assert data == {
        "type": "stored",
        "epoch": 1732,
        "seq": 12,
        "tier": "G2",
        "hashes": [f"{n:02x}" * 16 for n in range(1, 6)],
    }


def test_a_lease_shows_slots_and_stamps_as_numbers(kvbm) -> None:
    lease = Leased(
        lease="x" * 16,
        seconds=30,
        epoch=1,
        slots=(7).to_bytes(4, "little"),
        fills=(9).to_bytes(8, "little"),
        agents=("a",),
    )
    data = json.loads(kvbm("decode", "--json", stdin=encode(lease)).stdout)
    assert (data["slots"], data["fills"], data["agents"]) == ([7], [9], ["a"])


SLAB = SlabRecord(base=1, headers=2, slots=3, slot_bytes=4, header_bytes=32, parts=(2, 2))


@pytest.mark.parametrize(
    "message",
    [
        Lookup(hashes=HASHES),
        Placements(holders=((Holder(node="a", tier=Tier.HOST),), ())),
        NodeRecord(
            node="a", epoch=1, world_size=1, block_bytes=9, tiers=(TierStatus(Tier.HOST, 1, 1, 0),)
        ),
        RankRecord(node="a", rank=0, world_size=1, agent="n", agent_metadata=b"\xff", slab=SLAB),
    ],
)
@pytest.mark.parametrize("form", ["--json", "--full"])
def test_every_kind_of_field_can_be_shown(kvbm, message: Message, form: str) -> None:
    done = kvbm("decode", form, stdin=encode(message))
    assert done.returncode == 0
    assert done.stderr == b""


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"hello",
        b"{",
        b'{"type": "nonsense"}',
        encode(STORED)[:-3],
        b"\xff" * 100,
        bytes(1 << 21),
    ],
)
def test_what_is_not_ours_is_refused_in_one_line(kvbm, payload: bytes) -> None:
    done = kvbm("decode", stdin=payload)
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr.startswith(b"kvbm: not one of our messages: ")
    assert done.stderr.count(b"\n") == 1


def test_what_others_wrote_cannot_steer_the_terminal(kvbm) -> None:
    for payload in (encode(Refused(reason="\x1b[2Jgone")), b'{"type": "\\u001b[2J"}'):
        done = kvbm("decode", stdin=payload)
        assert b"\x1b" not in done.stdout + done.stderr
