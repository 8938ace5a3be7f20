"""The shipped permissions on a real server: what each role does works, and nothing else does."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import nats
import pytest
from nats.aio.msg import Msg
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeout

from kvbm_schemas.block import Tier, pack
from kvbm_schemas.codec import Decoder, encode
from kvbm_schemas.events import Stored
from kvbm_schemas.records import NodeRecord
from kvbm_schemas.requests import (
    Acquire,
    LeaseAnswer,
    Leased,
    Locate,
    Located,
    Lookup,
    Placements,
    Release,
    Renew,
    Resync,
    Segment,
)
from kvbm_schemas.step import Fetch
from kvbm_schemas.subjects import REGISTRY_NODE, node_inbox
from kvbm_service.adapters import nats_permissions
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_directory import NatsDirectory
from kvbm_service.adapters.nats_login import TlsFiles
from kvbm_service.errors import BusUnavailable, DirectoryError, Forbidden
from kvbm_service.presence import decode_record
from tests.patience import eventually
from tests.security import jwts
from tests.security.cluster import CHAINS, SCOPE, Cluster, rank_record
from tests.security.conftest import Kvbm
from tests.security.shipped import CONFIGURATION, shipped_nats

_answers: Decoder[LeaseAnswer] = Decoder(LeaseAnswer)  # type: ignore[arg-type]

RECORDS = "$KV.kvbm_nodes"
API = "$JS.API"
FORGED = encode(Stored(epoch=1 << 62, seq=1, tier=Tier.HOST, hashes=b"f" * 16))


@pytest.mark.parametrize("name", ["registry", "observer", "router", "operator", "node-1", "node-2"])
def test_the_shipped_files_are_what_the_command_prints(kvbm: Kvbm, name: str) -> None:
    role = ["node", "--node", name] if name.startswith("node") else [name]
    assert kvbm("permissions", *role).stdout == (CONFIGURATION / f"{name}.conf").read_text()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["node"], "--node=''"),
        (["node", "--node", "registry"], "--node='registry'"),
        (["node", "--node", "a.>"], "--node='a.>'"),
        (["node", "--node", "a", "--namespace", "*"], "--namespace='*'"),
        (["registry", "--node", "a"], "--node='a'"),
        (["king"], "'king' is not one of"),
    ],
)
def test_nobody_gets_permissions_by_a_name_that_is_none(
    kvbm: Kvbm, arguments: Sequence[str], complaint: str
) -> None:
    done = kvbm("permissions", *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stdout == ""


async def test_a_cluster_lives_with_the_permissions_that_we_ship(
    cluster: Cluster, kvbm: Kvbm
) -> None:
    looked_up = await cluster.ask(
        "node-2", SCOPE.of(REGISTRY_NODE, "lookup"), Lookup(hashes=pack(CHAINS["node-1"]))
    )
    assert Decoder(Located).decode(looked_up).segments == (Segment("node-1", Tier.HOST, 0, 4),)
    leased = _answers.decode(
        await cluster.ask(
            "node-2", SCOPE.of("node-1", "lease"), Acquire(hashes=CHAINS["node-1"][0])
        )
    )
    assert isinstance(leased, Leased)
    await (await cluster.bus("node-2")).publish(
        SCOPE.of("node-1", "release"), encode(Release(lease=leased.lease))
    )
    await eventually(lambda: _pinned(cluster) == 0)
    assert cluster.violations() == []
    for user in ("operator", "observer"):
        environ = cluster.shipped.environ(user)
        listed = await asyncio.to_thread(kvbm, "ls", "--json", environ=environ)
        assert [node["node"] for node in json.loads(listed.stdout)] == ["node-1", "node-2"]
        found = await asyncio.to_thread(
            kvbm, "locate", "--json", CHAINS["node-2"][0].hex(), environ=environ
        )
        assert "node-2" in found.stdout
        tapped = await asyncio.to_thread(
            kvbm, "tap", "--type", "beat", "--count", "1", environ=environ
        )
        assert "beat" in tapped.stdout.lower()
        assert found.stderr == ""


def _pinned(cluster: Cluster) -> int:
    status = cluster.leaders["node-1"].on_core(lambda core: core.status(), ())
    return sum(tier.pinned for tier in status)


async def attempts(cluster: Cluster, user: str, publications: Sequence[tuple[str, bytes]]) -> None:
    """Have `user` publish each of these, and require that the server refuses it."""
    complaints: list[str] = []

    async def complain(error: Exception) -> None:
        complaints.append(str(error))

    shipped = cluster.shipped
    client = await nats.connect(
        shipped.url(user), tls=TlsFiles(ca=shipped.ca).context(), error_cb=complain
    )
    for subject, payload in publications:
        await client.publish(subject, payload, reply=f"_INBOX.anything.{len(subject)}")
        await client.flush()
        await eventually(
            lambda subject=subject: any(f'"{subject.lower()}"' in each for each in complaints)  # type: ignore[misc]
        )
    await client.close()


def forgeries(victim: str) -> list[tuple[str, bytes]]:
    """What nobody but `victim` may say, and what nobody may say to it."""
    record = encode(NodeRecord(node=victim, epoch=1 << 62, world_size=1, block_bytes=1))
    life = rank_record(victim).instance
    fetch = Fetch(
        op=7, hashes=CHAINS[victim][0], fills=bytes(8), disk=bytes(4), host=bytes(4), instance=life
    )
    key = f"{RECORDS}.{SCOPE.namespace}.{SCOPE.fingerprint}.{victim}"
    return [
        (SCOPE.of(victim, "events"), FORGED),
        (SCOPE.of(victim, "loads"), b""),
        (SCOPE.of(victim, "rank-0"), encode(fetch)),
        (SCOPE.of(victim, "snapshot"), encode(Resync())),
        (key, record),
        (f"{key}.0", encode(rank_record(victim))),
        (f"_INBOX.node.{SCOPE.namespace}.{victim}.0.1", b""),
        (f"_INBOX.node.{SCOPE.namespace}.{victim}.0.{SCOPE.namespace}.node-3.1", b""),
        (f"_INBOX.registry.0.{SCOPE.namespace}.{victim}.1", b""),
        (f"_INBOX.command.0.{SCOPE.namespace}.{victim}.1", b""),
    ]


FOR_THE_OPERATOR = [
    (f"{API}.STREAM.{verb}.KV_kvbm_nodes", b"{}")
    for verb in ("CREATE", "DELETE", "PURGE", "UPDATE", "MSG.DELETE", "MSG.GET", "SNAPSHOT")
] + [
    (f"{API}.STREAM.CREATE.another", b"{}"),
    (f"{API}.CONSUMER.CREATE.KV_kvbm_nodes", b"{}"),
    (f"{API}.CONSUMER.DURABLE.CREATE.KV_kvbm_nodes.mine", b"{}"),
    (f"{API}.CONSUMER.NAMES.KV_kvbm_nodes", b""),
    (f"{API}.DIRECT.GET.KV_kvbm_nodes", b'{"seq":1}'),
    (f"{API}.DIRECT.GET.KV_kvbm_nodes.{RECORDS}.default.0123456789abcdef.node-2", b""),
]


async def test_a_node_speaks_for_no_other(cluster: Cluster) -> None:
    before = cluster.state()
    await attempts(cluster, "node-2", [*forgeries("node-1"), *FOR_THE_OPERATOR])
    await attempts(
        cluster,
        "node-2",
        [
            (SCOPE.of(REGISTRY_NODE, "locate"), b""),
            ("kvbm.other.0123456789abcdef.node-2.events", FORGED),
            ("kvbm.other.0123456789abcdef.registry.lookup", b""),
            (f"{RECORDS}.other.0123456789abcdef.node-2", b""),
            ("_INBOX.registry.0.1", b""),
            ("_INBOX.command.0.1", b""),
            ("anything.else", b""),
        ],
    )
    assert cluster.state() == before


async def test_who_asks_himself_may_answer_nowhere_else(cluster: Cluster) -> None:
    before = cluster.state()
    victim = SCOPE.of("node-1", "events")
    for user, own in (("node-2", SCOPE.of("node-2", "mine")), ("registry", None)):
        complaints: list[str] = []

        async def complain(error: Exception, heard: list[str] = complaints) -> None:
            heard.append(str(error))

        heard: list[Msg] = []

        async def hear(message: Msg, heard: list[Msg] = heard) -> None:
            heard.append(message)

        shipped = cluster.shipped
        client = await nats.connect(
            shipped.url(user), tls=TlsFiles(ca=shipped.ca).context(), error_cb=complain
        )
        subject = own or SCOPE.of(REGISTRY_NODE, "locate")
        queue = "" if own else nats_permissions.REGISTRY_QUEUE
        await client.subscribe(subject, queue, cb=hear)
        await client.flush()
        for _ in range(100):  # another registry may be the one that hears it
            await client.publish(subject, b"", reply=victim)
            await client.flush()
            if heard:
                break
        await eventually(lambda heard=heard: heard)  # type: ignore[misc]
        await client.publish(victim, FORGED)
        await client.flush()
        await eventually(lambda seen=complaints: any(victim in each for each in seen))  # type: ignore[misc]
        await client.close()
    assert cluster.state() == before


@pytest.mark.parametrize("user", ["observer", "node-2"])
async def test_nobody_has_jetstream_speak_for_another(cluster: Cluster, user: str) -> None:
    """Its answers, and what it pushes, go wherever a request says; no permission limits that."""
    before, leader = cluster.state(), cluster.leaders["node-1"]
    key = f"{RECORDS}.{SCOPE.namespace}.{SCOPE.fingerprint}.node-1"
    client = (await cluster.bus(user)).client
    pushing = {
        "stream_name": "KV_kvbm_nodes",
        "config": {
            "name": "mine",
            "deliver_subject": SCOPE.of("node-1", "lease"),
            "deliver_policy": "last_per_subject",
            "filter_subject": f"{RECORDS}.{SCOPE.namespace}.*.*",
            "ack_policy": "none",
        },
    }
    subject = f"{API}.CONSUMER.CREATE.KV_kvbm_nodes.mine.{pushing['config']['filter_subject']}"  # type: ignore[index]
    if user == "observer":
        subject = subject.replace(SCOPE.namespace, "*")
        pushing["config"]["filter_subject"] = f"{RECORDS}.*.*.*"  # type: ignore[index]
    answer = await client.request(subject, json.dumps(pushing).encode(), timeout=5.0)
    assert "error" not in json.loads(answer.data)
    listed: list[bytes | None] = []
    watch = await NatsDirectory(await cluster.bus("node-1")).watch(
        lambda change: listed.append(change.value), key.removeprefix(f"{RECORDS}.")
    )
    for _ in range(5):
        for target in (
            key,
            f"{API}.STREAM.DELETE.KV_kvbm_nodes",
            f"{API}.STREAM.PURGE.KV_kvbm_nodes",
        ):
            await client.publish(f"{API}.STREAM.INFO.KV_kvbm_nodes", b"", reply=target)
        await client.flush()
        epoch = leader.epoch
        await asyncio.sleep(1.5)  # it beats every second, and would notice
        assert leader.epoch == epoch, "it has lost its name"
    assert cluster.state() == before
    assert leader.rejected == 0, "it heard what was pushed"
    assert None not in listed
    assert all(b"node-1" in value for value in listed if value is not None)
    await watch.close()


@pytest.mark.parametrize("user", ["observer", "router"])
async def test_who_only_looks_on_publishes_nothing(cluster: Cluster, user: str) -> None:
    before = cluster.state()
    told = [*forgeries("node-1"), *FOR_THE_OPERATOR]
    told += [
        (SCOPE.of("node-1", "lease"), encode(Acquire(hashes=CHAINS["node-1"][0]))),
        (SCOPE.of("node-1", "release"), encode(Release(lease="0" * 32))),
        (SCOPE.of(REGISTRY_NODE, "lookup"), b""),
    ]
    await attempts(cluster, user, told)
    assert cluster.state() == before


async def test_a_registry_and_an_operator_speak_for_no_node(cluster: Cluster) -> None:
    before = cluster.state()
    told = [each for each in forgeries("node-1") if not each[0].endswith("snapshot")]
    await attempts(cluster, "registry", [*told, *FOR_THE_OPERATOR])
    await attempts(cluster, "operator", forgeries("node-1"))
    assert cluster.state() == before


@pytest.mark.parametrize(
    ("user", "subject"),
    [
        ("node-2", "kvbm.>"),
        ("node-2", "kvbm.*.*.*.events"),
        ("node-2", SCOPE.of("node-1", "lease")),
        ("node-2", SCOPE.of("node-1", "release")),
        ("node-2", SCOPE.of(REGISTRY_NODE, "lookup")),
        ("node-2", "_INBOX.>"),
        ("node-2", "_INBOX.*.*.*.>"),
        ("node-2", "_INBOX.node.default.node-1.>"),
        ("node-2", "_INBOX.registry.>"),
        ("node-2", "$KV.>"),
        ("node-2", "$JS.>"),
        ("node-2", ">"),
        ("registry", SCOPE.of("node-1", "lease")),
        ("registry", "_INBOX.node.>"),
        ("registry", SCOPE.of(REGISTRY_NODE, "lookup")),
        ("observer", "_INBOX.>"),
        ("observer", "_INBOX.registry.>"),
        ("observer", "$KV.>"),
        ("observer", "kvbm.*.*.*.release"),
        ("observer", "kvbm.*.*.*.lease"),
        ("router", "kvbm.>"),
        ("router", SCOPE.of("node-1", "events")),
        ("router", SCOPE.of("node-1", "loads")),
        ("router", "_INBOX.>"),
        ("router", "$KV.>"),
        ("operator", "_INBOX.node.>"),
        ("operator", ">"),
    ],
)
def test_what_is_not_for_a_role_is_not_in_its_permissions(user: str, subject: str) -> None:
    role = {
        "registry": nats_permissions.registry(),
        "observer": nats_permissions.observer(),
        "router": nats_permissions.router(),
        "operator": nats_permissions.operator(),
    }.get(user, nats_permissions.node("default", user))
    assert not any(_covers(allowed, subject) for allowed in role.subscribe) or any(
        _covers(denied, subject) for denied in role.deaf_to
    )


def _covers(pattern: str, subject: str) -> bool:
    """Whether every subject that `subject` may stand for is one of `pattern`."""
    allowed, asked = pattern.split("."), subject.split(".")
    if " " in pattern:
        return False  # only as one of a queue group
    for index, token in enumerate(allowed):
        if token == ">":
            return len(asked) > index
        if index >= len(asked) or asked[index] == ">" or token not in ("*", asked[index]):
            return False
    return len(allowed) == len(asked)


async def test_a_router_learns_of_engines_and_of_blocks_with_what_it_may(cluster: Cluster) -> None:
    bus = await cluster.bus("router")
    listed: set[str] = set()
    watch = await NatsDirectory(bus, leaders_only=True).watch(
        lambda change: listed.add(change.key.rpartition(".")[2]), f"{SCOPE.namespace}."
    )
    await eventually(lambda: {"node-1", "node-2"} <= listed)
    question = encode(Locate(hashes=CHAINS["node-1"][0]))
    answer = await bus.request(SCOPE.of(REGISTRY_NODE, "locate"), question, 5.0)
    assert [one.node for one in Decoder(Placements).decode(answer).holders[0]] == ["node-1"]
    await watch.close()
    assert cluster.violations() == []


async def test_nobody_listens_to_what_is_for_others(cluster: Cluster) -> None:
    complaints: list[str] = []

    async def complain(error: Exception) -> None:
        complaints.append(str(error))

    shipped = cluster.shipped
    for user, subject in [
        ("node-2", "kvbm.>"),
        ("node-2", SCOPE.of("node-1", "lease")),
        ("node-2", SCOPE.of(REGISTRY_NODE, "lookup")),
        ("node-2", "_INBOX.node.default.node-1.>"),
        ("node-2", "$KV.>"),
        ("registry", SCOPE.of(REGISTRY_NODE, "lookup")),
        ("observer", "_INBOX.>"),
        ("observer", "kvbm.*.*.*.release"),
        ("observer", "kvbm.*.*.*.lease"),
    ]:
        client = await nats.connect(
            shipped.url(user), tls=TlsFiles(ca=shipped.ca).context(), error_cb=complain
        )
        complaints.clear()
        await client.subscribe(subject)
        await client.flush()
        await eventually(lambda: complaints)
        assert "permissions violation for subscription" in complaints[0]
        await client.close()


async def test_an_observer_learns_no_lease_and_no_way_into_memory(cluster: Cluster) -> None:
    bus = await cluster.bus("observer")
    heard: list[tuple[str, bytes]] = []

    async def hear(delivery: object) -> None:
        heard.append((delivery.subject, delivery.payload))  # type: ignore[attr-defined]

    await bus.subscribe("kvbm.>", hear)
    subject = SCOPE.of("node-1", "lease")
    leased = _answers.decode(
        await cluster.ask("node-2", subject, Acquire(hashes=CHAINS["node-1"][0]))
    )
    assert isinstance(leased, Leased)
    node = await cluster.bus("node-2")
    await node.publish(subject, encode(Renew(lease=leased.lease)))
    await node.publish(subject, encode(Acquire(hashes=b"", handed_over=leased.lease)))
    await node.publish(SCOPE.of("node-1", "release"), encode(Release(lease=leased.lease)))
    await eventually(lambda: _pinned(cluster) == 0)
    await eventually(lambda: len([said for said, _ in heard if said.endswith("events")]) > 3)
    assert not any(leased.lease.encode() in payload for _, payload in heard)
    directory = NatsDirectory(bus)
    keys = [entry.key for entry in await directory.entries()]
    assert sorted(key.split(".")[2:] for key in keys) == [["node-1"], ["node-2"]]
    everything = NatsDirectory(node)
    assert len(await everything.entries("default.")) == 4


async def test_a_node_of_one_namespace_sees_nothing_of_another(cluster: Cluster) -> None:
    stranger = NatsDirectory(await cluster.bus("node-2"))
    for prefix in ("", "other.", "defaul"):
        with pytest.raises(DirectoryError, match="not for us"):
            await stranger.entries(prefix)
    with pytest.raises(Forbidden):
        await cluster.ask("node-2", "kvbm.other.x.registry.lookup", Lookup(hashes=b""))
    client = (await cluster.bus("node-2")).client
    with pytest.raises(NatsTimeout):
        await client.request(
            f"{API}.DIRECT.GET.KV_kvbm_nodes.{RECORDS}.other.x.node-9", timeout=0.5
        )
    with pytest.raises(NoRespondersError):
        await client.request("kvbm.default.x.node-9.lease", timeout=0.5)


async def test_a_rollup_does_not_remove_what_others_have_written(cluster: Cluster) -> None:
    client = (await cluster.bus("node-2")).client
    mine = f"{RECORDS}.{SCOPE.namespace}.0000000000000000.node-2"
    answer = await client.request(mine, b"x", timeout=5.0, headers={"Nats-Rollup": "all"})
    assert "rollup not permitted" in json.loads(answer.data)["error"]["description"]
    directory = NatsDirectory(await cluster.bus("node-1"))
    assert len(await directory.entries("default.")) == 4


async def test_a_question_does_not_make_its_answerer_speak_for_the_asker(cluster: Cluster) -> None:
    client = (await cluster.bus("node-2")).client
    key = f"{RECORDS}.{SCOPE.namespace}.{SCOPE.fingerprint}.node-1"
    before = cluster.state()
    questions = (
        (SCOPE.of("node-1", "lease"), Acquire(hashes=b"0" * 16)),
        (SCOPE.of("node-1", "rank-0"), Resync()),
        (SCOPE.of(REGISTRY_NODE, "lookup"), Lookup(hashes=b"")),
    )
    for reply in (key, SCOPE.of("node-1", "events"), SCOPE.of("node-1", "rank-0")):
        for subject, question in questions:
            await client.publish(subject, encode(question), reply=reply)
    await client.flush()
    subject, acquire = SCOPE.of("node-1", "lease"), Acquire(hashes=b"0" * 16)
    assert await cluster.ask("node-2", subject, acquire)  # comes after them
    assert cluster.state() == before
    entries = await NatsDirectory(await cluster.bus("node-1")).entries(f"{SCOPE.namespace}.")
    assert len(entries) == 4
    assert all(decode_record(entry.key, entry.value) is not None for entry in entries)


async def test_a_consumer_that_delivers_to_others_convinces_nobody(cluster: Cluster) -> None:
    """JetStream sends what a consumer delivers wherever its maker says, past all permissions."""
    client = (await cluster.bus("node-2")).client
    # It delivers where somebody listens without wildcards, as registries do not.
    observer = (await cluster.bus("observer")).client
    heard: list[str] = []

    async def hear(message: Msg) -> None:
        heard.append(message.subject)

    await observer.subscribe(SCOPE.of("node-1", "events"), cb=hear)
    await observer.flush()
    before = cluster.state()
    mine = f"{RECORDS}.{SCOPE.namespace}.{SCOPE.fingerprint}.node-2.7"
    victims = (
        (SCOPE.of("node-1", "events"), FORGED),
        (SCOPE.of("node-1", "lease"), encode(Acquire(hashes=CHAINS["node-1"][0]))),
        (SCOPE.of("node-1", "rank-0"), dict(forgeries("node-1"))[SCOPE.of("node-1", "rank-0")]),
    )
    for number, (victim, payload) in enumerate(victims):
        config = {
            "name": f"mine-{number}",
            "deliver_subject": victim,
            "deliver_policy": "last",
            "filter_subject": mine,
            "ack_policy": "none",
        }
        request = {"stream_name": "KV_kvbm_nodes", "config": config}
        await client.request(mine, payload, timeout=5.0)
        answer = await client.request(
            f"{API}.CONSUMER.CREATE.KV_kvbm_nodes.mine-{number}.{mine}",
            json.dumps(request).encode(),
            timeout=5.0,
        )
        assert "error" not in json.loads(answer.data), answer.data
    await eventually(lambda: mine in heard)
    subject, acquire = SCOPE.of("node-1", "lease"), Acquire(hashes=b"0" * 16)
    assert await cluster.ask("node-2", subject, acquire)
    assert cluster.state() == before


async def test_without_credentials_nothing_connects_and_the_command_says_what_to_set(
    tmp_path: Path, kvbm: Kvbm
) -> None:
    with shipped_nats(tmp_path) as shipped:
        for url in (shipped.server.url(), shipped.server.url("node-1:wrong")):
            with pytest.raises(BusUnavailable, match="refuses us"):
                await NatsBus.connect(url, tls=TlsFiles(ca=shipped.ca))
        environ = {"KVBM_NATS_URL": shipped.server.url(), "KVBM_NATS_CA": shipped.ca}
        for command in (["ls"], ["tap"], ["locate", "0" * 32], ["registry"]):
            done = await asyncio.to_thread(kvbm, *command, environ=environ)
            assert done.returncode == 1
            assert "set user and password in KVBM_NATS_URL" in done.stderr
            assert "KVBM_NATS_CREDENTIALS" in done.stderr


async def test_who_may_not_make_the_bucket_says_who_has_to(tmp_path: Path, kvbm: Kvbm) -> None:
    with shipped_nats(tmp_path) as shipped:
        done = await asyncio.to_thread(kvbm, "ls", environ=shipped.environ("observer"))
        assert done.returncode == 1
        assert "with the operator's credentials" in done.stderr


async def test_a_further_node_is_let_in_by_a_reload_and_an_old_one_is_cut_off(
    tmp_path: Path, kvbm: Kvbm
) -> None:
    folder = tmp_path / "conf"
    shutil.copytree(CONFIGURATION, folder)
    key, seed = jwts.Key(jwts.USER), tmp_path / "node-3.nk"
    seed.write_bytes(key.seed)
    printed = await asyncio.to_thread(kvbm, "permissions", "node", "--node", "node-3")
    (folder / "node-3.conf").write_text(printed.stdout)
    with shipped_nats(tmp_path, folder) as shipped:
        old = await shipped.bus("node-2", node_inbox("default", "node-2"))
        main = folder / "kvbm.conf"
        lines = main.read_text().splitlines(keepends=True)
        changed = [
            f'{{ nkey: "{key.public}", include "node-3.conf" }}\n' if '"node-2"' in line else line
            for line in lines
        ]
        assert changed != lines
        main.write_text("".join(changed))
        await asyncio.to_thread(shipped.server.reload)
        await eventually(lambda: not old.connected)
        new = await NatsBus.connect(
            shipped.server.url(),
            str(seed),
            tls=TlsFiles(ca=shipped.ca),
            inbox=node_inbox("default", "node-3"),
        )
        assert new.connected
        with pytest.raises(Forbidden):
            await new.request(SCOPE.of("node-2", "events"), FORGED, 5.0)
        await new.publish(SCOPE.of("node-3", "events"), FORGED)
        await new.client.flush()
        assert not [line for line in shipped.server.logged().splitlines() if "node-3.ev" in line]
        await new.close()
        await old.close()
