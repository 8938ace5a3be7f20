"""One example of every message, or several; their bytes are in golden.json.

The bytes of a message never change: fields are only appended, with a default. After adding a
message or a field, add an example and run `python -m tests.wire.examples`: it writes what is
missing in golden.json, and never touches what is there.
"""

from __future__ import annotations

import json
from pathlib import Path

from msgspec.structs import replace

from kvbm_schemas.block import Tier
from kvbm_schemas.codec import Wire, encode
from kvbm_schemas.events import Beat, Cleared, Loaded, Removed, Source, Stored
from kvbm_schemas.message import Message
from kvbm_schemas.records import DeviceRecord, NodeRecord, RankRecord, SlabRecord, TierStatus
from kvbm_schemas.requests import (
    Acquire,
    Holder,
    Leased,
    Locate,
    Located,
    Lookup,
    Placements,
    Refused,
    Release,
    Renew,
    Resync,
    Segment,
    SnapshotChunk,
)
from kvbm_schemas.step import (
    Expect,
    Fetch,
    Lend,
    Load,
    LoadResult,
    LocalRead,
    Moved,
    RemoteFetch,
    RemoteRead,
    Save,
    Spill,
    StepCommands,
    StepResults,
    Survivors,
    Unlend,
    mark,
)

GOLDEN = Path(__file__).with_name("golden.json")

ONE = bytes(range(16))
TWO = ONE + bytes(range(240, 256))
SLOTS = bytes([7, 0, 0, 0, 8, 1, 0, 0])
FILLS = bytes([5, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0])
LEASE = "0123456789abcdef"

SLAB = SlabRecord(base=1 << 40, headers=1 << 39, slots=4, slot_bytes=4096, header_bytes=32)
RANK = RankRecord(
    node="a", rank=1, world_size=2, agent="a/1/x", agent_metadata=b"\x00\xff", slab=SLAB,
    device_blocks=64, instance="l1fe", disk_slots=128,
)  # fmt: skip
LENDER = replace(
    RANK,
    device=DeviceRecord(
        headers=1 << 38, blocks=64, device=1, regions=((1 << 47, 2048), ((1 << 47) + 512, 2048))
    ),
)
SAVE = Save(op=3, hashes=TWO, blocks=SLOTS, slots=SLOTS, tier=Tier.DISK)
SPILL = Spill(op=6, hashes=TWO, fills=FILLS, host=SLOTS, disk=SLOTS)
FETCH = Fetch(op=7, hashes=TWO, fills=FILLS, disk=SLOTS, host=SLOTS, instance="l1fe")
REMOTE_FETCH = RemoteFetch(
    op=8, node="b", agents=("b/0/x", "b/1/x"), seconds=2.5, hashes=TWO, fills=FILLS, slots=SLOTS,
    host=SLOTS,
)  # fmt: skip
LEND = Lend(op=9, hashes=TWO, blocks=SLOTS)
UNLEND = Unlend(op=10, blocks=SLOTS)
MOVED = Moved(op=3, failed=SLOTS, reason="disk full", seconds=0.5)
LOCAL = LocalRead(hashes=TWO, fills=FILLS, slots=SLOTS, blocks=SLOTS)
REMOTE = RemoteRead(
    node="b", agents=("b/0/x", "b/1/x"), seconds=2.5, hashes=TWO, fills=FILLS, slots=SLOTS,
    blocks=SLOTS,
)  # fmt: skip
LENT = replace(REMOTE, tier=Tier.DEVICE)
LOAD = Load(op=4, request="r", local=LOCAL, remote=(REMOTE,), disk=LOCAL)
RESULT = LoadResult(
    op=4, request="r", failed_blocks=SLOTS, reason="timed out", host_seconds=0.125,
    disk_seconds=0.25, remote_seconds=0.5,
)  # fmt: skip

EXAMPLES: dict[str, Message] = {
    "stored": Stored(epoch=1_700_000_000_000, seq=1, tier=Tier.HOST, hashes=TWO),
    "removed": Removed(epoch=1_700_000_000_000, seq=2, tier=Tier.DISK, hashes=ONE),
    "cleared": Cleared(epoch=1_700_000_000_000, seq=3),
    "beat": Beat(epoch=1_700_000_000_000, seq=3),
    "loaded": Loaded(
        request="r", sources=(Source("b", Tier.HOST, 2, 8192),), failed=1, seconds=0.25
    ),
    "loaded, nothing": Loaded(request="r", sources=()),
    "lookup": Lookup(hashes=TWO, asker="a"),
    "lookup, anonymous": Lookup(hashes=TWO),
    "located": Located(segments=(Segment("a", Tier.HOST, 0, 2), Segment("b", Tier.DISK, 2, 1))),
    "located, nowhere": Located(),
    "locate": Locate(hashes=TWO),
    "placements": Placements(holders=((Holder("a", Tier.HOST), Holder("b", Tier.DEVICE)), ())),
    "acquire": Acquire(hashes=TWO),
    "acquire, handed over": Acquire(hashes=TWO, handed_over=LEASE),
    "leased": Leased(
        lease=LEASE, seconds=30.0, epoch=9, slots=SLOTS, fills=FILLS, agents=("a/0/x", "a/1/x")
    ),
    "leased, on the device": Leased(
        lease=LEASE, seconds=30.0, epoch=9, slots=SLOTS, fills=FILLS, agents=("a/0/x",),
        tier=Tier.DEVICE,
    ),
    "refused": Refused(reason="not here"),
    "release": Release(lease=LEASE),
    "renew": Renew(lease=LEASE),
    "resync": Resync(),
    "snapshotchunk": SnapshotChunk(
        epoch=9, seq=42, index=1, total=3, tier=Tier.HOST, hashes=TWO
    ),
    "noderecord": NodeRecord(
        node="a", epoch=9, world_size=2, block_bytes=8192,
        tiers=(TierStatus(Tier.HOST, 100, 50, 5),), engine="vllm", instance="f00d",
    ),
    "noderecord, routed to": NodeRecord(
        node="a", epoch=9, world_size=1, block_bytes=8192, url="http://10.0.0.1:8001",
        role="decode", block_tokens=32, names="vllm tagged sha256 vllm-none-hash", model="tiny",
    ),
    "noderecord, bare": NodeRecord(node="a", epoch=9, world_size=1, block_bytes=8192),
    "rankrecord": RANK,
    "rankrecord, no disk": replace(RANK, disk_slots=0),
    "rankrecord, that lends": LENDER,
    "rankrecord, that lends ordinary memory": replace(
        LENDER, device=DeviceRecord(headers=1 << 38, blocks=64, device=None, regions=())
    ),
    "save": SAVE,
    "save, to the host": replace(SAVE, tier=Tier.HOST),
    "spill": SPILL,
    "fetch": FETCH,
    "fetch, with the step": replace(FETCH, instance=""),
    "remotefetch": REMOTE_FETCH,
    "lend": LEND,
    "lend, by the bus": replace(LEND, instance="l1fe"),
    "unlend": UNLEND,
    "expect": Expect(seconds=50.0, instance="l1fe"),
    "localread": LOCAL,
    "remoteread": REMOTE,
    "remoteread, of what is lent": LENT,
    "load": LOAD,
    "load, nothing": Load(op=4, request="r"),
    "load, no disk": replace(LOAD, disk=None),
    "stepcommands": StepCommands(
        saves=(SAVE,), loads=(LOAD,), peers=(RANK,), gone=("c/0/x",), spills=(SPILL,),
        fetches=(FETCH,), remote_fetches=(REMOTE_FETCH,), forget=True,
    ),
    "stepcommands, nothing": StepCommands(),
    "stepcommands, after a loss": StepCommands(meant=mark("b/0/1") + mark("b/1/2"), fence=7),
    "stepcommands, to lend": StepCommands(lends=(LEND,), unlends=(UNLEND,)),
    "loadresult": RESULT,
    "loadresult, all well": LoadResult(op=4, request="r"),
    "loadresult, not timed": LoadResult(
        op=4, request="r", failed_blocks=SLOTS, reason="timed out"
    ),
    "moved": MOVED,
    "moved, all well": Moved(op=3),
    "stepresults": StepResults(
        rank=1, moved=(MOVED,), loads=(RESULT,), disk_lost="read-only file system"
    ),
    "stepresults, nothing": StepResults(rank=0),
    "survivors": Survivors(tier=Tier.DISK, hashes=TWO, fills=FILLS, slots=SLOTS),
}  # fmt: skip
"""By the message's type, and what is special about it."""


def type_of(name: str) -> str:
    """The message type that the example of this name is of."""
    return name.partition(",")[0]


def main() -> None:
    """Write the bytes of examples that have none yet."""
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for name, message in EXAMPLES.items():
        golden.setdefault(
            name,
            {
                "json": encode(message, Wire.JSON).decode(),
                "msgpack": encode(message, Wire.MSGPACK).hex(),
            },
        )
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
